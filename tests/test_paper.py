"""The paper's figures against each other: what agrees, what differs, by hand."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from ewq_gguf import data
from ewq_gguf.cli import main
from ewq_gguf.experiments.paper import check_paper
from ewq_gguf.experiments.paper_classifiers import layer_parameters
from ewq_gguf.fastewq.rows import shipped_rows

TABLES = (3, 5, 6, 7, 8, 9, 13, 14)
SHAPES = data.table("paper_shapes")
BY_MODEL = {row["model"]: row for row in SHAPES}


@pytest.fixture(scope="module")
def result():
    tables = {number: data.table(f"paper_table{number}") for number in TABLES}
    return check_paper(tables, SHAPES, shipped_rows())


def by_what(result, subject):
    return {c.what: c for c in result.checks if c.subject == subject}


@pytest.mark.parametrize(
    ("model", "n_parameters"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 218_112_000),
        ("Qwen/Qwen2-7B-Instruct", 233_057_792),
        ("google/gemma-2-9b-it", 198_195_200),
        ("microsoft/Phi-3.5-mini-instruct", 113_252_352),
        # Phi's two fused matrices of 9216 and 16384 rows are counted once.
        ("microsoft/Phi-3-mini-128k-instruct", 191_895_552 - (9216 + 16384) * 3072),
        # q_proj and kv_b_proj, 3072 x 2048 and 4096 x 512, are counted once.
        ("deepseek-ai/DeepSeek-V2-Lite", 593_236_480 - 3072 * 2048 - 4096 * 512),
    ],
)
def test_layers_have_the_parameters_of_their_shapes(model, n_parameters):
    assert layer_parameters(BY_MODEL, model) == n_parameters


def test_table_9_is_gib_at_16_8_and_4_25_bits(result):
    checks = by_what(result, "table 9")

    assert len(checks) == 12
    # 218 112 000 x 2 bytes are 0.406265 GiB, printed 0.4062.
    assert [w for w, c in checks.items() if not c.agrees] == [
        "Meta-Llama-3.1-8B-Instruct raw, 16 bits, GiB"
    ]
    assert checks["Phi-3.5-mini-instruct 4bit, 4.25 bits, GiB"].computed == (
        pytest.approx(113_252_352 * 4.25 / 8 / 1024**3)
    )


def test_table_3_follows_from_table_5_with_its_columns_swapped(result):
    assert all(check.agrees for check in by_what(result, "table 3").values())
    named = [w for w, c in by_what(result, "table 5").items() if not c.agrees]
    assert len(named) == 6
    assert all(what.endswith("columns as named") for what in named)


def test_counts_that_do_not_add_up_are_found(result):
    wrong = [
        (c.what, c.printed, c.computed)
        for c in by_what(result, "table 7").values()
        if c.what.endswith("layers") and not c.agrees
    ]

    assert wrong == [
        ("Qwen2-7B-Instruct fast train 8bit mixed raw layers", 15, 16),
        ("Qwen2-7B-Instruct fast train 4bit/8bit mixed raw layers", 15, 16),
    ]


def test_sizes_that_contradict_their_counts_are_found(result):
    wrong = {
        c.what: c.computed
        for c in by_what(result, "table 6").values()
        if c.what.endswith("GiB") and not c.agrees
    }

    # 19 x 0.4062 + 13 x 0.2031 = 10.3581, printed 10.46.
    assert wrong == {
        "Meta-Llama-3.1-8B-Instruct 8bit mixed blocks, GiB": pytest.approx(10.3581),
        "Meta-Llama-3.1-8B-Instruct 4bit/8bit mixed blocks, GiB": pytest.approx(
            19 * 0.4062 + 11 * 0.2031 + 2 * 0.1079
        ),
    }


def test_table_8_and_14_agree_with_what_they_come_from(result):
    for subject in ("table 8", "table 14"):
        assert all(check.agrees for check in by_what(result, subject).values())


def test_table_13_follows_from_the_composite_score(result):
    checks = by_what(result, "table 13")

    assert len(checks) == 12
    # (0.003228 + 0.003074) / 2 = 0.003151, printed 0.0031.
    assert [w for w, c in checks.items() if not c.agrees] == [
        "fast 8bit mixed + fast 4bit/8bit mixed: abs_diff"
    ]


@pytest.mark.parametrize(
    ("what", "computed"),
    [
        # Llama's selections differ in 3 layers of each side, the others in none.
        ("fast agrees with ewq, % of table 8's layers", 100 * (1 - 6 / 134)),
        ("fast train agrees with ewq, % of table 8's layers", 100 * (1 - 14 / 134)),
    ],
)
def test_claims_of_the_text_are_recomputed(result, what, computed):
    assert by_what(result, "6.3")[what].computed == pytest.approx(computed)


def test_every_figure_is_checked_once_and_printed(result, capsys):
    named = Counter((check.subject, check.what) for check in result.checks)
    assert max(named.values()) == 1

    assert main(["paper", "check"]) == 0
    text = capsys.readouterr().out

    n_wrong = sum(not check.agrees for check in result.checks)
    n = len(result.checks)
    assert f"{n - n_wrong} of {n} figures agree, {n_wrong} differ." in text
    page = (Path(__file__).parent.parent / "docs" / "ewq-and-fastewq.md").read_text()
    assert f"{n - n_wrong} of {n} figures" in page
    assert max(map(len, text.splitlines())) <= 80


def test_json_holds_every_figure(result, capsys):
    assert main(["paper", "check", "--json"]) == 0

    assert json.loads(capsys.readouterr().out) == json.loads(result.to_json())


def test_the_shipped_tables_are_the_papers():
    folder = paper_dir()
    for number in (3, 5, 6, 7, 8, 9, 14):
        (source,) = folder.glob(f"table{number}_*.csv")
        lines = source.read_text(encoding="utf-8").splitlines()
        rows = [line for line in lines if "Description / Formula" not in line]

        shipped = Path(data.__file__).parent / f"paper_table{number}.csv"

        assert shipped.read_text(encoding="utf-8").splitlines()[1:] == rows


def paper_dir() -> Path:
    """The folder of the paper's tables as CSV, where this machine has one."""
    named, texts = os.environ.get("EWQ_PAPER_DIR"), os.environ.get("EWQ_TEXT_DIR")
    if not named and not texts:
        pytest.skip("the paper's tables are not here: set EWQ_PAPER_DIR")
    folder = Path(named) if named else Path(texts or "") / "paper"
    if not (folder / "table2_dataset_sample.csv").is_file():
        pytest.skip(f"the paper's tables are not in {folder}")
    return folder

"""FastEWQ: its rows, its splits, its figures; numbers worked out by hand."""

from __future__ import annotations

import csv
import json
import re
import sys
from dataclasses import replace
from functools import partial
from math import isclose
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ewq_gguf import data, store
from ewq_gguf.cli import main
from ewq_gguf.errors import InputError, ToolError
from ewq_gguf.experiments.paper_classifiers import layer_parameters
from ewq_gguf.fastewq import evaluation
from ewq_gguf.fastewq import rows as dataset
from ewq_gguf.fastewq.classifier import (
    CLASSIFIERS,
    FOREST,
    fit_and_score,
    select_layers,
    split,
)
from ewq_gguf.fastewq.evaluation import (
    MAJORITY,
    NEIGHBOURS,
    Settings,
    leave_models_out,
    score,
    score_left_out,
    scores_of,
)
from ewq_gguf.fastewq.rows import Row, merge_rows, parse_rows, rows_of_scan
from tests.scans import LAYER, MODEL, make_scan
from tests.test_paper import BY_MODEL as SHAPES
from tests.test_paper import paper_dir

ROWS = dataset.shipped_rows()
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
PHI = "microsoft/Phi-3.5-mini-instruct"


def row(model="m", index=2, kind="raw", size=100, layers=8):
    return Row(model, layers, index, size, kind, "scan")


def labelled(labels, model="m"):
    """A model's layers from a text such as `001`."""
    return [
        row(model, n + 2, "8-bit" if c == "1" else "raw", layers=len(labels))
        for n, c in enumerate(labels)
    ]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def scan_file(tmp_path):
    scan = make_scan([1.0, 2.0, 3.0, 4.0, 5.0])
    path = tmp_path / "scan.json"
    path.write_text(scan.to_json())
    return path


# The rows.


def test_the_papers_147_layers_are_shipped():
    assert len(ROWS) == len({r.key for r in ROWS}) == 147
    assert sum(r.quantized for r in ROWS) == 65
    assert sum(r.source == "table 2" for r in ROWS) == 17
    assert len({r.model_name for r in ROWS}) == 17
    assert {r.num_parameters for r in ROWS if r.model_name == LLAMA} == {218_112_000}
    assert {r.num_parameters for r in ROWS if r.model_name == PHI} == {113_252_352}


def test_corrected_rows_keep_what_was_printed():
    corrected = {
        r.model_name: (r.original_num_parameters, r.num_parameters)
        for r in ROWS
        if r.original_num_parameters
    }

    assert corrected == {
        "deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct": (89_395_712, 81_007_104),
        "deepseek-ai/DeepSeek-V2-Lite": (593_236_480, 584_847_872),
        "microsoft/Phi-3-mini-128k-instruct": (191_895_552, 113_252_352),
        PHI: (191_895_552, 113_252_352),
    }


def test_the_rows_follow_from_tables_2_and_8():
    folder = paper_dir()

    def table(name):
        return list(csv.DictReader((folder / name).read_text().splitlines()))

    n_layers = {
        r["model"]: int(r["n_blocks"]) for r in table("table9_block_size_gb.csv")
    }
    made = []
    for r in table("table8_selected_blocks.csv"):
        if r["variant"] == "ewq":
            four = set(r["four_bit_exec_index"].split())
            chosen = set(r["selected_exec_index"].split())
            model = r["model"].replace("Meta-Llama", "Llama")  # renamed on the Hub
            made += [
                Row(
                    model,
                    n_layers[r["model"]],
                    n,
                    layer_parameters(SHAPES, r["model"]),
                    "4-bit" if str(n) in four else
                    "8-bit" if str(n) in chosen else "raw",
                    "table 8",
                )
                for n in range(2, n_layers[r["model"]] + 2)
            ]  # fmt: skip
    assert len(made) == 134
    known = {r.key: r for r in made}
    n_repeated = 0
    for r in table("table2_dataset_sample.csv"):
        printed, right = (
            int(r["num_parameters"]),
            layer_parameters(SHAPES, r["model_name"]),
        )
        sample = Row(
            r["model_name"],
            int(r["num_blocks"]),
            int(r["exec_index"]),
            right,
            r["quantization_type"],
            "table 2",
            printed if printed != right else None,
        )
        if twin := known.get(sample.key):
            n_repeated += 1
            assert replace(twin, source="", original_num_parameters=None) == replace(
                sample, source="", original_num_parameters=None
            )
        made.append(sample)
    assert n_repeated == 4

    assert merge_rows(made) == ROWS


def test_rows_survive_their_own_file():
    odd = (*ROWS, row('a,b "c"'))

    read = parse_rows(csv.DictReader(dataset.to_csv(odd).splitlines()), "rows.csv")

    assert read == odd


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("num_blocks", "many"),
        ("exec_index", "1"),
        ("exec_index", "34"),
        ("num_parameters", "0"),
        ("quantization_type", "2-bit"),
        ("quantized", "1"),
        ("source", None),
    ],
)
def test_a_broken_row_is_refused_with_its_line(column, value):
    table = data.table("fastewq_rows")
    raw = next(n for n, r in enumerate(table) if r["model_name"] == LLAMA and
               r["quantized"] == "0")  # fmt: skip
    if value is None:
        del table[raw][column]
    else:
        table[raw][column] = value

    with pytest.raises(InputError, match=rf"rows\.csv:{raw + 2}: is not a labelled"):
        parse_rows(table, "rows.csv")


# Splits.


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.integers(2, 9),
            st.sampled_from([100, 200]),
            st.sampled_from(["raw", "8-bit"]),
        ),
        min_size=4,
        max_size=40,
        unique_by=lambda x: x[:2],
    ),
    st.integers(0, 5),
)
def test_equal_features_are_never_on_both_sides(made, seed):
    rows = [row(model, index, kind, size) for model, index, size, kind in made]

    train, asked = split(rows, seed)

    assert not {r.features for r in train} & {r.features for r in asked}
    assert sorted(r.key for r in train + asked) == sorted(r.key for r in rows)


def test_a_split_is_70_to_30_of_both_labels_and_repeats():
    train, asked = split(ROWS, 0)

    assert (len(train), len(asked)) == (103, 44)
    assert sum(r.quantized for r in asked) in (19, 20)  # 30 % of 65
    assert split(ROWS, 0) == (train, asked)
    assert split(ROWS, 1) != (train, asked)


def test_a_model_left_out_takes_its_twins_with_it():
    seen = {
        test[0].model_name: {r.model_name for r in train}
        for train, test in leave_models_out(ROWS)
    }

    assert len(seen) == 17
    assert all(model not in train for model, train in seen.items())
    # Mistral-7B-v0.3 has Llama-3.1-8B's shape: its one row is one of Llama's.
    assert "mistralai/Mistral-7B-Instruct-v0.3" not in seen[LLAMA]


# Figures, by hand.


def test_confusion_precision_recall_and_f1():
    asked = labelled("0001111100")
    # Called 1: the first raw, and three of the five quantised.
    scores = [0.9, 0.1, 0.1, 0.8, 0.8, 0.8, 0.2, 0.2, 0.5, 0.1]

    found = scores_of("x", asked, scores)

    assert (found.tn, found.fp, found.fn, found.tp) == (4, 1, 2, 3)
    assert found.accuracy == 0.7
    assert (found.quantised.precision, found.quantised.recall) == (3 / 4, 3 / 5)
    assert isclose(found.quantised.f1, 2 / 3)
    assert (found.raw.precision, found.raw.recall) == (4 / 6, 4 / 5)
    assert isclose(found.raw.f1, 8 / 11)
    assert (found.raw.support, found.quantised.support) == (5, 5)
    # Pairs ordered rightly: 0.8 beats four of five raw, thrice; 0.2 beats three, twice.
    assert found.roc_auc == (3 * 4 + 2 * 3) / 25


def test_a_label_never_called_has_no_precision_and_no_division():
    found = scores_of("x", labelled("011"), [0.0, 0.0, 0.0])

    assert (found.quantised.precision, found.quantised.f1) == (0, 0)
    assert found.roc_auc == 0.5
    assert scores_of("x", labelled("11"), [0.1, 0.2]).roc_auc is None


def test_baselines():
    rows = labelled("00110")

    assert score(MAJORITY, rows, rows) == [0, 0, 0, 0, 0]
    # Layers 1 to 5 see: 0, 0|1, 0|1, 1|0, 1; where they disagree the majority, raw.
    assert score(NEIGHBOURS, rows, rows) == [0, 0, 0, 0, 1]
    # Another model's layers are no neighbours.
    assert score(NEIGHBOURS, rows, labelled("1", "other")) == [0]


# The forest.


def test_the_forest_repeats_itself_and_knows_its_rows():
    features = [r.features for r in ROWS]

    full = select_layers(ROWS, features)

    assert [int(s.quantise) for s in full] == [r.quantized for r in ROWS]
    assert full == select_layers(ROWS, features, "full")
    train = select_layers(ROWS, features, "train")
    learned = {r.key for r in split(ROWS, 0)[0]}
    right = {
        r.key for r, s in zip(ROWS, train, strict=True) if s.quantise == r.quantized
    }
    assert learned <= right
    assert len(right) < 147


def test_an_answer_does_not_depend_on_the_others_asked():
    one = select_layers(ROWS, [ROWS[5].features])
    many = select_layers(ROWS, [r.features for r in ROWS])

    assert one[0] == many[5]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_answers_and_repeats(name):
    train, asked = split(ROWS, 0)
    features = [r.features for r in asked]

    scores = fit_and_score(name, train, features)

    assert scores == fit_and_score(name, train, features)
    assert len(set(scores)) > 1


@pytest.mark.parametrize(
    ("name", "library"), [("random forest", "sklearn"), ("XGB", "xgboost")]
)
def test_a_missing_library_names_the_extra(name, library, monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)

    with pytest.raises(ToolError, match=r"pip install 'ewq-gguf\[fastewq\]'") as error:
        fit_and_score(name, ROWS, [ROWS[0].features])

    assert error.value.exit_code == 4
    assert "\n" not in str(error.value)


# The user's own rows.


def test_a_scan_is_labelled_by_ewq_with_norms_counted():
    rows = rows_of_scan(make_scan([1.0, 2.0, 3.0, 4.0, 5.0]))

    # mu 3, sigma sqrt 2: below 1.586 is 4-bit, below 3 is 8-bit.
    labels = ["4-bit", "8-bit", "raw", "raw", "raw"]
    assert [r.quantization_type for r in rows] == labels
    assert [r.exec_index for r in rows] == [2, 3, 4, 5, 6]
    n = 576 + 576 * 576 + 2 * 576 * 1536
    assert {r.features[::2] for r in rows} == {(5, n)}
    assert set(LAYER) == {"attn_norm", "attn_q", "ffn_down", "ffn_up"}


@pytest.mark.parametrize(
    "scan",
    [
        make_scan([1.0, 2.0]).model_copy(update={"part": "1/2"}),
        make_scan([]),
        make_scan([1.0, 2.0], epsilon=0.5),
    ],
    ids=["part", "no layers", "epsilon"],
)
def test_a_scan_that_cannot_be_labelled_is_refused(scan):
    with pytest.raises(InputError):
        rows_of_scan(scan)


def test_add_is_idempotent_and_changes_no_plan(scan_file, capsys):
    assert main(["fastewq", "add", str(scan_file)]) == 0
    first = dataset.own_path().read_bytes()
    assert "5 layers, 2 to quantise" in capsys.readouterr().out

    assert main(["fastewq", "add", str(scan_file), str(scan_file), "--json"]) == 0
    added = json.loads(capsys.readouterr().out)

    assert dataset.own_path().read_bytes() == first
    assert added["models"] == {"hand-made": [5, 2]}
    assert added["n_rows"] == 5
    assert dataset.rows_in_use() == ROWS


def test_add_replaces_a_model_and_keeps_the_others():
    dataset.add([*labelled("0011"), *labelled("01", "other")])

    dataset.add(labelled("110"))

    assert dataset.own_rows() == (*labelled("110"), *labelled("01", "other"))


def test_train_puts_both_in_use_and_reset_takes_them_out(
    scan_file, capsys, monkeypatch
):
    few_trees = partial(evaluation.training, settings=Settings(n_trees=10))
    monkeypatch.setattr(evaluation, "training", few_trees)
    main(["fastewq", "add", str(scan_file)])
    assert main(["fastewq", "train"]) == 0
    text = capsys.readouterr().out

    assert "147 of the paper, 5 of your own" in text
    assert "circular" in text
    assert len(dataset.rows_in_use()) == 152

    assert main(["fastewq", "train", "--reset", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_own"] == 0
    assert dataset.rows_in_use() == ROWS
    assert len(dataset.own_rows()) == 5


def test_of_one_layer_the_users_row_counts():
    known = next(r for r in ROWS if r.model_name == LLAMA)
    other = "raw" if known.quantized else "8-bit"
    own = replace(known, quantization_type=other, source="scan")
    dataset.add([own])

    merged = dataset.merged_rows()

    assert len(merged) == 147
    assert own in merged


def test_train_without_rows_says_what_to_do(capsys):
    assert main(["fastewq", "train"]) == 3
    assert "ewq fastewq add SCAN" in capsys.readouterr().err


def test_a_broken_file_of_rows_is_one_line(capsys):
    store.write_text(dataset.own_path(), "model_name\nx\n", stage="test")

    assert main(["fastewq", "train"]) == 3
    assert "rows.csv:2: is not a labelled layer" in capsys.readouterr().err


# The evaluation.


@pytest.fixture(scope="module")
def evaluated():
    """A short one; the long one has its own figures in docs/ewq-and-fastewq.md."""
    return evaluation.evaluate(ROWS, Settings(n_splits=2, n_trees=20))


def test_evaluate_shows_ours_beside_the_papers(evaluated, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", {ROWS: evaluated}.__getitem__)

    assert main(["fastewq", "evaluate", "-q"]) == 0
    text = capsys.readouterr().out

    assert max(map(len, text.splitlines())) <= 80
    assert "147 of 17 models, 65 to quantise" in text
    assert "94 of 130 adjacent layers share their label, 72%" in text
    assert "circular" in text
    # Table 5 with its columns swapped, table 3, and the ablation.
    assert "105 16 26 63 0.80 0.87 0.83     0.80 0.71 0.75" in text
    assert "66.4%" in text
    assert "89.3%" in text
    assert "On a model it has not met, a forest fitted on these 147 rows" in text


def test_evaluation_figures_add_up(evaluated):
    found = evaluated

    assert [s.tn + s.fp + s.fn + s.tp for s in found.left_out] == [147] * 8
    assert [m.n_rows for m in found.left_out_models] == [28, 42, 32, 32]
    by_name = {s.name: s for s in found.left_out}
    assert by_name[MAJORITY].accuracy == 82 / 147
    assert sum(f.importance for f in found.features) == pytest.approx(1)
    assert found.in_sample[2].accuracy > 0.97
    assert MODEL.name not in {m.model_name for m in found.left_out_models}


def test_the_documentation_says_what_a_new_model_may_expect():
    found = scores_of(FOREST, ROWS, score_left_out(FOREST, ROWS))
    page = Path(__file__).parent.parent / "docs" / "ewq-and-fastewq.md"

    stated = re.search(r"forest is right for (\d+) %", page.read_text())

    assert stated
    # Another version of scikit-learn may draw other trees.
    assert found.accuracy == pytest.approx(int(stated[1]) / 100, abs=0.05)
    assert found.accuracy < 82 / 147


def test_a_model_without_layers_has_none_to_select():
    assert select_layers(ROWS, []) == ()


@pytest.mark.parametrize(
    "text",
    [
        "x" * 200_000,
        "m,28,5,{},raw,0,scan,".format("9" * 400),
        "m,28,5,100,raw,0,scan,",
    ],
)
def test_trained_rows_that_cannot_be_learned_from_are_refused(
    text, tmp_path, monkeypatch
):
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path))
    path = dataset.trained_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(",".join(dataset.COLUMNS) + f"\n{text}\n")

    with pytest.raises(InputError, match="ewq fastewq add"):
        dataset.rows_in_use()

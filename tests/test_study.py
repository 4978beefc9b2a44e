"""Studies on a real model of two layers: files are made, measured and removed."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ewq_gguf.cli import main
from ewq_gguf.experiments.study_record import Controls, FactorSweep, Frontier, Study
from ewq_gguf.records import StudyPart, load_record, read_journal
from tests.checkpoints import write_llama
from tests.gguf_files import make_cache, using_cache
from tests.test_bench_llama import prose

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [pytest.mark.llamacpp, pytest.mark.usefixtures("own_cache")]

ROLES = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
#: Of the second layer's weights: what Q4_0 holds exactly.
_STEP = 2.0**-7


def make_exact(folder: Path, layer: str) -> None:
    """Give a layer's matrices weights that Q4_0 holds exactly: whole steps, and -8 of
    them in every block of 32."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    (n_header,) = struct.unpack("<Q", data[:8])
    random = np.random.default_rng(0)
    for name, entry in json.loads(data[8 : 8 + n_header]).items():
        if layer not in name or len(entry["shape"]) < 2:
            continue
        begin, end = (8 + n_header + offset for offset in entry["data_offsets"])
        steps = random.integers(-8, 8, (end - begin) // 2)
        steps[::32] = -8
        values = (steps * np.float32(_STEP)).astype(np.float32)
        data[begin:end] = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    path.write_bytes(data)


@pytest.fixture(scope="module")
def session_cache(tmp_path_factory, toolchain) -> Path:
    """A cache without the files that other tests have measured."""
    return make_cache(tmp_path_factory.mktemp("cache"), toolchain)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, session_cache, toolchain) -> Path:
    """A checkpoint and a text."""
    place: Path = tmp_path_factory.mktemp("study")
    write_llama(place / "two")
    make_exact(place / "two", "layers.1.")
    (place / "prose.txt").write_text(prose(600))
    return place


def argv(folder: Path, study: str, *more: str) -> list[str]:
    options = ["--text", f"prose={folder / 'prose.txt'}", "--ctx", "64"]
    device = ["--chunks", "2", "--device", "cpu", "--threads", "1"]
    return ["study", study, str(folder / "two"), *options, *device, *more]


@pytest.fixture(scope="module")
def killed(folder, session_cache) -> int:
    """How many files a study had measured when it was killed."""
    with using_cache(session_cache):
        study = subprocess.Popen(
            [sys.executable, "-m", "ewq_gguf", *argv(folder, "sensitivity")],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            start_new_session=True,
        )
        while study.poll() is None and n_measured(session_cache) < 2:
            time.sleep(0.05)
        os.killpg(study.pid, signal.SIGKILL)
        study.wait()
    return n_measured(session_cache)


def n_measured(cache: Path) -> int:
    journals = (cache / "studies").glob("*.journal")
    return sum(len(read_journal(journal, StudyPart)) for journal in journals)


@pytest.fixture(scope="module")
def sensitivity(folder, killed, session_cache) -> Study:
    out = folder / "sensitivity.json"
    with using_cache(session_cache):
        assert main([*argv(folder, "sensitivity"), "-q", "-o", str(out)]) == 0
    return load_record(Study, out, "test")


def kld(file) -> float:
    return float(file.quality.kld.kld_mean_nats)


def test_a_study_that_was_killed_goes_on_where_it_was(
    killed, sensitivity, folder, session_cache, capsys
):
    assert 2 <= killed < 13
    # Nothing, all layers, two layers, seven roles, and the embedding and the head.
    assert n_measured(session_cache) == 4 + len(ROLES) + 2

    assert main([*argv(folder, "sensitivity"), "-o", str(folder / "again.json")]) == 0

    assert "13 of 13 files need no measuring" in capsys.readouterr().err
    assert (folder / "again.json").read_text() == sensitivity.to_json()


def test_nothing_is_left_of_the_files(sensitivity, session_cache):
    left = [path.suffix for path in (session_cache / "studies").iterdir()]

    assert left == [".journal"]


def test_a_file_with_nothing_quantised_is_the_base(sensitivity):
    floor = sensitivity.findings.floor

    assert kld(floor) == 0.0
    assert floor.quality.kld.kld_max_nats == 0.0
    assert floor.quality.kld.top1_agreement == 1.0


def test_a_layer_of_weights_that_its_type_holds_costs_next_to_nothing(sensitivity):
    random, exact = (kld(layer.file) for layer in sensitivity.findings.layers)

    assert random > 0
    # What is left is the rounding of activations.
    assert exact < random / 50


def test_every_role_is_probed_and_the_statistics_are_of_the_layers(sensitivity):
    found = sensitivity.findings

    assert {role.role for role in found.roles} == {*ROLES, "token_embd", "output"}
    assert {r.role: r.n_tensors for r in found.roles if r.role in ROLES} == (
        dict.fromkeys(ROLES, 2)
    )
    assert all(kld(role.file) > 0 for role in found.roles)
    # Of two layers nothing can be said but the order.
    by_name = {each.statistic: each.correlation for each in found.correlations}
    assert by_name["depth"].rho == pytest.approx(-1)
    assert by_name["depth"].p is None
    assert found.layers[0].file.layer_types == ("Q4_0", "BF16")


def test_controls_share_what_was_measured_and_say_what_they_cannot(
    sensitivity, folder, session_cache, capsys
):
    more = ["--ladder", "Q4_0,raw", "--permutations", "1"]
    before = n_measured(session_cache)
    out = folder / "controls.json"

    assert main([*argv(folder, "controls", *more), "-o", str(out)]) == 0

    study, said = load_record(Study, out, "test"), capsys.readouterr()
    # With one layer of two at Q4_0 a plan is a probe of a layer.
    assert n_measured(session_cache) == before
    assert "6 of 6 files need no measuring" in said.err
    found = study.findings
    assert isinstance(found, Controls)
    probes = {one.file.layer_types: one.file for one in sensitivity.findings.layers}
    files = [found.plan, *(one.file for one in found.controls)]
    assert [file.quality for file in files] == [
        probes[file.layer_types].quality for file in files
    ]
    assert len({file.size_bytes for file in files}) == 1
    assert [(c.order, c.seed is None) for c in found.controls] == [
        ("random", False), ("inverted", True), ("variance", True), ("first", True),
        ("last", True),
    ]  # fmt: skip
    others = {one.order: one for one in found.controls}
    assert others["random"].difference == others["inverted"].difference
    assert others["inverted"].difference.difference == pytest.approx(
        kld(others["inverted"].file) - kld(found.plan)
    )
    assert found.rank == (1 if others["random"].difference.difference > 0 else 2)
    assert found.p == found.rank / 2
    text = " ".join(said.out.split())
    assert "with 1 random ones it cannot be less than 0.50" in text
    assert max(map(len, said.out.splitlines())) <= 80


def test_factors_that_plan_the_same_share_a_file(
    sensitivity, folder, session_cache, capsys
):
    before = n_measured(session_cache)
    more = ["--ladder", "Q4_0,raw", "--factors", "0.5,0.9", "--json"]

    assert main([*argv(folder, "factor", *more), "-o", str(folder / "f.json")]) == 0

    study = Study.model_validate_json(capsys.readouterr().out)
    assert isinstance(study.findings, FactorSweep)
    first, second = study.findings.files
    assert (first.factor, second.factor) == (0.5, 0.9)
    assert first.file.quality == second.file.quality
    assert n_measured(session_cache) == before


def test_a_finished_study_is_shown_and_not_measured_again(
    sensitivity, folder, session_cache, capsys
):
    out = str(folder / "sensitivity.json")

    assert main([*argv(folder, "sensitivity"), "-o", out, "--json"]) == 0

    said = capsys.readouterr()
    assert "was there already, still valid" in " ".join(said.err.split())
    assert said.out == sensitivity.to_json()


@pytest.mark.parametrize(
    ("study", "more"),
    [
        pytest.param("sensitivity", ["--type", "Q4_1"], id="type"),
        pytest.param("sensitivity", ["--epsilon", "0.5"], id="epsilon"),
        pytest.param("sensitivity", ["--threads", "2"], id="threads"),
        pytest.param("frontier", ["--budgets", "60%"], id="frontier"),
    ],
)
def test_a_study_of_other_inputs_is_refused_before_any_measuring(
    study, more, sensitivity, folder, session_cache, capsys
):
    out = folder / f"{study}.json"
    if study == "frontier":  # of other budgets, measured likewise
        findings = Frontier(files=(), ratio=None)
        other = sensitivity.model_copy(update={"findings": findings})
        out.write_text(other.to_json())
    before, n_before = out.read_bytes(), n_measured(session_cache)

    words = argv(folder, study, *more)
    code = main([*(words[1:] if study == "frontier" else words), "-o", str(out)])

    err = " ".join(capsys.readouterr().err.split())
    assert code == 2
    assert "exists and was made from other inputs; use --force" in err
    assert "measur" not in err
    assert n_measured(session_cache) == n_before
    assert out.read_bytes() == before


def test_another_study_is_not_overwritten(sensitivity, folder, capsys):
    out = str(folder / "sensitivity.json")
    before = Path(out).read_bytes()

    code = main([*argv(folder, "factor", "--factors", "1"), "-o", out])

    assert code == 2
    assert "exists" in capsys.readouterr().err
    assert Path(out).read_bytes() == before


@pytest.mark.parametrize(
    ("study", "more", "problem"),
    [
        pytest.param("sensitivity", ["--type", "bf16"], "quantises nothing", id="raw"),
        pytest.param("sensitivity", ["--type", "Q9"], "not a ggml type", id="no-type"),
        pytest.param("sensitivity", ["--text", "x"], "not NAME=FILE", id="text"),
        pytest.param("controls", ["--permutations", "9"], "there are 1", id="too-many"),
        pytest.param("controls", ["--factor", "nan"], "not a number", id="factor"),
        pytest.param("factor", ["--factors", "a"], "neither FROM:TO:STEP", id="list"),
    ],
)  # fmt: skip
def test_what_cannot_be_studied_is_refused_before_any_measurement(
    study, more, problem, folder, capsys
):
    assert main(argv(folder, study, *more)) == 2
    assert problem in capsys.readouterr().err

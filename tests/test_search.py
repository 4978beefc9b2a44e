"""Policy `optimal` on real files: a model of stacked experts, everything measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ewq_gguf import api
from ewq_gguf.bench import runner
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.cli import main
from ewq_gguf.errors import ResourceError, VerificationError
from ewq_gguf.experiments.controls import kld_mean
from ewq_gguf.experiments.study_record import Study
from ewq_gguf.llamacpp.devices import Device
from ewq_gguf.optimal import file_measurer, settings
from ewq_gguf.optimal.candidate_selection import CandidateSelection
from ewq_gguf.optimal.predictor import Predictor
from ewq_gguf.optimal.settings import SearchSettings
from ewq_gguf.records import Plan, load_record
from ewq_gguf.stages import calibrating, candidate_files, presets
from tests.families import write_family
from tests.gguf_files import make_cache

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.usefixtures("own_cache", "few_windows"),
]

FAMILY = "Mixtral"
#: Presets to compare with, in place of thirty.
FEW_PRESETS = ("Q8_0", "Q5_K_M", "Q4_K_M", "Q4_0")
#: Texts and measurements as small as they can be.
SMALL = SearchSettings(
    n_search_documents=3,
    n_final_documents=5,
    n_probe_windows=1,
    n_search_windows=1,
    n_final_windows=2,
    max_sampled_weights=1,  # 64 rows of each tensor
    n_proposed=2,
    n_finalists=2,
    n_always_measured=2,
)


@pytest.fixture
def few_windows(monkeypatch, tmp_path):
    """Small texts, few presets and measurements, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrating, "N_DOCUMENTS", 8)
    monkeypatch.setattr(settings, "DEFAULT", SMALL)
    monkeypatch.setattr(presets, "PRESETS", FEW_PRESETS)
    monkeypatch.setattr(presets, "MORE_PRESETS", ())
    monkeypatch.setattr(presets, "IMATRIX_PRESETS", ())


@pytest.fixture(scope="module")
def session_cache(tmp_path_factory, toolchain) -> Path:
    """A cache of these tests alone: they leave journals that others count."""
    return make_cache(tmp_path_factory.mktemp("cache"), toolchain)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, session_cache, toolchain) -> Path:
    return write_family(tmp_path_factory.mktemp("search") / "moe", FAMILY)


def preset_size(folder: Path, name: str) -> int:
    found = api.preset_plans(api.open_model(str(folder)))
    return found[name].totals.file_size_bytes


def test_one_command_makes_the_best_file_of_a_size_and_says_how(
    folder, capsys, monkeypatch
):
    size = preset_size(folder, "Q4_K_M") + 2000  # and the matrix's keys
    asked = [
        "gguf", str(folder), "--policy", "optimal", "--budget", f"{size}B",
        "--effort", "0", "--threads", "1", "-o", "out.gguf", "-q",
    ]  # fmt: skip

    assert main(asked) == 0

    (plan_path,) = Path("plans").glob("*.json")
    plan = load_record(Plan, plan_path, "plan")
    assert plan.policy.name == "optimal"
    assert Path("out.gguf").stat().st_size == plan.totals.file_size_bytes <= size
    written = {t.name: t.ggml_type for t in read_gguf(Path("out.gguf")).tensors}
    assert written == {t.name: t.written_type for t in plan.tensors}
    found = plan.search
    assert found is not None
    best = found.files[0]
    assert found.chosen == best.name
    assert best.difference is None
    assert best.size_bytes == plan.totals.file_size_bytes
    # Nothing that was measured on many windows is better, and presets were among it.
    many = [one for one in found.files if one.many_nats is not None]
    assert best.many_nats == min(one.many_nats or 0.0 for one in many)
    kinds = {one.kind for one in many}
    assert "optimal" in kinds
    assert kinds & {"preset", "plan"}
    assert all(one.size_bytes <= size for one in found.files)
    assert found.n_probes >= 6  # every role
    assert (found.n_few, found.n_many) == (1, 2)

    # The same command finds the same and has nothing to do.
    before = Path("out.gguf").stat().st_mtime_ns
    assert main(asked) == 0
    assert Path("out.gguf").stat().st_mtime_ns == before

    assert main(["plan", "show", str(plan_path)]) == 0
    told = capsys.readouterr().out
    assert "filled by a search" in told
    assert best.name in told

    # With another calibration text its plan could not be written: it is not searched.
    monkeypatch.setattr("ewq_gguf.pipeline.planning.search", pytest.fail)
    Path("text.txt").write_text("the river runs past an old stone house " * 200)
    for words in (asked, ["plan", *asked[1:-3], "-o", str(plan_path)]):
        assert main([*words, "--calibration", "text.txt"]) == 2
        assert "exists and was made from other inputs" in capsys.readouterr().err


def test_where_a_preset_is_best_the_preset_is_what_comes(folder, monkeypatch):
    size = preset_size(folder, "Q5_K_M") + 2000

    # A predictor that takes every error for a gain proposes the worst.
    def propose(self, rng):
        costs = {
            name: {ggml_type: 1 / (cost + 1e-9) for ggml_type, cost in by_type.items()}
            for name, by_type in self.predictor.costs.items()
        }
        types = self.space.solve(Predictor(costs).corrected_costs(rng))
        return self.space.plan(types)

    monkeypatch.setattr(CandidateSelection, "propose", propose)
    # One of the files cannot be measured: the others go on without it.
    n_measured = 0

    def bench_file(*args):
        nonlocal n_measured
        n_measured += 1
        if n_measured == 3:
            raise VerificationError("bench", "study.gguf", "its logits are NaN", "")
        return runner.bench_file(*args)

    monkeypatch.setattr(candidate_files, "bench_file", bench_file)
    asked = [
        "plan", str(folder), "--policy", "optimal", "--budget", f"{size}B",
        "--effort", "0", "--threads", "1",
        "--types", "Q8_0,Q6_K,Q5_K,Q4_K,Q3_K,Q2_K,Q4_0",
        "-o", "plan.json", "-q",
    ]  # fmt: skip

    assert main(asked) == 0

    plan = load_record(Plan, Path("plan.json"), "plan")
    assert plan.search is not None
    chosen = plan.search.files[0]
    assert chosen.kind != "optimal"
    (left_out,) = [one for one in plan.search.files if one.few_nats is None]
    assert left_out.many_nats is None
    own = [one.few_nats for one in plan.search.files if one.kind == "optimal"]
    assert min(nats for nats in own if nats) > (chosen.few_nats or 0.0)
    # Another matrix, or none, is part of what was chosen.
    assert (plan.imatrix is not None) == chosen.has_imatrix


def test_what_cannot_be_is_refused_before_a_text_is_written(
    folder, toolchain, tmp_path, monkeypatch, capsys
):
    empty = tmp_path / "cache"
    empty.mkdir()
    monkeypatch.setenv("EWQ_CACHE", str(make_cache(empty, toolchain)))
    asked = ["plan", str(folder), "--policy", "optimal", "-q"]

    assert main([*asked, "--budget", "1000B"]) == 3
    assert "these types reach" in capsys.readouterr().err
    assert main([*asked, "--budget", "80%", "--floor", "atn_q=Q8_0"]) == 2
    assert "did you mean attn_q?" in capsys.readouterr().err
    assert not (empty / "texts").exists()


@pytest.mark.parametrize(
    ("backend", "free", "device"),
    [
        ("cpu", [2000], "cpu"),
        ("cuda", [2000], "auto"),
        ("cuda", [1100], "cpu"),
        ("cuda", [], "cpu"),  # a build for GPUs where there is none
    ],
)
def test_files_are_measured_where_the_base_fits(
    toolchain, tmp_path, monkeypatch, backend, free, device
):
    base = tmp_path / "base.gguf"
    base.write_bytes(bytes(1000))
    devices = [Device(f"CUDA{i}", "", 4000, room) for i, room in enumerate(free)]
    monkeypatch.setattr(file_measurer, "list_devices", lambda _: devices)
    built = replace(toolchain, backend=backend)

    assert file_measurer.measuring_device(base, built) == device


def test_a_file_that_has_to_be_fast_is_timed(folder, capsys, monkeypatch):
    n_timed = 0

    def bench_file(file, request, *args):
        nonlocal n_timed
        n_timed += request.tasks == ("speed",)
        if n_timed == 1:  # nothing quantised: the largest is the first
            raise ResourceError("bench", file, "has no room on the device", "")
        return runner.bench_file(file, request, *args)

    monkeypatch.setattr(candidate_files, "bench_file", bench_file)
    size = preset_size(folder, "Q5_K_M") + 2000
    asked = [
        "plan", str(folder), "--policy", "optimal", "--budget", f"{size}B",
        "--effort", "0", "--threads", "1", "--types", "Q8_0,Q4_0", "-q",
    ]  # fmt: skip

    assert main([*asked, "--min-tps", "1", "-o", "slow.json"]) == 0

    plan = load_record(Plan, Path("slow.json"), "plan")
    assert plan.search is not None
    timed = [one.tps for one in plan.search.files if one.many_nats is not None]
    assert all(tps is not None and tps > 1 for tps in timed)
    # Most presets have types that were excluded: none of them is in question.
    others = {one.name for one in plan.search.files if one.kind != "optimal"}
    assert {name.removesuffix(" imatrix") for name in others} <= {"Q8_0", "Q4_0"}
    # Nothing is as fast as this: what was reached is said.
    assert main([*asked, "--min-tps", "1e9", "-o", "fast.json"]) != 0
    assert "--min-tps" in capsys.readouterr().err
    assert not Path("fast.json").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "give one, such as --budget"),
        (["--budget", "9KB"], "choose a size between them"),
        (["--budget", "900GB"], "choose a size between them"),
        (["--budget", "30%", "--types", "Q9"], "'Q9' is not a ggml type"),
        (["--budget", "30%", "--floor", "attn_v=Q9"], "'Q9' is not a ggml type"),
        (["--budget", "30%", "--floor", "attn_w=Q5_0"], "there is no role 'attn_w'"),
        (["--budget", "30%", "--floor", "Q8_0", "--ceiling", "Q4_0"], "lower it"),
        (["--machine", "a=1GB"], "which places nothing"),
        (["--budget", "30%", "--factor", "2"], "--factor does not go with"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(folder, capsys, options, says):
    asked = [
        "plan",
        str(folder),
        "--policy",
        "optimal",
        "--effort",
        "0",
        "--threads",
        "1",
        "-q",
    ]

    assert main([*asked, *options]) != 0

    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error


def test_a_frontier_has_every_preset_and_the_best_beside_its_rival(folder, capsys):
    text = Path("words.txt")
    text.write_text("the river runs past an old stone house " * 200)
    asked = [
        "frontier", str(folder), "--presets", "Q4_K_M", "--effort", "0",
        "--threads", "1", "--text", f"words={text}", "--ctx", "64", "--chunks", "2",
        "--picture", "curve.png", "-o", "frontier.json",
    ]  # fmt: skip

    assert main(asked) == 0

    found = load_record(Study, Path("frontier.json"), "study").findings
    assert found.kind == "frontier"
    sizes = [one.file.size_bytes for one in found.files]
    assert sizes == sorted(sizes, reverse=True)
    labels = {one.file.label for one in found.files if one.source == "preset"}
    assert labels == {f"{name}{s}" for name in FEW_PRESETS for s in ("", " imatrix")}
    (best,) = [one for one in found.files if one.source == "optimal"]
    rival = next(one for one in found.files if one.file.label == best.rival)
    presets = [one.file for one in found.files if one.source == "preset"]
    fitting = [one for one in presets if one.size_bytes <= (best.limit_bytes or 0)]
    assert rival.file == min(fitting, key=kld_mean)
    assert found.ratio == pytest.approx(kld_mean(best.file) / kld_mean(rival.file))
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    assert "less KLD than the best preset" in told.replace("\n", " ")
    assert "optimal Q4_K_M " in told  # whole, in 80 columns
    json.loads(Path("frontier.json").read_text())

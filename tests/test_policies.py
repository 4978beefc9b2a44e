"""Every policy on the built-in model: planned, quantised and verified for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ewq_gguf import api
from ewq_gguf.api import Options, make_gguf
from ewq_gguf.cli import main
from ewq_gguf.plan.size_target import SizeTarget, parse_bpw, parse_budget
from ewq_gguf.records import (
    EwqPolicy,
    FastEwqPolicy,
    Plan,
    RulePolicy,
    UniformPolicy,
    load_record,
)
from ewq_gguf.stages import finished_plan
from tests.checkpoints import write_llama

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [pytest.mark.llamacpp, pytest.mark.slow]

POLICIES: dict[str, tuple[RulePolicy, SizeTarget | None]] = {
    "histogram": (EwqPolicy(measure="histogram"), None),
    "q75": (EwqPolicy(rule="q75", factor=0.5), None),
    "eight-bit-mixed": (EwqPolicy(ladder=("Q8_0", "raw")), None),
    "by-tensor": (EwqPolicy(granularity="tensor"), None),
    "edge": (EwqPolicy(ladder=("Q3_K", "Q4_K")), None),
    "fixed-types": (EwqPolicy(embedding_type="Q6_K", output_type="Q8_0"), None),
    "promoted": (EwqPolicy(), parse_budget("97%")),
    "uniform-and-promoted": (EwqPolicy(), parse_bpw("7")),
    "below-the-ladder": (EwqPolicy(), parse_budget("100MB")),
    "fastewq": (FastEwqPolicy(), None),
    "fastewq-train": (FastEwqPolicy(variant="train", n_low=1), parse_budget("90%")),
    "uniform": (UniformPolicy(ggml_type="IQ4_NL"), None),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_plan_of_each_policy_becomes_a_verified_file(
    name, own_cache, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    policy, budget = POLICIES[name]

    made = make_gguf(
        "demo",
        Path("out.gguf"),
        policy,
        budget=budget,
        options=Options(load=name == "below-the-ladder"),
    )

    assert made.path.stat().st_size == made.plan.totals.file_size_bytes
    assert not made.plan.totals.is_estimate
    if made.plan.budget is not None:
        assert made.path.stat().st_size <= made.plan.budget.limit_bytes
    if isinstance(policy, FastEwqPolicy):
        assert made.plan.weights_sha256 is None
    assert made.plan_path is not None
    again = load_record(Plan, made.plan_path, "test")
    assert again == made.plan
    made.path.unlink()  # a third of a gigabyte each


def test_a_classifiers_plan_can_be_given_and_needs_no_scan(
    own_cache, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finished_plan, "scan", None)  # would be called for weights
    budget = parse_budget("60%")
    plan = api.plan(api.Run("demo"), FastEwqPolicy(), budget=budget)

    made = make_gguf("demo", Path("out.gguf"), plan, options=Options(load=False))

    assert made.path.stat().st_size == plan.totals.file_size_bytes


def run(capsys, *args):
    """`ewq plan ...`: exit code, stdout and stderr."""
    code = main(["plan", *map(str, args)])
    return (code, *capsys.readouterr())


def test_the_command_line_reaches_every_parameter(own_cache, tmp_path, capsys):
    out = tmp_path / "plan.json"
    code, _, err = run(
        capsys, "demo", "-q", "-o", out, "--factor", "0.7", "--rule", "q75",
        "--granularity", "tensor", "--ladder", "q3_k,Q6_K,RAW", "--embedding-type",
        "q8_0", "--measure", "histogram", "--raw-type", "f16", "--budget", "50%",
    )  # fmt: skip

    assert (code, err) == (0, "")
    plan = load_record(Plan, out, "test")
    assert plan.policy == EwqPolicy(
        factor=0.7,
        rule="q75",
        granularity="tensor",
        ladder=("Q3_K", "Q6_K", "raw"),
        embedding_type="Q8_0",
        measure="histogram",
    )
    assert plan.raw_type == "F16"
    assert plan.budget is not None
    assert plan.budget.asked == "50%"
    assert plan.totals.file_size_bytes <= plan.budget.limit_bytes
    assert set(plan.thresholds) == {
        "attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up",
    }  # fmt: skip


def test_options_and_one_text_make_the_same_plan(own_cache, tmp_path, capsys):
    plans: list[Plan] = []
    for args in (
        ["--policy", "ewq:x0.7:tensor:Q3_K+Q6_K+raw:embd=q8_0@50%"],
        ["--factor", "0.7", "--granularity", "tensor", "--ladder", "Q3_K,Q6_K,raw",
         "--embedding-type", "q8_0", "--budget", "50%"],
        ["--policy", "ewq:x0.7:Q3_K+Q6_K+raw@50%", "--granularity", "tensor",
         "--embedding-type", "q8_0", "--factor", "0.7"],
    ):  # fmt: skip
        out = tmp_path / f"{len(plans)}.json"
        assert run(capsys, "demo", "-q", "-o", out, *args)[0] == 0
        plans.append(load_record(Plan, out, "test"))

    assert plans[0] == plans[1] == plans[2]


def test_a_cluster_is_planned_and_shown(own_cache, tmp_path, capsys):
    out = tmp_path / "plan.json"
    machines = ["--machine", "main=60MB", "--machine", "10.0.0.2=190MB,1GB,50GB/s"]

    code, *_ = run(capsys, "demo", "-q", "-o", out, "--ctx", 256, *machines)

    assert code == 0
    plan = load_record(Plan, out, "test")
    assert plan.placement is not None
    assert [stage.machine for stage in plan.placement.stages] == ["main", "10.0.0.2"]
    for stage, limit in zip(plan.placement.stages, (60e6, 190e6), strict=True):
        used = stage.weight_bytes + stage.kv_bytes + stage.compute_bytes
        assert used <= limit
    _, shown, _ = run(capsys, "show", out)
    assert "10.0.0.2  4-29+out" in shown
    assert "1 between machines" in shown
    assert "unused" not in shown
    _, commands, _ = run(capsys, "export", out, "--format", "rpc", "--gguf", "m.gguf")
    assert "ggml-rpc-server -H 10.0.0.2 -p 50052 -c\n" in commands
    assert "-m m.gguf -c 256 -fit off -ngl 27 --rpc 10.0.0.2:50052" in commands


def test_a_plan_without_machines_has_no_commands_for_them(own_cache, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert run(capsys, "demo", "-q", "-o", out, "--policy", "fastewq")[0] == 0

    assert run(capsys, "export", out, "--format", "rpc")[0] == 3
    assert run(capsys, "export", out, "--allow-public")[0] == 2


@pytest.mark.fault(96)
def test_a_worker_that_the_internet_reaches_must_be_allowed(
    own_cache, tmp_path, capsys
):
    out = tmp_path / "plan.json"
    machines = ["--machine", "main=60MB", "--machine", "8.8.8.8=190MB"]
    assert run(capsys, "demo", "-q", "-o", out, "--ctx", 256, *machines)[0] == 0

    code, _, err = run(capsys, "export", out, "--format", "rpc")
    assert (code, err.count("\n")) == (2, 1)
    assert "public address" in err
    code, text, _ = run(capsys, "export", out, "--format", "rpc", "--allow-public")
    assert code == 0
    assert "WARNING" in text


def test_a_cluster_that_holds_nothing_is_refused(own_cache, tmp_path, capsys):
    for machines, words in (
        (["main=1MB"], "--machine: 1,000,000 bytes of memory do not hold more than"),
        (["main=110MB"], "can be placed on 1 machines with 256"),
    ):
        args = [a for machine in machines for a in ("--machine", machine)]
        code, _, err = run(
            capsys, "demo", "-q", "-o", tmp_path / "x.json", "--ctx", 256, *args
        )
        assert code == 3
        assert words in err
        assert err.count("\n") == 1


def test_the_machines_own_memory_is_a_budget(own_cache, tmp_path, capsys):
    out = tmp_path / "plan.json"

    code, *_ = run(
        capsys, "demo", "-q", "-o", out, "--budget", "auto", "--device", "cpu",
        "--ctx", 512,
    )  # fmt: skip

    assert code == 0
    budget = load_record(Plan, out, "test").budget
    assert budget is not None
    assert (budget.case, budget.n_ctx) == (1, 512)
    # K and V of 3 x 64 values in 30 layers; logits of 49152 tokens, and more.
    assert (budget.context_bytes or 0) > 512 * 30 * 2 * 192 * 2 + 512 * 49152 * 4


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--budget", "0GB"], 2, "no size above 0"),
        (["--budget", "4.5.6GB"], 2, "no size above 0"),
        (["--budget", "6"], 2, "with its unit"),
        (["--budget", "1e400"], 2, "no size above 0"),
        (["--bpw", "nan"], 2, "no number above 0"),
        (["--budget", "6GB", "--bpw", "4"], 2, "give one"),
        (["--budget", "6GB", "--machine", "a=1GB"], 2, "give one"),
        (["--ctx", "512"], 2, "--ctx goes with --budget auto"),
        (["--budget", "6GB", "--device", "cpu"], 2, "--device goes with --budget auto"),
        (["--budget", "auto", "--device", "XPU7"], 4, "no device but the CPU"),
        (["--policy", "uniform:Q8_0", "--budget", "1GB"], 2, "--budget does not go"),
        (["--policy", "fastewq", "--factor", "1"], 2, "--factor does not go"),
        (["--variant", "train"], 2, "--variant does not go"),
        (["--policy", "fast"], 2, "unknown policy"),
        (["--policy", "fastewq:x"], 2, "is no parameter of it; use fastewq[:train]"),
        (["--policy", "uniform"], 2, "lacks its ggml_type; use uniform:TYPE"),
        (["--policy", "ewq:x0.8", "--factor", "1"], 2, "--factor contradicts"),
        (["--policy", "ewq@1GB", "--bpw", "4"], 2, "--bpw contradicts"),
        (["--policy", "uniform:Q8_0@1GB"], 2, "has no types to choose from"),
        (["--policy", "probe:layers:Q4_0"], 2, "tells where types came from"),
        (["--machine", "a"], 2, "a"),
        (["--machine", "a=1GB", "--machine", "a=2GB"], 2, "a"),
        (["--machine", "a=1GB", "--machine", "127.1=1GB"], 2, "address of a worker"),
        (["--machine", "a=1GB", "--machine", "0.0.0.0=1GB"], 2, "address of a worker"),
        (["--machines", "none.toml"], 3, "none.toml"),
        pytest.param(
            ["--budget", "1GB"], 3, "84,165,312 to 327,509,184",
            marks=pytest.mark.fault(63),
        ),
        pytest.param(
            ["--budget", "1MB"], 3, "84,165,312 to 327,509,184",
            marks=pytest.mark.fault(63),
        ),
        (["--ladder", "Q4_K"], 2, "--ladder"),
        (["--ladder", "Q8_0,Q4_K"], 2, "does not rise"),
        (["--ladder", "IQ2_XXS,Q4_K"], 3, "importance matrix"),
        (["--low-layers", "1", "--policy", "fastewq", "--ladder", "Q8_0,raw"], 2,
         "ladder of three"),
    ],
)  # fmt: skip
def test_a_bad_request_is_one_line_and_its_exit_code(
    args, code, words, own_cache, tmp_path, capsys
):
    found, out, err = run(capsys, "demo", "-q", "-o", tmp_path / "x.json", *args)

    assert (found, out) == (code, "")
    assert words in err
    assert err.startswith("ewq: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "x.json").exists()


@pytest.mark.fault(64)
def test_between_two_sizes_the_lower_is_taken_and_the_gap_is_said(
    own_cache, tmp_path, capsys
):
    out = tmp_path / "plan.json"
    assert run(capsys, "demo", "-q", "-o", out, "--budget", "200MB")[0] == 0
    plan = load_record(Plan, out, "test")
    gap = 200_000_000 - plan.totals.file_size_bytes

    assert 0 < gap < 4_000_000  # a layer's step
    assert f"{gap:,} unused" in run(capsys, "show", out)[1]


def test_a_sweep_says_what_each_factor_makes(own_cache, capsys):
    code, text, _ = run(capsys, "sweep", "demo", "-q", "--factors", "0:2:0.5", "--json")

    assert code == 0
    rows = json.loads(text)
    assert [row["factor"] for row in rows] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert [sum(row["counts"].values()) for row in rows] == [30] * 5
    sizes = [row["file_size_bytes"] for row in rows]
    assert sizes == sorted(sizes)  # a larger factor never lowers a precision
    assert rows[2]["file_size_bytes"] == 314_680_512
    _, table, _ = run(capsys, "sweep", "demo", "-q", "--factors", "0,1")
    assert "layers of each type" in table
    assert all(len(line) <= 80 for line in table.splitlines())


@pytest.mark.parametrize("factors", ["", "x", "1:0:0.1", "0:1:0", "0:1e9:1e-9", "1:2"])
def test_factors_that_are_none_are_a_usage_error(factors, capsys):
    code, _, err = run(capsys, "sweep", "demo", "--factors", factors)

    assert code == 2
    assert "FROM:TO:STEP" in err


def test_a_budget_needs_the_header_that_a_scan_alone_does_not_tell(
    own_cache, tmp_path, capsys, monkeypatch
):
    scan = tmp_path / "scan.json"
    assert main(["scan", "demo", "-q", "-o", str(scan)]) == 0
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path / "empty"))
    capsys.readouterr()
    for policy in ("ewq", "fastewq"):
        out = tmp_path / f"{policy}.json"
        args = [scan, "-q", "-o", out, "--policy", policy]

        assert run(capsys, *args)[0] == 0
        assert load_record(Plan, out, "test").totals.is_estimate
        code, _, err = run(capsys, *args, "--force", "--budget", "200MB")
        assert (code, err.count("\n")) == (3, 1)
        assert "header is not known" in err


def test_the_same_machine_makes_the_same_plan(own_cache, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["demo", "-q", "--budget", "auto", "--device", "cpu", "--ctx", "512"]

    first, again = run(capsys, *args), run(capsys, *args)

    assert first[0] == 0
    assert again == first


def test_what_a_plan_depends_on_is_in_its_name(
    own_cache, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    every: tuple[list[str], ...] = (
        [],
        ["--budget", "60%"],
        ["--bpw", "7"],
        ["--budget", "auto", "--device", "cpu"],
        ["--budget", "auto", "--device", "cpu", "--ctx", "512"],
        ["--machine", "a=200MB", "--machine", "b=150MB", "--ctx", "512"],
        ["--machine", "a=250MB", "--machine", "b=150MB", "--ctx", "512"],
        ["--policy", "fastewq"],
        ["--policy", "fastewq", "--low-layers", "1"],
        ["--rule", "q75"],
        ["--granularity", "tensor"],
        ["--embedding-type", "raw"],
    )
    names = {run(capsys, "demo", "-q", *args)[1] for args in every}

    assert len(names) == len(every)


def test_a_classifier_decides_alike_from_model_and_scan(own_cache, tmp_path, capsys):
    scan, plans = tmp_path / "scan.json", []
    assert main(["scan", "demo", "-q", "-o", str(scan)]) == 0
    capsys.readouterr()
    for source in ("demo", scan):
        out = tmp_path / "plan.json"
        args = [source, "-q", "--force", "-o", out, "--policy", "fastewq"]
        assert run(capsys, *args)[0] == 0
        plans.append(load_record(Plan, out, "test"))

    assert plans[0] == plans[1]


def test_a_budget_counts_the_header_that_ones_own_llama_cpp_writes(
    own_cache, toolchain, tmp_path
):
    folder = write_llama(tmp_path / "fresh", n_layers=4, hidden=256, ffn=256)
    options, budget = Options(llama_cpp=toolchain.bin_dir), parse_budget("60%")
    run = api.Run(str(folder), options)

    fast = api.plan(run, FastEwqPolicy(), budget=budget)
    assert fast.budget is not None
    assert fast.totals.header_bytes is not None
    assert fast.totals.file_size_bytes <= fast.budget.limit_bytes

    scan = api.Run(api.scan(run), options)
    for policy in (FastEwqPolicy(), EwqPolicy()):
        by_scan = api.plan(scan, policy, budget=budget)
        assert by_scan == api.plan(run, policy, budget=budget)

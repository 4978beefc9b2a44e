"""`ewq compare` on a tiny model: files made, measured in turns, used again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from ewq_gguf import api
from ewq_gguf.bench.statistics import paired_bootstrap
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.cli import main
from ewq_gguf.experiments.comparison_record import Comparison
from ewq_gguf.process import run
from ewq_gguf.records import Plan, PresetPolicy, Result, load_record
from tests.gguf_files import using_cache
from tests.test_bench_llama import prose

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.slow,
    pytest.mark.usefixtures("own_cache"),
]

N_CHUNKS, N_TURNS = 24, 2


@dataclass(frozen=True)
class Compared:
    """A finished comparison: of a twin of Q8_0 and of a plan that wastes bytes."""

    argv: list[str]
    folder: Path
    comparison: Comparison
    out: str
    err: str


def compare_argv(model: Path, text: Path, folder: Path, plans: str, *more: str):
    return [
        "compare", str(model), "--plans", plans, "-o", str(folder), "--device", "cpu",
        "--text", f"prose={text}", "--ctx", "32", "--chunks", str(N_CHUNKS),
        "--threads", "1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def compared(tiny, session_cache, tmp_path_factory) -> Compared:
    folder: Path = tmp_path_factory.mktemp("compared")
    text = folder / "text.txt"
    text.write_text(prose(2000))
    # The embedding at 16 bits, everything that computes at 4: large and bad.
    wasteful = tiny.plan("Q4_0", token_embd="BF16", output="BF16")
    plan = folder / f"{tiny.checkpoint.identity.name}.wasteful.json"
    plan.write_text(wasteful.to_json())
    argv = compare_argv(
        tiny.folder, text, folder / "work", f"uniform:Q8_0,{plan}",
        "--presets", "q4_0", "--tasks", "kld,speed,memory", "--repeats", str(N_TURNS),
    )  # fmt: skip
    with using_cache(session_cache):
        done = cli(argv)
    assert done.returncode == 0, done.stderr
    found = load_record(Comparison, folder / "work" / "comparison.json", "test")
    return Compared(argv, folder / "work", found, done.stdout, done.stderr)


def cli(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ewq_gguf", *argv],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "100"},
    )


def stages(err: str) -> list[str]:
    """What was measured, in order."""
    return re.findall(r"^ewq: ((?:bench|speed) .*)$", err, re.M)


def one_line(text: str) -> str:
    return " ".join(text.split())


def n_reused(err: str) -> int:
    """Results that were there; a long line is broken anywhere."""
    return one_line(err).count("was there already, still valid")


def test_plans_stand_beside_the_presets_that_bracket_them(compared, tiny):
    rows = {row.name: row for row in compared.comparison.rows}
    sizes = [row.result.size_bytes for row in compared.comparison.rows[1:]]
    with_plans = {name for name, row in rows.items() if row.kind == "plan"}

    assert compared.comparison.rows[0].kind == "base"
    assert with_plans == {"uniform-Q8_0", "wasteful"}
    assert sizes == sorted(sizes, reverse=True)
    assert rows["Q4_0"].kind == "preset"  # asked for
    assert rows["Q4_0"].brackets == ()
    assert set(rows["Q8_0"].brackets) == with_plans  # as large as one, below the other
    assert rows["base"].brackets == ("wasteful",)  # Q8_0 is all that its twin needs
    presets = api.preset_plans(api.Run(tiny.checkpoint))
    for name in with_plans:
        size = rows[name].result.size_bytes
        between = [
            preset
            for preset, plan in presets.items()
            if rows["Q8_0"].result.size_bytes < plan.totals.file_size_bytes <= size
        ]
        assert between == []


def test_every_file_is_what_its_plan_says_and_what_was_measured(compared):
    for row in compared.comparison.rows[1:]:
        plan = load_record(Plan, compared.folder / "plans" / f"{row.name}.json", "test")
        file = compared.folder / "files" / f"{row.name}.gguf"
        kept = compared.folder / "results" / f"{row.name}.json"
        assert row.plan_sha256 == plan.sha256
        assert file.stat().st_size == plan.totals.file_size_bytes
        assert row.result.size_bytes == plan.totals.file_size_bytes
        assert row.bpw == plan.totals.bpw
        assert load_record(Result, kept, "test") == row.result
        types = {t.name: t.ggml_type for t in read_gguf(file).tensors}
        assert types == {t.name: t.written_type for t in plan.tensors}


def test_the_conditions_are_the_same_for_all(compared):
    first, *others = (row.result for row in compared.comparison.rows[1:])
    assert all(other.parameters == first.parameters for other in others)
    base = compared.comparison.rows[0].result
    # It is not compared with itself; the rest is the same.
    assert base.parameters.tasks == ("perplexity", "speed", "memory")
    update = {"tasks": first.parameters.tasks}
    assert base.parameters.model_copy(update=update) == first.parameters
    assert first.base is not None
    assert first.base.sha256 == base.file.sha256


def test_speeds_are_measured_in_turns(compared):
    names = [row.name for row in compared.comparison.rows]
    expected = [f"speed {name}, 1 of {N_TURNS}" for name in names]
    expected += [f"speed {name}, 2 of {N_TURNS}" for name in reversed(names)]

    # The base's reference may be there from another run.
    told = stages(compared.err)
    found = [stage for stage in told if not stage.startswith("reference ")]
    assert found[: len(names)] == [f"bench {name}" for name in names]
    assert found[len(names) :] == expected
    for row in compared.comparison.rows:
        turns = [
            load_record(Result, path, "test").speed
            for path in compared.folder.glob(f"turns/*/[12]-{row.name}.json")
        ]
        rates = [turn.generation_tps for turn in turns if turn]
        assert len(rates) == N_TURNS
        assert row.result.speed is not None
        assert row.result.generation_tps == pytest.approx(sum(rates) / N_TURNS)
        deviation = abs(rates[0] - rates[1]) / 2**0.5
        assert row.result.speed.generation_tps_std == pytest.approx(deviation)


def test_a_plan_that_equals_a_preset_cannot_be_told_apart_from_it(compared):
    (pair,) = (
        pair
        for pair in compared.comparison.pairs
        if (pair.first, pair.second) == ("uniform-Q8_0", "Q8_0")
    )
    for test in (pair.kld_nats, pair.nll_nats):
        assert test is not None
        assert test.difference == test.difference_low == test.difference_high == 0.0
    assert "uniform-Q8_0 and Q8_0 cannot be told apart by KLD" in one_line(compared.out)


def test_a_plan_that_wastes_bytes_is_called_worse(compared):
    rows = {row.name: row.result for row in compared.comparison.rows}
    (pair,) = (
        pair
        for pair in compared.comparison.pairs
        if (pair.first, pair.second) == ("wasteful", "Q8_0")
    )
    ours, theirs = (rows[name].texts[0].chunks for name in ("wasteful", "Q8_0"))
    assert pair.kld_nats == paired_bootstrap(
        [chunk.kld_nats / chunk.n_tokens for chunk in ours],
        [chunk.kld_nats / chunk.n_tokens for chunk in theirs],
        [chunk.n_tokens for chunk in ours],
    )
    assert len(ours) == N_CHUNKS
    assert pair.kld_nats.difference_low > 0
    said = one_line(compared.out)
    assert "wasteful has a higher KLD than Q8_0" in said
    assert "A file that is no larger is better: " in said


def test_the_table_has_every_column_that_was_measured(compared):
    header = one_line(compared.out)
    for name in ("memory", "tokens/s", "perplexity", "size", "bpw", "KLD", "prompt/s"):
        assert name in header
    assert "MMLU" not in header
    for line in compared.out.splitlines():
        assert len(line.rstrip()) <= 100
    for row in compared.comparison.rows:
        assert row.name in header
        assert f"{row.bpw:.2f}" in header


def test_a_second_run_measures_nothing_and_says_the_same(compared):
    again = cli(compared.argv)

    assert again.returncode == 0
    assert stages(again.stderr) == []
    assert n_reused(again.stderr) == 5
    assert again.stdout == compared.out


def test_a_saved_comparison_is_shown_as_it_was(compared, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    path = str(compared.folder / "comparison.json")
    assert main(["compare", "show", path]) == 0
    assert capsys.readouterr().out == compared.out
    assert main(["compare", "show", path, "--json"]) == 0
    assert capsys.readouterr().out == compared.comparison.to_json()
    assert main(["compare", "show", path, path]) == 2
    assert "two comparisons are of one model" in capsys.readouterr().err


def test_another_set_of_files_is_timed_anew_and_its_quality_used_again(
    compared, tmp_path, capsys
):
    folder = tmp_path / "work"
    shutil.copytree(compared.folder, folder)
    argv = [str(folder) if a == str(compared.folder) else a for a in compared.argv]
    plans = argv.index("--plans") + 1
    argv[plans] = "uniform:Q8_0"

    assert main([*argv, "--delete-files"]) == 0

    err = capsys.readouterr().err
    names = ["base", "uniform-Q8_0", "Q8_0", "Q4_0"]
    assert sorted(stages(err)) == sorted(
        f"speed {name}, {turn} of {N_TURNS}" for name in names for turn in (1, 2)
    )
    left = [path.name for path in (folder / "files").iterdir()]
    assert left == ["wasteful.gguf"]  # which took no part


def test_other_parameters_do_not_replace_results_unasked(compared, capsys):
    argv = [*compared.argv, "--chunks", "5"]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "base.json: exists and was made from other inputs; use --force" in err
    found = load_record(Comparison, compared.folder / "comparison.json", "test")
    assert found == compared.comparison


def test_a_plan_changed_under_its_name_is_refused_before_any_measuring(
    compared, tiny, tmp_path, capsys
):
    folder = tmp_path / "work"
    shutil.copytree(compared.folder, folder)
    changed = tmp_path / f"{tiny.checkpoint.identity.name}.wasteful.json"
    changed.write_text(tiny.plan("Q4_0").to_json())
    argv = [str(folder) if a == str(compared.folder) else a for a in compared.argv]
    argv[argv.index("--plans") + 1] = str(changed)

    assert main([*argv, "--presets", "Q5_0"]) == 2

    err = capsys.readouterr().err
    assert "wasteful.json: exists and was made from other inputs" in one_line(err)
    assert stages(err) == []
    assert not (folder / "files" / "Q5_0.gguf").exists()


def test_another_models_comparison_is_not_replaced(compared, deep, capsys):
    argv = [str(deep.folder) if i == 1 else a for i, a in enumerate(compared.argv)]
    assert main(argv) == 2
    assert "comparison.json: exists and was made from other" in capsys.readouterr().err


def test_a_run_that_was_killed_goes_on_after_what_it_finished(
    tiny, tmp_path, session_cache
):
    text, folder = tmp_path / "text.txt", tmp_path / "work"
    text.write_text(prose(2000))
    argv = compare_argv(
        tiny.folder, text, folder, "uniform:Q4_0", "--tasks", "perplexity"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "ewq_gguf", *argv],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as child:
        finished = folder / "results" / "base.json"
        deadline = time.monotonic() + 300
        while not finished.exists() and child.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    assert finished.exists()
    assert not (folder / "comparison.json").exists()
    n_done = len(list((folder / "results").glob("[!.]*.json")))

    again = cli(argv)

    assert again.returncode == 0, again.stderr
    assert n_reused(again.stderr) == n_done
    found = load_record(Comparison, folder / "comparison.json", "test")
    assert len(stages(again.stderr)) == len(found.rows) - n_done
    assert "bench base" not in stages(again.stderr)


def test_a_disk_without_room_is_said_before_a_file_is_made(
    tiny, tmp_path, capsys, monkeypatch
):
    text = tmp_path / "text.txt"
    text.write_text(prose(2000))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    argv = compare_argv(tiny.folder, text, tmp_path / "work", "uniform:Q8_0")

    assert main([*argv, "--tasks", "perplexity"]) == 6

    assert "bytes are needed and 1,000 are free" in capsys.readouterr().err
    assert list((tmp_path / "work" / "files").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["best"], 2, "unknown policy 'best'"),
        (["ewq", "--presets", "Q9"], 2, "there is no standard preset 'Q9'"),
        (["uniform:Q8_0,uniform:Q8_0"], 2, "is the name of two versions"),
        ([""], 2, "there is no plan and no preset"),
        (["no/plan.json"], 3, "cannot be read"),
        (["ewq", "--tasks", "mmmlu"], 2, "there is no 'mmmlu'"),
        (["ewq", "--text", "prose"], 2, "is not NAME=FILE"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_made(
    tiny, tmp_path, capsys, options, code, message
):
    plans, *others = options
    text = tmp_path / "text.txt"
    text.write_text(prose(100))
    argv = compare_argv(tiny.folder, text, tmp_path / "work", plans)

    assert main([*argv, "--tasks", "perplexity", "-q", *others]) == code

    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.glob("work/files/*"))


# Presets as plans


@pytest.mark.parametrize("preset", ["Q4_K_M", "Q3_K_S", "IQ4_XS"])
def test_a_preset_as_a_plan_has_the_very_tensors_of_llama_quantize(
    preset, deep, toolchain, tmp_path, capsys
):
    out, own = tmp_path / "planned.gguf", tmp_path / "own.gguf"
    plan = api.plan(api.Run(deep.checkpoint), PresetPolicy(preset=preset))
    options = api.Options(load=False, n_threads=1)
    api.planned_file(api.Run(deep.checkpoint, options), plan, out, base=deep.base)
    argv = [toolchain.tool("llama-quantize"), deep.base, own, preset]
    run(argv, stage="test", log_path=tmp_path / "log")

    ours, theirs = (tensor_data(path) for path in (out, own))
    assert ours == theirs
    assert len({kind for kind, _ in ours.values()}) > 2
    assert plan.totals.file_size_bytes == out.stat().st_size
    assert json.loads(plan.to_json())["policy"] == {"name": "preset", "preset": preset}


def tensor_data(path: Path) -> dict[str, tuple[str, bytes]]:
    found = {}
    with path.open("rb") as file:
        for tensor in read_gguf(path).tensors:
            file.seek(tensor.offset)
            found[tensor.name] = (tensor.ggml_type, file.read(tensor.size_bytes))
    return found


def test_a_preset_is_planned_on_the_command_line(tiny, tmp_path, capsys):
    out = tmp_path / "plan.json"
    argv = ["plan", str(tiny.folder), "-q", "-o", str(out)]
    assert main([*argv, "--policy", "preset:q5_k_m"]) == 0
    assert load_record(Plan, out, "test").policy == PresetPolicy(preset="Q5_K_M")
    assert main(["plan", "show", str(out)]) == 0
    assert re.search(r"policy +Q5_K_M *", capsys.readouterr().out)
    for options, message in (
        (["--policy", "preset:Q9_9"], "there is no standard preset 'Q9_9'"),
        (["--policy", "preset:Q8_0", "--factor", "1"], "--factor does not go with"),
        (["--policy", "preset:Q8_0", "--budget", "9MB"], "--budget does not go with"),
    ):
        assert main([*argv, *options]) == 2
        assert message in capsys.readouterr().err

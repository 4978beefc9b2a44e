"""Faults 42 to 52 of a plan file, through the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ewq_gguf import api
from ewq_gguf.checkpoint.source import open_checkpoint
from ewq_gguf.cli import main
from ewq_gguf.errors import InputError
from ewq_gguf.plan.build import make_plan
from ewq_gguf.plan.size_target import SizeTarget
from ewq_gguf.records import EwqPolicy, Machine, Plan, UniformPolicy, load_record
from tests.checkpoints import write_llama
from tests.scans import make_layout, make_scan

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = pytest.mark.llamacpp

Q = "blk.0.attn_q.weight"


@pytest.fixture
def plan_file(tiny, own_cache, tmp_path, monkeypatch) -> Path:
    """A sound plan of the small model, in the current folder."""
    monkeypatch.chdir(tmp_path)
    path: Path = tmp_path / "plan.json"
    path.write_text(tiny.plan("Q8_0").to_json())
    return path


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensor(path: Path, tensor: str, **update: object) -> None:
    def change(values: dict[str, Any]) -> None:
        next(t for t in values["tensors"] if t["name"] == tensor).update(update)

    edit(path, change)


def refusal(capsys, *args: object) -> str:
    """The one line that a command ends with, when its exit code is 3."""
    assert main([str(arg) for arg in args]) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("ewq: ")
    return str(line)


def quantize_refusal(capsys, plan_file: Path, base: Path) -> str:
    """The line of `ewq quantize`, which leaves nothing behind."""
    before = sorted(plan_file.parent.iterdir())
    line = refusal(capsys, "quantize", plan_file, base, "-o", "out.gguf", "-q")
    assert sorted(plan_file.parent.iterdir()) == before
    return line


@pytest.mark.fault(42)
def test_a_tensor_the_base_lacks_is_named_with_the_closest(tiny, plan_file, capsys):
    edit_tensor(plan_file, Q, name="blk.0.attn_p.weight", role="attn_p")
    line = quantize_refusal(capsys, plan_file, tiny.base)
    assert "it has no blk.0.attn_p.weight, the nearest name is blk.0.attn_" in line


@pytest.mark.fault(43)
@pytest.mark.parametrize("ggml_type", ["q4_k_m", "Q4_K_M", "Q4", "", "q8_0", "Q8_1"])
def test_what_is_no_ggml_type_is_refused(tiny, plan_file, capsys, ggml_type):
    edit_tensor(plan_file, Q, ggml_type=ggml_type)
    line = quantize_refusal(capsys, plan_file, tiny.base)
    assert "ggml_type: " in line
    assert "is no ggml type" in line


@pytest.mark.fault(44)
def test_two_names_that_differ_in_capitals_only_are_refused(tiny, plan_file, capsys):
    edit_tensor(
        plan_file, "blk.0.attn_k.weight", name="blk.0.ATTN_Q.weight", role="ATTN_Q"
    )
    line = quantize_refusal(capsys, plan_file, tiny.base)
    assert "differs from" in line
    assert "in capitals only" in line


@pytest.mark.fault(44, 50)
def test_metacharacters_capitals_and_equal_signs_are_escaped(plan_file, capsys):
    name = "blk.0.A+(b)=[c]$(touch pwned)|.*-.weight"
    role = name.removeprefix("blk.0.").removesuffix(".weight")
    edit_tensor(plan_file, Q, name=name, role=role)
    args = ["plan", "export", str(plan_file), "--format", "tensor-type-file"]
    assert main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.count("=") == 1 for line in lines)
    assert all(line[0] == "^" and "$=" in line for line in lines)
    (line,) = (line for line in lines if r"\x5btouch" in line or r"touch\x20" in line)
    assert line == (
        r"^blk\.0\.\x41\x2b\x28b\x29\x3d\x5bc\x5d\x24\x28touch\x20pwned\x29\x7c\.\x2a\-"
        r"\.weight$=q8_0"
    )


@pytest.mark.fault(45)
def test_a_plan_of_another_config_is_refused_unless_forced(
    tiny, plan_file, tmp_path, capsys
):
    folder = write_llama(tmp_path / tiny.folder.name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 9999.0}))
    args = ["gguf", folder, "--plan", plan_file, "-o", "out.gguf", "-q"]
    line = refusal(capsys, *args)
    assert "the plan is for checkpoint" in line
    assert "plan again, or use --force" in line
    assert not Path("out.gguf").exists()

    here = (open_checkpoint(str(folder)).identity, tiny.scan.weights_sha256)
    with pytest.raises(InputError, match="the plan is for checkpoint"):
        api.check_plan(tiny.plan(), *here)
    api.check_plan(tiny.plan(), *here, force=True)


@pytest.mark.fault(46)
@pytest.mark.parametrize("ggml_type", ["IQ1_S", "IQ2_XXS", "IQ3_XXS"])
def test_a_type_that_needs_an_imatrix_is_refused_before_anything(
    tiny, plan_file, tmp_path, capsys, ggml_type
):
    edit_tensor(plan_file, Q, ggml_type=ggml_type)
    line = quantize_refusal(capsys, plan_file, tiny.base)
    assert f"{ggml_type} needs an importance matrix, and none is given" in line
    scan = tmp_path / "scan.json"
    scan.write_text(tiny.scan.to_json())
    line = refusal(capsys, "plan", scan, "--policy", f"uniform:{ggml_type}")
    assert "needs an importance matrix, and none is given; choose" in line


@pytest.mark.fault(47)
def test_a_row_that_no_block_divides_is_predicted_and_budgeted(
    tiny, plan_file, tmp_path, capsys
):
    plan_file.write_text(tiny.plan("Q4_K").to_json())
    out = tmp_path / "out.gguf"
    assert main(["plan", "show", str(plan_file)]) == 0
    shown = capsys.readouterr().out
    assert "Q4_K on rows of 64 becomes Q5_0" in shown
    assert "Q4_K on rows of 96 becomes Q5_0" in shown
    args = ["quantize", plan_file, tiny.base, "-o", out, "-q", "--no-load"]
    assert main([str(arg) for arg in args]) == 0
    plan = load_record(Plan, plan_file, "test")
    assert out.stat().st_size == plan.totals.file_size_bytes


@pytest.mark.fault(48)
def test_a_tensor_that_is_never_quantised_is_refused(tiny, plan_file, capsys):
    edit_tensor(plan_file, "blk.0.attn_norm.weight", ggml_type="Q8_0")
    line = quantize_refusal(capsys, plan_file, tiny.base)
    assert "/ggml_type: Q8_0 must be F32" in line


@pytest.mark.fault(49)
@pytest.mark.parametrize("ftype", ["F16", "BF16", "F32", "COPY"])
def test_a_float_base_type_that_ignores_the_overrides_is_refused(
    tiny, plan_file, capsys, ftype
):
    edit(plan_file, lambda values: values.update(ftype=ftype))
    line = quantize_refusal(capsys, plan_file, tiny.base)
    assert f"at /ftype: {ftype} must be Q8_0" in line


@pytest.mark.fault(50)
def test_names_of_files_reach_no_shell_and_no_option(tiny, plan_file, tmp_path):
    base = tmp_path / "-b=$(touch pwned);`touch pwned` #.gguf"
    base.symlink_to(tiny.base)
    plan = tmp_path / "--p=$(touch pwned) '.json"
    plan_file.rename(plan)
    out = tmp_path / '-o=$(touch pwned) ".gguf'
    args = ["quantize", f"./{plan.name}", f"./{base.name}", "-o", f"./{out.name}", "-q"]
    assert main([*args, "--no-load"]) == 0
    assert out.exists()
    assert main([*args[:-1], "--dry-run"]) == 0
    assert not (tmp_path / "pwned").exists()


@pytest.mark.fault(51)
def test_twenty_thousand_overrides_are_passed_as_a_file(own_cache, tmp_path, capsys):
    scan = make_scan([1.0] * 6700)
    plan = make_plan(scan, UniformPolicy(ggml_type="Q8_0"), make_layout(scan))
    assert sum(t.is_quantizable for t in plan.tensors) > 20_000
    path, out = tmp_path / "plan.json", tmp_path / "types.txt"
    path.write_text(plan.to_json())
    form = ["--format", "tensor-type-file", "-o", str(out)]
    assert main(["plan", "export", str(path), *form]) == 0
    assert len(out.read_text().splitlines()) > 20_000
    assert "#" not in out.read_text()
    capsys.readouterr()
    args = ["quantize", str(path), "base.gguf", "-o", "out.gguf", "--dry-run"]
    assert main(args) == 0
    assert len(capsys.readouterr().out) < 2000, "the command line stays short"


@pytest.mark.fault(52)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "10,737,418,240 bytes are more than", id="10-GB"),
        pytest.param(b'{"a":' * 1_000_000, "is not JSON", id="deep"),
        pytest.param(b"[" * 1_000_000, "is not JSON", id="deep-lists"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        "plan show {}",
        "plan export {}",
        "plan diff {} {}",
        "plan import {} {}",
        "quantize {} base.gguf -o out.gguf",
        "verify {} out.gguf",
        "gguf model --plan {}",
    ],
)
def test_a_huge_or_deep_plan_is_refused_at_once(
    own_cache, tmp_path, capsys, content, message, command
):
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        if content is None:
            file.truncate(10 << 30)
        else:
            file.write(content)
    begin = time.monotonic()
    line = refusal(capsys, *command.replace("{}", str(path)).split())
    assert time.monotonic() - begin < 5
    assert message in line


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        (lambda v: v["layers"][0].update(ggml_type="FOO"), "/layers/0/ggml_type"),
        (lambda v: v["layers"][0].update(decision="FOO"), "/layers/0/decision"),
        (lambda v: v["layers"].pop(), "/layers"),
        (lambda v: v["totals"].update(n_weights=0), "/totals/n_weights"),
        (lambda v: v["totals"].update(file_size_bytes=0), "/totals/file_size_bytes"),
        (lambda v: v["tensors"][0].update(size_bytes=10**400), "/tensors/0/size_bytes"),
        (lambda v: v["budget"].update(limit_bytes=5), "/budget/limit_bytes"),
        (lambda v: v["placement"].update(machines=[]), "/placement/stages"),
        (lambda v: v["placement"].update(stages=[]), "/placement/stages"),
        (lambda v: v["placement"].update(n_ctx=-1), "/placement/n_ctx"),
        (
            lambda v: v["placement"]["machines"][0].update(memory_bytes=0),
            "/placement/stages/0",
        ),
        (
            lambda v: v["placement"]["stages"][1].update(machine="elsewhere"),
            "/placement/stages",
        ),
        (
            lambda v: v["placement"]["stages"][1].update(first_layer=0),
            "/placement/stages/1/first_layer",
        ),
        (
            lambda v: v["placement"]["stages"][0].update(last_layer=10**18),
            "/placement/stages/1/first_layer",
        ),
    ],
)
@pytest.mark.parametrize("command", ["show", "diff", "export"])
def test_an_edited_plan_is_one_line(change, pointer, command, tmp_path, capsys):
    machines = (
        Machine(name="main", memory_bytes=60_000_000),
        Machine(name="10.0.0.2", memory_bytes=120_000_000),
    )
    scan = make_scan([1.0, 2.0, 3.0, 4.0] * 4)
    ask = SizeTarget("2 machines", machines=machines, n_ctx=256, may_exceed=True)
    path = tmp_path / "plan.json"
    path.write_text(make_plan(scan, EwqPolicy(), budget=ask).to_json())
    edit(path, change)

    files = [path] * (2 if command == "diff" else 1)

    assert f"at {pointer}: " in refusal(capsys, "plan", command, *files)

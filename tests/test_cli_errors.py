"""Wrong input gets one line and the right exit code: through real child processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from ewq_gguf import store
from ewq_gguf.checkpoint.scan import scan_checkpoint
from ewq_gguf.checkpoint.source import open_checkpoint
from ewq_gguf.cli import ewq as ewq_command
from ewq_gguf.cli import main
from ewq_gguf.plan.build import make_plan
from ewq_gguf.records import EwqPolicy
from tests.checkpoints import write_llama

pytest_plugins = ["tests.toolchain_fixtures"]

INDEX = "model.safetensors.index.json"
Run = subprocess.CompletedProcess[str]


def argv(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "ewq_gguf", *(str(arg) for arg in args)]


def run_ewq(*args: str | Path, cwd: Path, **variables: str) -> Run:
    """Run the command line in a child, without a shell."""
    return subprocess.run(
        argv(*args),
        capture_output=True,
        text=True,
        errors="surrogateescape",
        cwd=cwd,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


def contents(folder: Path) -> dict[str, bytes | int]:
    """Every file below a folder: its bytes, of large ones their number."""
    return {str(path.relative_to(folder)): content(path) for path in folder.rglob("*")}


def content(path: Path) -> bytes | int:
    size = path.stat().st_size
    return path.read_bytes() if path.is_file() and size < 1 << 20 else size


# One case: what lies in its folder, what is asked, what must be said.


@dataclass(frozen=True)
class World:
    """What the cases start from: a sound checkpoint, its scan and its plan."""

    model: Path
    shards: Path
    scan: Path
    plan: Path


@dataclass(frozen=True)
class Case:
    """A wrong command line; `prepare` fills its folder and gives the arguments."""

    name: str
    code: int
    message: str
    prepare: Callable[[World, Path], list[str | Path]]


CASES: list[Case] = []

#: The cases that are also run as real processes.
IN_CHILDREN = {
    "missing-folder",
    "folder-without-safetensors",
    "truncated-shard",
    "missing-shard",
    "index-that-leaves-the-folder",
    "nan-weights",
    "scan-over-another-file",
    "out-below-a-file",
    "unknown-policy",
    "unknown-option",
    "unknown-command",
    "missing-plan",
    "plan-with-an-extra-field",
    "hostile-folder-name",
    "folder-name-that-is-no-text",
}


def case(code: int, message: str):
    """Add a function that prepares a folder to the cases, under its own name."""

    def add(prepare):
        name = prepare.__name__.replace("_", "-").strip("-")
        CASES.append(Case(name, code, message, prepare))
        return prepare

    return add


def plain_case(name: str, code: int, message: str, *args: str) -> None:
    """Add a case that needs no file but the world's; MODEL, SCAN and PLAN are its."""

    def prepare(world: World, cwd: Path) -> list[str | Path]:
        files = {"MODEL": world.model, "SCAN": world.scan, "PLAN": world.plan}
        return [files.get(arg, arg) for arg in args]

    CASES.append(Case(name, code, message, prepare))


def damaged(source: Path, cwd: Path, edit: Callable[[Path], object]) -> Path:
    """A copy of a checkpoint with something wrong."""
    folder = Path(shutil.copytree(source, cwd / "damaged"))
    edit(folder)
    return folder


plain_case("missing-folder", 3, "no such file or folder", "scan", "nowhere", "-q")
plain_case("missing-folder-gguf", 3, "no such file or fol", "gguf", "nowhere", "-q")
plain_case("device", 3, "is neither a folder nor", "scan", "/dev/null", "-q")
plain_case("long-name", 3, "File name too long", "scan", "x" * 300, "-q")
plain_case(
    "unknown-policy", 2, "--policy: unknown policy 'best'; use",
    "plan", "SCAN", "--policy", "best", "-q",
)  # fmt: skip
plain_case(
    "unknown-policy-gguf", 2, "unknown policy", "gguf", "MODEL", "--policy", "best"
)
plain_case(
    "policy-without-type", 2, "use uniform:TYPE", "plan", "SCAN", "--policy", "uniform:"
)
plain_case(
    "policy-with-argument", 2, "is no parameter", "plan", "SCAN", "--policy", "ewq:1"
)
plain_case(
    "unknown-type", 2, "uniform: 'Q9_9' is not a ggml type; use raw or one of .*Q8_0",
    "plan", "SCAN", "--policy", "uniform:Q9_9",
)  # fmt: skip
plain_case(
    "preset-as-type", 2, "uniform: 'Q4_K_M' is not a ggml type",
    "plan", "SCAN", "--policy", "uniform:q4_k_m",
)  # fmt: skip
plain_case(
    "unknown-embedding-type", 2, "--embedding-type: 'Q0' is not a ggml type",
    "plan", "SCAN", "--embedding-type", "q0",
)  # fmt: skip
plain_case(
    "ladder-that-falls", 2, "--ladder: Q8_0,Q4_K,raw does not rise",
    "plan", "SCAN", "--ladder", "Q8_0,Q4_K,raw",
)  # fmt: skip
plain_case(
    "ladder-of-one", 2, "--ladder: has 1 precisions", "plan", "SCAN", "--ladder", "Q4_K"
)
plain_case(
    "ladder-twice-the-same", 2, "does not rise",
    "plan", "SCAN", "--ladder", "Q4_K,Q4_K,raw",
)  # fmt: skip
plain_case(
    "needs-imatrix", 3, "uniform: IQ2_XS needs an importance matrix, and none is given",
    "plan", "SCAN", "--policy", "uniform:IQ2_XS",
)  # fmt: skip
plain_case(
    "needs-imatrix-gguf", 3, "needs an importance matrix",
    "gguf", "MODEL", "--policy", "uniform:IQ2_XS", "-q",
)  # fmt: skip
plain_case("epsilon-nan", 2, "epsilon", "plan", "SCAN", "--epsilon", "nan")
plain_case("epsilon-nan-scan", 2, "epsilon", "scan", "MODEL", "--epsilon", "nan", "-q")
plain_case("epsilon-negative", 2, "epsilon", "scan", "MODEL", "--epsilon", "-1")
plain_case("epsilon-text", 2, "epsilon", "scan", "MODEL", "--epsilon", "4.5.6")
plain_case("factor-infinite", 2, "factor", "plan", "SCAN", "--factor", "1e400")
plain_case("factor-negative", 2, "factor", "plan", "SCAN", "--factor", "-1")
plain_case("bins-1", 2, "bins", "scan", "MODEL", "--bins", "1")
plain_case("threads-0", 2, "threads", "scan", "MODEL", "--threads", "0")
plain_case("unknown-option", 2, "No such option.*--nothing", "scan", "--nothing")
plain_case("unknown-command", 2, "No such command 'nothing'", "nothing")
plain_case("hostile-command", 2, r"\\x1b\[31m", "\x1b[31m\nx")
plain_case("no-model", 2, "Missing argument 'MODEL'", "gguf")
plain_case("quantize-without-out", 2, "Missing option", "quantize", "PLAN", "base")
plain_case("missing-plan", 3, "cannot be read .No such file", "plan", "show", "no.json")
plain_case("missing-scan", 3, "cannot be read .No such file", "plan", "no.json", "-q")
plain_case(
    "missing-plan-gguf", 3, "cannot be read .No such file",
    "gguf", "MODEL", "--plan", "no.json", "-q",
)  # fmt: skip
plain_case("plan-is-a-folder", 3, "Is a directory", "plan", "show", ".")
plain_case("scan-as-plan", 3, "is not a ewq.plan file", "plan", "show", "SCAN")
plain_case("plan-as-scan", 3, "is not a ewq.scan file", "plan", "PLAN", "-q")
plain_case(
    "other-measures", 3, "was measured with epsilon 0.01, the policy 0.5",
    "plan", "SCAN", "--epsilon", "0.5", "-q",
)  # fmt: skip
plain_case("proc-as-out", 6, "/proc/", "scan", "MODEL", "-q", "-o", "/proc/none/a.json")
plain_case("proc-as-out-plan", 6, "/proc", "plan", "SCAN", "-q", "-o", "/proc/no/a")
plain_case("proc-as-out-gguf", 6, "/proc", "gguf", "MODEL", "-q", "-o", "/proc/no/a")
plain_case("folder-as-out", 2, "is a folder", "scan", "MODEL", "-q", "-o", "/tmp")
plain_case("folder-as-out-plan", 2, "is a folder", "plan", "SCAN", "-q", "-o", "/tmp")
plain_case("folder-as-out-gguf", 2, "is a folder", "gguf", "MODEL", "-q", "-o", "/tmp")
plain_case(
    "base-is-missing", 3, "base.gguf", "quantize", "PLAN", "base.gguf", "-o", "o", "-q"
)
plain_case("demo-into-proc", 6, "/proc", "demo", "/proc/none/x")


@case(3, "has no config.json")
def folder_without_anything(world, cwd):
    (cwd / "empty").mkdir()
    return ["scan", "empty", "-q"]


@case(3, r"has no \*.safetensors")
def folder_without_safetensors(world, cwd):
    folder = damaged(world.model, cwd, lambda f: (f / "model.safetensors").unlink())
    return ["scan", folder, "-q"]


@case(3, "its header needs .*: truncated")
def truncated_shard(world, cwd):
    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])

    return ["scan", damaged(world.model, cwd, cut), "-q"]


@case(3, "missing shards: model-00002-of-00003.safetensors")
def missing_shard(world, cwd):
    name = "model-00002-of-00003.safetensors"
    folder = damaged(world.shards, cwd, lambda f: (f / name).unlink())
    return ["gguf", folder, "-q"]


@case(3, "points outside the folder")
def index_that_leaves_the_folder(world, cwd):
    def leave(folder):
        text = (folder / INDEX).read_text()
        (folder / INDEX).write_text(text.replace("model-0", "../model-0"))

    return ["scan", damaged(world.shards, cwd, leave), "-q"]


@case(3, "holds 1 NaN or infinite weights, the first at index 1; .*--allow-nonfinite")
def nan_weights(world, cwd):
    def spoil(folder):
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        (shard,) = open_checkpoint(str(folder)).shards
        first = next(t for t in shard.header.tensors if "embed" in t.name)
        data[first.begin + 2 : first.begin + 4] = b"\xc0\x7f"  # NaN in BF16
        path.write_bytes(data)

    return ["scan", damaged(world.model, cwd, spoil), "-q"]


@case(3, r"architecture \\x1b\[2JEvil\\n is not supported")
def hostile_architecture(world, cwd):
    def rename(folder):
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = ["\x1b[2JEvil\n"]
        (folder / "config.json").write_text(json.dumps(config))

    return ["scan", damaged(world.model, cwd, rename), "-q"]


@case(3, r"a\\nb\\x1b\[31m<script>: has no config.json")
def hostile_folder_name(world, cwd):
    (cwd / "a\nb\x1b[31m<script>").mkdir()
    return ["scan", "a\nb\x1b[31m<script>", "-q"]


@case(3, r"odd\\udcff: has no config.json")
def folder_name_that_is_no_text(world, cwd):
    (cwd / "odd\udcff").mkdir()
    return ["scan", "odd\udcff", "-q"]


@case(2, "exists and was made from other inputs; use --force")
def scan_over_another_file(world, cwd):
    (cwd / "out.json").write_text("mine")
    return ["scan", world.model, "-q", "-o", "out.json"]


@case(2, "exists and was made from other inputs; use --force")
def plan_over_another_file(world, cwd):
    (cwd / "out.json").write_text("mine")
    return ["plan", world.scan, "-q", "-o", "out.json"]


@case(2, "exists and was made from other inputs; use --force")
def plan_over_another_plan_at_its_default_place(world, cwd):
    (cwd / "plans").mkdir()
    (cwd / "plans" / "tiny.ewq-estimate.json").write_text("mine")
    return ["plan", world.scan, "-q"]


@case(2, "exists and was made from other inputs; use --force")
def export_over_another_file(world, cwd):
    (cwd / "out.sh").write_text("mine")
    return ["plan", "export", world.plan, "-o", "out.sh"]


@case(2, "exists and was made from other inputs; use --force")
def convert_over_another_file(world, cwd):
    (cwd / "out.gguf").write_text("mine")
    return ["convert", world.model, "-q", "-o", "out.gguf"]


@case(2, "exists and was made from another plan, or is damaged; use --force")
def quantize_over_another_file(world, cwd):
    (cwd / "out.gguf").write_text("mine")
    (cwd / "base.gguf").write_text("base")
    return ["quantize", world.plan, "base.gguf", "-q", "-o", "out.gguf"]


@case(2, "is not empty .*--force")
def demo_over_another_folder(world, cwd):
    (cwd / "out").mkdir()
    (cwd / "out" / "mine").write_text("mine")
    return ["demo", "out"]


@case(6, "the folder cannot be created|cannot be written")
def out_below_a_file(world, cwd):
    (cwd / "file").write_text("mine")
    return ["scan", world.model, "-q", "-o", "file/out.json"]


@case(6, "the folder cannot be created|cannot be written")
def gguf_below_a_file(world, cwd):
    (cwd / "file").write_text("mine")
    return ["gguf", world.model, "-q", "-o", "file/out.gguf"]


@case(6, "the folder cannot be created")
def plans_is_a_file(world, cwd):
    (cwd / "plans").write_text("mine")
    return ["scan", world.model, "-q"]


def changed_plan(
    world: World, cwd: Path, edit: Callable[[Any], object]
) -> list[str | Path]:
    values = json.loads(world.plan.read_text())
    edit(values)
    (cwd / "plan.json").write_text(json.dumps(values))
    return ["plan", "show", "plan.json"]


@case(3, "plan.json: is not JSON")
def plan_that_is_no_json(world, cwd):
    (cwd / "plan.json").write_text("{")
    return ["plan", "show", "plan.json"]


@case(3, "plan.json: is not JSON")
def plan_that_is_no_text(world, cwd):
    (cwd / "plan.json").write_bytes(b"\x93\xff\x00")
    return ["gguf", world.model, "--plan", "plan.json", "-q"]


@case(3, "plan.json: is not JSON .*nested too deep")
def plan_that_is_too_deep(world, cwd):
    (cwd / "plan.json").write_text('{"a":' * 100_000)
    return ["plan", "show", "plan.json"]


@case(3, "bytes are more than")
def plan_that_is_too_large(world, cwd):
    with (cwd / "plan.json").open("wb") as file:
        file.truncate(1 << 34)
    return ["plan", "show", "plan.json"]


@case(3, "is not a ewq.plan file")
def plan_that_is_a_list(world, cwd):
    (cwd / "plan.json").write_text("[]")
    return ["plan", "show", "plan.json"]


@case(3, "at /schema_version: ")
def plan_of_another_version(world, cwd):
    return changed_plan(world, cwd, lambda plan: plan.update(schema_version=99))


@case(3, "at /extra: Extra inputs are not permitted")
def plan_with_an_extra_field(world, cwd):
    return changed_plan(world, cwd, lambda plan: plan.update(extra=1))


@case(3, "at /tensors/3/extra: Extra")
def plan_with_an_extra_field_inside(world, cwd):
    return changed_plan(world, cwd, lambda plan: plan["tensors"][3].update(extra=1))


@case(3, "at /totals: Field required")
def plan_with_a_field_missing(world, cwd):
    return changed_plan(world, cwd, lambda plan: plan.pop("totals"))


@case(3, "at /totals/bpw: ")
def plan_with_a_number_that_is_none(world, cwd):
    return changed_plan(
        world, cwd, lambda plan: plan["totals"].update(bpw=float("nan"))
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("world")
    model = write_llama(root / "tiny", n_layers=2)
    scan = scan_checkpoint(open_checkpoint(str(model)))
    (root / "scan.json").write_text(scan.to_json())
    (root / "plan.json").write_text(make_plan(scan, EwqPolicy()).to_json())
    shards = write_llama(root / "shards", n_layers=1, n_shards=3)
    return World(model, shards, root / "scan.json", root / "plan.json")


def assert_one_line(run: Run, code: int) -> None:
    """One line in the form of an error, nothing on stdout, the right exit code."""
    assert "Traceback" not in run.stderr
    assert run.stderr.startswith("ewq: ")
    assert run.stderr.endswith("\n")
    assert run.stderr[:-1].isprintable(), "one line without control characters"
    assert run.stdout == ""
    assert run.returncode == code


def assert_refused(one: Case, run: Run) -> None:
    assert_one_line(run, one.code)
    assert re.search(one.message, run.stderr), run.stderr


@pytest.fixture
def run_here(monkeypatch, capsys):
    """A function like run_ewq without the child: the same entry, in this process."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*args: str | Path, cwd: Path) -> Run:
        monkeypatch.chdir(cwd)
        code = main([str(arg) for arg in args])
        printed = capsys.readouterr()
        return Run(args, code, printed.out, printed.err)

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("one", [pytest.param(c, id=c.name) for c in CASES])
@pytest.mark.fault(2, 15, 19, 22, 25, 35, 41)
def test_wrong_input_is_one_line_the_right_code_and_no_trace(
    one, world, run_here, own_cache, tmp_path
):
    args = one.prepare(world, tmp_path)
    before = contents(tmp_path)
    assert_refused(one, run_here(*args, cwd=tmp_path))
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_wrong_input_is_refused_by_the_command_itself(world, own_cache, tmp_path):
    """The list of issue 2, through real processes, two at a time."""
    cases = [one for one in CASES if one.name in IN_CHILDREN]
    assert len(cases) == len(IN_CHILDREN)

    def attempt(one: Case) -> Run:
        cwd = tmp_path / one.name
        cwd.mkdir()
        return run_ewq(*one.prepare(world, cwd), cwd=cwd)

    with ThreadPoolExecutor(2) as pool:
        for one, run in zip(cases, pool.map(attempt, cases), strict=True):
            assert_refused(one, run)


# Help, and output that nobody reads.


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("gguf",),
        ("scan",),
        ("plan",),
        ("plan", "show"),
        ("plan", "export"),
        ("convert",),
        ("quantize",),
        ("verify",),
        ("demo",),
        ("toolchain",),
        ("toolchain", "build"),
        ("toolchain", "info"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_has_help(command, option):
    result = CliRunner().invoke(ewq_command, [*command, option], prog_name="ewq")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: {' '.join(('ewq', *command))}")
    assert len(result.stdout.splitlines()) > 4


@pytest.mark.parametrize("command", [(), ("plan",), ("toolchain",)], ids=" ".join)
def test_a_command_alone_shows_its_help_to_people(tmp_path, command):
    run = run_ewq(*command, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert "Usage: ewq" in run.stderr
    assert len(run.stderr.splitlines()) > 4
    assert r"\n" not in run.stderr


@pytest.mark.parametrize("args", ["plan show PLAN", "plan show PLAN --json", "--help"])
def test_a_reader_that_leaves_ends_it_quietly(world, args):
    words = [str(world.plan) if word == "PLAN" else word for word in args.split()]
    with subprocess.Popen(
        argv(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout
        assert child.stderr
        child.stdout.close()
        stderr = child.stderr.read()
    assert (child.returncode, stderr) == (0, b"")


@pytest.mark.parametrize(
    "variables",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        {"COLUMNS": "1"},
        {"TERM": "dumb", "NO_COLOR": "1"},
        {"FORCE_COLOR": "1", "COLUMNS": "20"},
    ],
    ids=lambda variables: "-".join(f"{k}={v}" for k, v in variables.items()),
)
def test_a_plan_is_shown_in_any_locale_and_width(world, tmp_path, variables):
    values = json.loads(world.plan.read_text())
    values["model"]["name"] = "modèle-日本\x1b[2J"
    (tmp_path / "plan.json").write_text(json.dumps(values))
    run = run_ewq("plan", "show", "plan.json", cwd=tmp_path, **variables)
    assert (run.returncode, run.stderr) == (0, "")
    assert "\x1b[2J" not in run.stdout
    assert run.stdout


def test_a_message_that_the_terminal_cannot_spell_is_still_said(tmp_path):
    (tmp_path / "modèle").mkdir()
    run = run_ewq(
        "scan", "modèle", cwd=tmp_path,
        LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0",
    )  # fmt: skip
    assert_one_line(run, 3)
    assert "has no config.json" in run.stderr


def test_an_output_path_that_is_no_text_is_written_and_told(world, own_cache, tmp_path):
    args = ("scan", world.model, "-q", "-o", "odd\udcff.json")
    run = run_ewq(*args, cwd=tmp_path, PYTHONIOENCODING="utf-8:strict")
    assert (run.returncode, run.stderr) == (0, "")
    assert (tmp_path / "odd\udcff.json").exists()
    assert run.stdout.startswith("odd")


def test_debug_shows_where_an_error_comes_from(tmp_path):
    for run in (
        run_ewq("--debug", "scan", "nowhere", cwd=tmp_path),
        run_ewq("scan", "nowhere", cwd=tmp_path, EWQ_DEBUG="1"),
    ):
        assert "Traceback" in run.stderr
        assert run.stderr.splitlines()[-1].startswith("ewq: scan: nowhere: ")
        assert run.returncode == 3


# Runs that are stopped, and runs that meet.


def wait_for_child(process: psutil.Process) -> list[psutil.Process]:
    """The process's children, as soon as one has started its work."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            children: list[psutil.Process] = process.children(recursive=True)
            if any(child.cpu_times().user > 0.2 for child in children):
                return children
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.02)
    raise AssertionError("no child process started")


@pytest.mark.slow
@pytest.mark.llamacpp
@pytest.mark.parametrize("command", ["gguf", "convert"])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_ends_a_run_and_its_children_and_leaves_nothing(
    world, session_cache, tmp_path, command, number, code
):
    # Of a name of its own, so that no layout or base of it is in the cache.
    model = shutil.copytree(world.model, tmp_path / f"m-{command}-{int(number)}")
    cwd = tmp_path / "out"
    cwd.mkdir()
    with subprocess.Popen(
        argv(command, model, "-q", "-o", "new.gguf"),
        cwd=cwd,
        env={**os.environ, "EWQ_CACHE": str(session_cache)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        children = wait_for_child(psutil.Process(child.pid))
        child.send_signal(number)
        started = time.monotonic()
        stdout, stderr = child.communicate(timeout=20)
    assert time.monotonic() - started < 5
    assert child.returncode == code
    assert stderr in ("ewq: interrupted\n", "ewq: terminated\n")
    assert stdout == ""
    assert not any(process.is_running() for process in children)
    assert not list(cwd.rglob("*.gguf"))
    assert not list(cwd.rglob(".*"))
    assert not list(session_cache.rglob(f".{model.name}*.ewq"))


@pytest.mark.llamacpp
def test_a_second_run_on_the_same_output_is_told_who_holds_it(
    world, own_cache, tmp_path
):
    out = tmp_path / "out.gguf"
    with store.locked(out, stage="test"):
        run = run_ewq("convert", world.model, "-q", "-o", out, cwd=tmp_path)
    assert_one_line(run, 9)
    assert f"is being written by pid {os.getpid()} on " in run.stderr
    assert contents(tmp_path) == {}


@pytest.mark.slow
@pytest.mark.llamacpp
def test_gguf_refuses_outputs_of_others_and_locked_ones(tiny, own_cache, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_bytes(b"GGUF, but mine")
    run = run_ewq("gguf", tiny.folder, "-q", "-o", "out.gguf", cwd=tmp_path)
    assert_one_line(run, 2)
    assert "use --force" in run.stderr
    assert contents(tmp_path) == {"out.gguf": b"GGUF, but mine"}
    with store.locked(out, stage="test"):
        run = run_ewq("gguf", tiny.folder, "-q", "-o", "out.gguf", cwd=tmp_path)
    assert_one_line(run, 9)
    assert f"pid {os.getpid()}" in run.stderr


def run_unread(*args: str, cwd: Path) -> int:
    """The exit code of `ewq` where nobody reads what it says."""
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, "-m", "ewq_gguf", *args]
    try:
        return subprocess.run(argv, stdout=write, stderr=write, cwd=cwd).returncode
    finally:
        os.close(write)


def test_the_exit_code_does_not_depend_on_who_reads(tmp_path):
    assert run_unread("scan", "nowhere", cwd=tmp_path) == 3
    assert run_unread("scan", "--bins", "x", "nowhere", cwd=tmp_path) == 2
    assert run_unread("scan", cwd=tmp_path) == 2


def test_the_work_is_done_whoever_reads(tmp_path):
    """Notes and results that nobody reads are no reason to stop."""
    model = write_llama(tmp_path / "m", n_layers=1)
    argv = ("scan", str(model), "-o", "s.json")
    assert run_unread(*argv, cwd=tmp_path) == 0
    assert (tmp_path / "s.json").exists()

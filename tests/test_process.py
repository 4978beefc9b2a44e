"""Children: their logs, their ends, and that none outlives us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ewq_gguf.errors import ChildError, ResourceError, ToolError
from ewq_gguf.process import LOG_TAIL_LINES, N_CPUS, python_argv, run


@pytest.fixture
def log(tmp_path):
    return tmp_path / "child.log"


@pytest.fixture
def sh(log):
    """Run a shell script as a child."""

    def run_script(script: str, **options):
        return run(["sh", "-c", script], stage="test", log_path=log, **options)

    return run_script


def is_running(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def all_gone(pids: list[int]) -> bool:
    """Whether these processes end within a second; those that do not are killed."""
    end = time.monotonic() + 1
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    left = [pid for pid in pids if is_running(pid)]
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return not left


# Output.


def test_what_a_child_prints_is_returned_and_kept(sh, log):
    assert sh("echo out; echo err >&2; echo again") == "out\nerr\nagain\n"
    assert log.read_text() == "out\nerr\nagain\n"


def test_the_log_is_overwritten(sh, log):
    log.write_text("old")

    assert sh("true") == ""
    assert log.read_text() == ""


def test_undecodable_bytes_are_replaced(sh):
    assert sh(r"printf 'a\377b'") == "a\ufffdb"


def test_lines_arrive_whole_and_in_order_carriage_returns_too(sh):
    lines: list[str] = []

    sh(
        r"printf 'one\ntw'; sleep 0.2; printf 'o\n10%%\r20%%\r'; sleep 0.2;"
        r"printf '30%%\r\nend\nno line'",
        on_line=lines.append,
    )

    assert [line for line in lines if line] == [
        "one",
        "two",
        "10%",
        "20%",
        "30%",
        "end",
    ]


def test_lines_arrive_while_the_child_runs(sh):
    times: dict[str, float] = {}

    sh(
        "echo a; sleep 1; echo b",
        on_line=lambda t: times.setdefault(t, time.monotonic()),
    )

    assert times["b"] - times["a"] > 0.5


def test_a_character_split_between_two_reads_is_whole(sh):
    lines: list[str] = []

    sh(r"printf '\303'; sleep 0.2; printf '\251\n'", on_line=lines.append)

    assert lines[0] == "é"


def test_a_large_log_does_not_block_the_child(sh):
    text = sh("yes 0123456789 | head -n 300000")

    assert len(text) == 3_300_000


# Input and environment.


def test_stdin_is_empty(sh):
    assert sh("cat; readlink /proc/self/fd/0") == "/dev/null\n"


def test_variables_are_added_to_ours(sh, monkeypatch):
    monkeypatch.setenv("EWQ_TEST_A", "1")

    assert sh('echo "$EWQ_TEST_A$EWQ_TEST_B"', env={"EWQ_TEST_B": "2"}) == "12\n"


def test_a_child_works_where_it_is_told(sh, tmp_path):
    assert sh("pwd", cwd=tmp_path) == f"{tmp_path}\n"


def test_arguments_never_meet_a_shell(log, tmp_path):
    odd = ["$(touch pwned)", "a b", "'", "*", "-n;", "`x`", "\n"]

    text = run(
        [sys.executable, "-c", "import sys; print(sys.argv[1:])", *odd],
        stage="test",
        log_path=log,
        cwd=tmp_path,
    )

    assert text == f"{odd}\n"
    assert not (tmp_path / "pwned").exists()


def test_our_own_modules_run_in_this_python(log, tmp_path):
    argv = python_argv("ewq_gguf", "--version")

    assert argv[0] == sys.executable
    assert "ewq" in run(argv, stage="test", log_path=log, cwd=tmp_path)
    assert 1 <= N_CPUS <= (os.cpu_count() or 1)


# Failures.


def test_a_failing_child_gives_its_code_and_last_lines(sh, log):
    with pytest.raises(ChildError) as caught:
        sh("seq 1 50; echo; exit 7")

    error = caught.value
    assert error.exit_code == 5
    assert error.return_code == 7
    assert error.log_tail == tuple(str(i) for i in range(51 - LOG_TAIL_LINES, 51))
    assert error.log_path == log
    assert error.argv == ("sh", "-c", "seq 1 50; echo; exit 7")
    assert str(error) == (f"test: sh: exit code 7; its last line: 50; its log is {log}")


def test_a_silent_failure_has_no_last_line(sh, log):
    with pytest.raises(ChildError) as caught:
        sh("exit 1")

    assert caught.value.log_tail == ()
    assert str(caught.value) == f"test: sh: exit code 1; its log is {log}"


def test_a_childs_output_cannot_reach_the_terminal(sh):
    with pytest.raises(ChildError) as caught:
        sh(r"printf '\033[2Jboo\n'; exit 1")

    assert "\x1b" not in str(caught.value)
    assert caught.value.log_tail == ("\\x1b[2Jboo",)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGTERM"])
def test_a_signal_is_named(sh, name):
    number = getattr(signal, name)
    with pytest.raises(ChildError, match=f"ended by {name}") as caught:
        sh(f"echo last; kill -{int(number)} $$")

    assert caught.value.return_code == -number
    assert caught.value.log_tail == ("last",)


@pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="no real-time signals")
def test_the_log_of_a_failure_is_never_empty_and_tells_how_to_repeat_it(sh, log):
    with pytest.raises(ChildError):
        sh("kill -SEGV $$")
    assert log.read_text().startswith("\newq: ended by SIGSEGV; to repeat it: ")
    assert "kill -SEGV" in log.read_text()


def test_pythons_own_words_on_a_crash_are_no_last_line(log, tmp_path):
    (tmp_path / "crashing.py").write_text(
        "import ctypes, numpy\nprint('before', flush=True)\nctypes.string_at(0)\n"
    )
    argv = python_argv("crashing")
    with pytest.raises(ChildError) as caught:
        run(argv, stage="test", log_path=log, cwd=tmp_path)
    assert caught.value.problem == "ended by SIGSEGV; its last line: before"
    assert caught.value.log_tail == ("before",)
    assert "Fatal Python error: Segmentation fault" in log.read_text()


def test_a_signal_without_a_name_is_told_too(sh):
    with pytest.raises(ChildError, match=f"ended by .*{signal.SIGRTMIN + 3}"):
        sh(f"kill -{signal.SIGRTMIN + 3} $$")


def test_a_killed_child_most_likely_ran_out_of_memory(sh):
    with pytest.raises(ResourceError, match=r"killed \(137\).*memory") as caught:
        sh("kill -9 $$")

    assert caught.value.exit_code == 6


@pytest.mark.parametrize("kind", ["absent", "folder", "not-executable", "no-program"])
def test_a_program_that_cannot_start_is_a_tool_error(tmp_path, log, kind):
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind != "absent":
        path.write_bytes(b"\0\1\2")
        path.chmod(0o755 if kind == "no-program" else 0o644)

    with pytest.raises(ToolError, match="cannot be started") as caught:
        run([path], stage="test", log_path=log)
    assert caught.value.exit_code == 4
    assert str(path) in str(caught.value)


# Endings.


STUBBORN = "trap '' TERM; "


@pytest.mark.parametrize(
    ("child", "grandchild"),
    [
        pytest.param("", "", id="polite"),
        pytest.param(STUBBORN, STUBBORN, id="stubborn"),
        pytest.param("", STUBBORN, id="stubborn-grandchild"),
    ],
)
def test_a_timeout_ends_the_whole_group_within_five_seconds(
    sh, tmp_path, child, grandchild
):
    """The child, and a grandchild that it started."""
    pids = tmp_path / "pids"
    loop = f"echo $$ >> {pids}; while :; do sleep 0.1; done"
    begin = time.monotonic()

    with pytest.raises(ChildError, match="took longer than 1 s and was stopped"):
        sh(
            f'{grandchild}sh -c "$LOOP" & trap - TERM; {child}{loop}',
            timeout_seconds=1,
            env={"LOOP": grandchild + loop},
        )

    found = [int(pid) for pid in pids.read_text().split()]
    assert time.monotonic() - begin < 1 + 5 + 1
    assert len(found) == 2
    assert all_gone(found)


def test_a_grandchild_that_outlives_a_finished_child_is_ended(sh, tmp_path):
    pids = tmp_path / "pids"

    sh(f"sh -c 'echo $$ > {pids}; exec sleep 60' & while ! test -s {pids}; do :; done")

    assert all_gone([int(pids.read_text())])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_of_ours_ends_the_child(sh, tmp_path, error):
    pids = tmp_path / "pids"

    def stop(line: str) -> None:
        raise error

    with pytest.raises(error):
        sh(f"echo $$ > {pids}; echo line; exec sleep 60", on_line=stop)

    assert all_gone([int(pids.read_text())])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_us_ends_the_child_and_gives_the_right_code(tmp_path, number):
    """Through the command line, which turns SIGTERM into an exception."""
    pids = tmp_path / "pids"
    code = (
        "import sys; from pathlib import Path; import ewq_gguf.cli as cli, click\n"
        "from ewq_gguf.process import run\n"
        "def job(*args): run(['sh', '-c', f'echo $$ > {sys.argv[1]}; exec sleep 60'],"
        " stage='t', log_path=Path(sys.argv[1] + '.log'))\n"
        "cli.ewq.invoke = job\n"
        "sys.exit(cli.main(['demo', 'x']))"
    )
    ours = subprocess.Popen([sys.executable, "-c", code, str(pids)])
    try:
        end = time.monotonic() + 20
        while not (pids.exists() and pids.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        ours.send_signal(number)
        assert ours.wait(6) == 128 + number
        assert all_gone([int(pids.read_text())])
    finally:
        with suppress(ProcessLookupError):
            ours.kill()
        ours.wait()

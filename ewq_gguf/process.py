"""Child processes: the only home of subprocess.

A child runs in its own process group with stdin closed and all of its output in one
log. Whatever ends this process (an error, SIGINT, SIGTERM turned into an exception)
ends the child's whole group within five seconds.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ewq_gguf import disk
from ewq_gguf.errors import ChildError, ResourceError, ToolError, UsageError, printable

LOG_TAIL_LINES = 20

#: Cores this process may use.
N_CPUS = (
    len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else os.cpu_count() or 1
)
#: Seconds that a child may take without progress, in the environment.
TIMEOUT_VARIABLE = "EWQ_CHILD_TIMEOUT"
_TIMEOUT_SECONDS = 1800.0
_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large")
#: ggml starts a debugger where it aborts, which would have the last word.
_NO_DEBUGGER = {"GGML_NO_BACKTRACE": "1"}
_CGROUP = Path("/sys/fs/cgroup")
_STOP_SECONDS = 5.0
_POLL_SECONDS = 0.05
_CRASH = "Fatal Python error: "


def stall_seconds(stage: str) -> float:
    """Seconds that a child may take without progress: EWQ_CHILD_TIMEOUT, else 1800.

    A forward pass of a large model takes minutes on a slow machine.

    Args:
        stage: the stage that an error is reported under.

    Raises:
        UsageError: the variable holds no number above 0.
    """
    text = os.environ.get(TIMEOUT_VARIABLE) or str(_TIMEOUT_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UsageError(
            stage, TIMEOUT_VARIABLE, f"{text!r} is no time", "give seconds, as in 7200"
        )
    return seconds


def run(
    argv: Sequence[str | Path],
    *,
    stage: str,
    log_path: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_seconds: float | None = None,
    on_line: Callable[[str], None] | None = None,
) -> str:
    """Run a child to its end and return what it printed.

    Args:
        argv: The program and its arguments; never a shell line.
        stage: The stage that an error names.
        log_path: The file that stdout and stderr are written to; overwritten.
        cwd: The child's working folder.
        env: Variables added to this process's environment.
        timeout_seconds: The longest time it may take; None is no limit.
        on_line: Called with each complete line while the child runs.

    Returns:
        The log's text (undecodable bytes replaced).

    Raises:
        ToolError: the program does not exist or cannot be started.
        ChildError: it ended with another code than 0, or took too long.
        ResourceError: it was killed, most likely for memory.
    """
    command = [str(arg) for arg in argv]
    started = time.monotonic()
    child = _start(command, stage, log_path, cwd, env)
    timed_out = False
    try:
        with log_path.open("rb") as log_read:
            pending = b""
            while True:
                ended = child.poll() is not None
                pending = _hand_lines(pending + log_read.read(), on_line)
                if ended:
                    break
                if timeout_seconds and time.monotonic() - started > timeout_seconds:
                    timed_out = True
                    break
                with suppress(subprocess.TimeoutExpired):
                    child.wait(_POLL_SECONDS)
    finally:
        _stop_group(child)
    text = log_path.read_text(encoding="utf-8", errors="replace")
    _close_log(log_path, command, child.returncode, is_stopped=timed_out)
    if timed_out:
        problem = f"took longer than {timeout_seconds:.0f} s and was stopped"
        raise _child_error(command, -9, text, log_path, stage, problem)
    if child.returncode != 0:
        _raise_if_full(command, child.returncode, text, log_path, stage, cwd)
        _raise_for(command, child.returncode, text, log_path, stage)
    return text


def _start(
    command: Sequence[str],
    stage: str,
    log_path: Path,
    cwd: Path | None,
    env: Mapping[str, str] | None,
) -> subprocess.Popen[bytes]:
    with log_path.open("wb") as log:
        try:
            return subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, **_NO_DEBUGGER, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise ToolError(
                stage,
                command[0],
                f"cannot be started ({error.strerror})",
                "run `ewq setup`, or name another with --llama-cpp",
            ) from error


def available_memory() -> int:
    """Bytes of RAM that could be had without swapping, a container's limit included."""
    import psutil

    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no cgroup v2, or its limit is "max"
        limit, used = (
            int((_CGROUP / name).read_text())
            for name in ("memory.max", "memory.current")
        )
        stat = (_CGROUP / "memory.stat").read_text()
        cached = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)
        free = min(free, max(limit - used, 0) + (int(cached[1]) if cached else 0))
    return free


def python_argv(module: str, *args: str | Path) -> list[str]:
    """The command line that runs one of our modules in a child.

    A crash leaves Python's stack in the log: the call that was being made.
    """
    command = [sys.executable, "-X", "faulthandler", "-m", module]
    return [*command, *(str(arg) for arg in args)]


def _hand_lines(data: bytes, on_line: Callable[[str], None] | None) -> bytes:
    """Pass complete lines on; return the incomplete rest."""
    *lines, rest = data.replace(b"\r", b"\n").split(b"\n")
    if on_line is not None:
        for line in lines:
            on_line(line.decode("utf-8", errors="replace"))
    return rest


def _stop_group(child: subprocess.Popen[bytes]) -> None:
    """End the child and whatever it started: SIGTERM, after five seconds SIGKILL."""
    if child.poll() is None:
        _signal_group(child, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_STOP_SECONDS)
    # Also when the child has ended: what it started may have ignored the signal.
    _signal_group(child, signal.SIGKILL)
    child.wait()


def _signal_group(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _raise_for(
    command: Sequence[str], code: int, text: str, log_path: Path, stage: str
) -> None:
    program = Path(command[0]).name
    if code == -signal.SIGKILL:
        raise ResourceError(
            stage,
            program,
            "killed (137), most likely because memory ran out",
            f"free memory and run again; its log is {log_path}",
        )
    raise _child_error(command, code, text, log_path, stage, _ending(code))


def _raise_if_full(
    command: Sequence[str],
    code: int,
    text: str,
    log_path: Path,
    stage: str,
    cwd: Path | None,
) -> None:
    """Where a child writes, a disk may be full; not every program can say so."""
    work = [Path(arg).parent for arg in command if ".ewq/" in arg]
    temporary = Path(tempfile.gettempdir())
    folders = [*([cwd] if cwd else []), *work, log_path.parent, temporary]
    folder = None if code == -signal.SIGKILL else disk.full_folder(folders)
    if folder or code == -signal.SIGXFSZ or _DISK_FULL.search(_tail(text)):
        raise ResourceError(
            stage,
            folder or Path(command[0]).name,
            "the disk is full, or a quota is",
            f"free some space, or {disk.advice(folder or folders[0])}; "
            f"its log is {log_path}",
        )


def _ending(code: int) -> str:
    """How a child ended: its signal's name, or its exit code."""
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal, or no signal at all
        return f"ended by signal {-code}" if code < 0 else f"exit code {code}"


def _close_log(
    log_path: Path, command: Sequence[str], code: int, *, is_stopped: bool
) -> None:
    """End a failed child's log with how it ended and the command to repeat it."""
    if code == 0 and not is_stopped:
        return
    ending = "stopped after its time was up" if is_stopped else _ending(code)
    with suppress(OSError), log_path.open("a", encoding="utf-8") as log:
        log.write(f"\newq: {ending}; to repeat it: {shlex.join(command)}\n")


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-LOG_TAIL_LINES:])


def _child_error(
    command: Sequence[str],
    code: int,
    text: str,
    log_path: Path,
    stage: str,
    problem: str,
) -> ChildError:
    lines = [line for line in text.splitlines() if line.strip()]
    # What Python tells of a crash stays in the log: it ends with a list of modules.
    crash = (i for i, line in enumerate(lines) if line.startswith(_CRASH))
    lines = lines[: next(crash, len(lines))] or lines
    tail = [printable(line) for line in lines[-LOG_TAIL_LINES:]]
    if tail:
        problem += f"; its last line: {tail[-1]}"
    error = ChildError(stage, Path(command[0]).name, problem, f"its log is {log_path}")
    error.argv = tuple(command)
    error.return_code = code
    error.log_tail = tuple(tail)
    error.output = text
    error.log_path = log_path
    return error

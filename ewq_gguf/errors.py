"""Every error a user can meet, one class per exit code.

    EwqError
    ├── UsageError         2  the command line, or an output that exists
    ├── InputError         3  a checkpoint, plan, budget or data file
    ├── ToolError          4  a tool or library that is missing or too old
    ├── ChildError         5  a child process failed
    ├── ResourceError      6  disk, RAM or VRAM
    ├── NetworkError       7  network or authorisation
    ├── VerificationError  8  a GGUF file is not what its plan says
    └── LockedError        9  another run holds the output

Anything else that reaches the top is a bug and keeps its traceback.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar


def printable(text: object, limit: int = 400) -> str:
    r"""Text safe for a terminal: control characters as \x1b and the like, cut short."""
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)
    )
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


class EwqError(Exception):
    """One line: `stage: subject: what is wrong; what to do`.

    Args:
        stage: The stage that failed, such as `scan` or `quantize`.
        subject: The file or object concerned, or None.
        problem: The fault, with the number found and the number needed.
        remedy: The way to mend it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, stage: str, subject: str | Path | None, problem: str, remedy: str = ""
    ) -> None:
        """Keep the parts; `str()` joins them."""
        self.stage = stage
        self.subject = None if subject is None else printable(subject)
        self.problem = printable(problem, 2000)
        self.remedy = printable(remedy, 1000)
        super().__init__(stage, subject, problem, remedy)

    def __str__(self) -> str:
        """The line that is printed after `ewq: `."""
        parts = [self.stage, self.subject, self.problem]
        line = ": ".join(part for part in parts if part)
        return f"{line}; {self.remedy}" if self.remedy else line


class UsageError(EwqError):
    """The command line is wrong, or an output exists that would be lost."""

    exit_code = 2


class InputError(EwqError):
    """A checkpoint, plan or data file is not what it should be."""

    exit_code = 3


class ToolError(EwqError):
    """A tool, library or device is missing, too old or not built."""

    exit_code = 4


class ChildError(EwqError):
    """A child process failed.

    Attributes:
        argv: its command line.
        return_code: negative for a signal.
        log_tail: its last lines, at most 20.
        output: all that it printed.
        log_path: the whole log, or None where it was not kept.
    """

    exit_code = 5
    argv: tuple[str, ...] = ()
    return_code: int = 0
    log_tail: tuple[str, ...] = ()
    output: str = ""
    log_path: Path | None = None


class ResourceError(EwqError):
    """Not enough disk, RAM or VRAM, or a folder that cannot be written."""

    exit_code = 6


class NetworkError(EwqError):
    """The network or the Hub refused."""

    exit_code = 7


class VerificationError(EwqError):
    """A file is not what its plan says.

    Attributes:
        differences: one line per difference, for the table below the message.
    """

    exit_code = 8
    differences: tuple[str, ...] = ()


class LockedError(EwqError):
    """Another run holds the output."""

    exit_code = 9

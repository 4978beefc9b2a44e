"""One thing that was checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """How it is.

    Attributes:
        status: a failure makes commands fail; a warning may, or makes them slow.
        found: A sentence on the state of this machine.
        remedy: The command that repairs it; empty where nothing is wrong.
    """

    status: Status
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """A finding with the name of what was checked."""

    name: str
    status: Status
    found: str
    remedy: str


def ok(found: str) -> Finding:
    """Nothing is wrong."""
    return Finding("ok", found)


def warning(found: str, remedy: str) -> Finding:
    """Something will be slow, or fail later."""
    return Finding("warning", found, remedy)


def failure(found: str, remedy: str) -> Finding:
    """Something does not work."""
    return Finding("failure", found, remedy)


def size_text(size_bytes: int) -> str:
    """Bytes as MiB or GiB."""
    if size_bytes < 1 << 30:
        return f"{size_bytes / (1 << 20):.0f} MiB"
    return f"{size_bytes / (1 << 30):.1f} GiB"

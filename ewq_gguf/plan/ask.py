"""What the user lets a file take: a size, a share of the unquantised, or bits."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ewq_gguf.errors import UsageError
from ewq_gguf.plan.size_text import parse_size

_NUMBER = re.compile(r"[0-9]{1,30}(\.[0-9]{1,30})?")


@dataclass(frozen=True)
class Limit:
    """What a file may take.

    Attributes:
        asked: as the user gave it.
        n_bytes: of the whole file.
        may_exceed: whether it may be more than the unquantised file takes: what a
            machine has often is, what a user asks for is a mistake.
    """

    asked: str
    n_bytes: int
    may_exceed: bool = False


@dataclass(frozen=True)
class Ask:
    """A budget as it was asked for; exactly one of the numbers is given.

    Attributes:
        text: as it was typed.
        n_bytes: of the file.
        share: of the unquantised file.
        bpw: bits per weight of the whole file.
        may_exceed: as of Limit.
    """

    text: str
    n_bytes: int | None = None
    share: float | None = None
    bpw: float | None = None
    may_exceed: bool = False

    def limit(self, raw_bytes: int, n_weights: int) -> Limit:
        """The bytes, for a model that takes `raw_bytes` unquantised."""
        if self.n_bytes is not None:
            n_bytes = self.n_bytes
        elif self.share is not None:
            n_bytes = int(self.share * raw_bytes)
        else:
            assert self.bpw is not None
            n_bytes = int(self.bpw * n_weights / 8)
        return Limit(self.text, n_bytes, self.may_exceed)


def parse_budget(text: str) -> Ask:
    """`6GiB`, `5.5GB`, or `80%` of the unquantised file.

    Raises:
        UsageError: it is none of these, or not above 0.
    """
    stripped = text.strip()
    if stripped.endswith("%"):
        share = _positive(stripped[:-1], "--budget", "80%") / 100
        return Ask(stripped, share=share)
    return Ask(stripped, n_bytes=parse_size(stripped, "--budget"))


def parse_bpw(text: str) -> Ask:
    """`4.5` bits per weight of the whole file.

    Raises:
        UsageError: it is no number above 0.
    """
    bpw = _positive(text, "--bpw", "4.5")
    return Ask(f"{bpw:g} bpw", bpw=bpw)


def _positive(text: str, option: str, example: str) -> float:
    value = float(text) if _NUMBER.fullmatch(text.strip()) else 0.0
    if not value:
        raise UsageError(
            "plan", option, f"{text.strip()!r} is no number above 0", f"use {example}"
        )
    return value

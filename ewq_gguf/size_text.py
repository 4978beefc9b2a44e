"""Sizes as people write them: `6GiB`, `5.5GB`, `700MB`, `124918432B`."""

from __future__ import annotations

import re
from fractions import Fraction

from ewq_gguf.errors import UsageError

#: KiB, MiB, ... are powers of 1024; kB, MB, ... of 1000.
UNITS = {
    "B": 1,
    **{f"{c}iB": 1024**i for i, c in enumerate("KMGT", 1)},
    **{f"{c}B": 1000**i for i, c in enumerate("kMGT", 1)},
}
_SIZE = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]+)")


def parse_size(text: str, option: str = "--budget") -> int:
    """The bytes of a size, rounded down.

    Args:
        text: a number and a unit; the unit's case does not matter.
        option: The option it was given to, for the message.

    Raises:
        UsageError: it is no such size, or less than a byte.
    """
    match = _SIZE.fullmatch(text.strip())
    units = {unit.lower(): size for unit, size in UNITS.items()}
    size = units.get(match[2].lower()) if match else None
    n_bytes = int(Fraction(match[1]) * size) if match and size else 0
    if n_bytes < 1:
        raise UsageError(
            "plan",
            option,
            f"{text.strip()!r} is no size above 0",
            "give a number with its unit, such as 6GiB, 5.5GB, 700MB or 124918432B",
        )
    return n_bytes


def size_text(n_bytes: int) -> str:
    """Bytes as people compare them: `316.2 MB`."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.2f} {unit}"
    return f"{n_bytes} B"

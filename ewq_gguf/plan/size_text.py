"""Sizes as people type them: `6GiB`, `5.5GB`, `700MB`, `124918432B`."""

from __future__ import annotations

import re

from ewq_gguf.errors import UsageError

_UNITS = {
    "B": 1,
    "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
# Few digits, so that no number is too large to work with.
_SIZE = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,18}))?([A-Za-z]+)")


def parse_size(text: str) -> int:
    """Bytes, rounded down: KiB, MiB, GiB are powers of 1024, kB, MB, GB of 1000.

    Raises:
        UsageError: it is not a number above 0 with a unit.
    """
    match = _SIZE.fullmatch(text)
    n_bytes = 0
    if match and match[3] in _UNITS:
        # Integers, because a float has too few digits for some files' exact size.
        decimals = match[2] or ""
        n_bytes = int(match[1] + decimals) * _UNITS[match[3]] // 10 ** len(decimals)
    if n_bytes == 0:
        raise UsageError(
            "plan",
            text or "''",
            "is not a size",
            "give a number above 0 and a unit, such as 6GiB, 5.5GB, 700MB or "
            "124918432B",
        )
    return n_bytes

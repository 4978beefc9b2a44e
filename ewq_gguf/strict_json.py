"""JSON that others wrote, read strictly: every mistake ends in one line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ewq_gguf.errors import InputError, printable

_MAX_BYTES = 512 << 20


def parse_json(raw: bytes, repeated: list[str] | None = None) -> Any:
    """The values of JSON in UTF-8.

    Args:
        raw: The text.
        repeated: Is given the keys that an object has twice, whose last value is taken.
            None refuses them.

    Raises:
        ValueError: It is not UTF-8 or not JSON, nests too deep, or holds half a
            surrogate pair or a duplicate key.
    """

    def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            keys = [key for key, n in counts.items() if n > 1]
            if repeated is None:
                raise ValueError(f"duplicate key {printable(keys[0])!r}")
            repeated.extend(keys)
        return values

    try:
        values = json.loads(
            raw.decode("utf-8"), object_pairs_hook=to_object, parse_int=_parse_int
        )
        if b"\\ud" in raw.lower():
            json.dumps(values, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    return values


def _parse_int(digits: str) -> int | float:
    """`-0` is no whole number for the safetensors library either."""
    return -0.0 if digits == "-0" else int(digits)


def read_json(
    path: Path,
    stage: str,
    remedy: str,
    *,
    max_bytes: int = _MAX_BYTES,
    repeated: list[str] | None = None,
) -> tuple[bytes, Any]:
    """The bytes of a JSON file and its values.

    Args:
        path: The file.
        stage: The stage that an error names.
        remedy: Advice about a file that is not JSON.
        max_bytes: The largest size that is read.
        repeated: As of `parse_json`.

    Raises:
        InputError: The file is missing, too large, or not JSON.
    """
    try:
        # The size of a pipe or a device is not known: no more than the limit is read.
        n_bytes = path.stat().st_size
        if n_bytes <= max_bytes:
            with path.open("rb") as file:
                raw = file.read(max_bytes + 1)
            n_bytes = len(raw)
    except OSError as error:
        raise InputError(
            stage, path, f"cannot be read ({error.strerror})", "check the path"
        ) from error
    if n_bytes > max_bytes:
        problem = f"{n_bytes:,} bytes are more than {max_bytes:,}"
        raise InputError(stage, path, problem, remedy)
    try:
        return raw, parse_json(raw, repeated)
    except json.JSONDecodeError as error:
        problem = f"is not JSON at line {error.lineno}: {error.msg}"
        raise InputError(stage, path, problem, remedy) from error
    except ValueError as error:
        raise InputError(stage, path, f"is not JSON ({error})", remedy) from error

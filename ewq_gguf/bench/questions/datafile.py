"""Files that users give: read whole, or refused where something would be lost."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.errors import InputError, ToolError

_MAX_BYTES = 1 << 30
_BOM = b"\xef\xbb\xbf"


def read_text(path: Path) -> str:
    """A UTF-8 file's text; line ends of CR LF are left, as llama.cpp leaves them.

    Raises:
        InputError: it cannot be read, is empty or too large, begins with a byte order
            mark or holds a NUL, which the tokenizer would see, or is not UTF-8.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            problem = f"is larger than {_MAX_BYTES:,} bytes"
            raise InputError(STAGE, path, problem, "give a part of it")
        raw = path.read_bytes()
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise InputError(STAGE, path, problem, "check the path") from error
    if not raw.strip():
        raise InputError(STAGE, path, "is empty", "give a file with content")
    remedy = "save it as UTF-8 without a byte order mark"
    if raw.startswith(_BOM):
        raise InputError(STAGE, path, "begins with a byte order mark", remedy)
    if (place := raw.find(b"\0")) >= 0:
        raise InputError(STAGE, path, f"has a NUL at byte {place}", remedy)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 at byte {error.start}"
        raise InputError(STAGE, path, problem, remedy) from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a parquet, CSV (with a header) or JSONL file, told by its ending.

    Raises:
        InputError: it cannot be read, or a line is not JSON or no object.
        ToolError: pyarrow is missing for a parquet file.
    """
    if path.suffix == ".parquet":
        return read_parquet(path, None)
    text = read_text(path)
    if path.suffix == ".csv":
        try:
            return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        except csv.Error as error:
            problem = f"is not CSV ({error})"
            raise InputError(STAGE, path, problem, "write it as RFC 4180") from error
    rows = []
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                row = error
            if not isinstance(row, dict):
                problem = f"line {n} is not a JSON object"
                raise InputError(STAGE, path, problem, "give one object per line")
            rows.append(row)
    return rows


def read_parquet(
    path: Path, columns: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """The rows of a parquet file.

    Args:
        path: the file.
        columns: only these; None for all.

    Raises:
        InputError: it cannot be read, is cut or no parquet, or lacks a column.
        ToolError: pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        remedy = "pip install 'ewq-gguf[eval]'"
        raise ToolError(STAGE, "pyarrow", "is not installed", remedy) from error
    try:
        # One file: a folder of this name, or one called `a=b`, would mean a data set.
        with pyarrow.parquet.ParquetFile(path) as file:
            lacking = set(columns or ()).difference(file.schema_arrow.names)
            if not lacking:
                names = None if columns is None else list(columns)
                return list(file.read(columns=names).to_pylist())
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        problem = f"is not a sound parquet file ({error})"
        raise InputError(STAGE, path, problem, "download it again") from error
    problem = f"has no column {' or '.join(sorted(lacking))}"
    raise InputError(STAGE, path, problem, "give the data set's own file")

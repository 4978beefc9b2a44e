"""MMLU's files: the authors' CSV, or the Hub's parquet, per subject or all in one."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.questions.datafile import read_parquet, read_text
from ewq_gguf.errors import InputError
from ewq_gguf.records.scores import Letter

LETTERS: tuple[Letter, ...] = ("A", "B", "C", "D")
REMEDY = "give a folder with test/ and dev/, as the authors publish it"
#: Configurations of the Hub's data set that are not subjects.
_NO_SUBJECTS = {"all", "auxiliary_train"}
_COLUMNS = ("question", "choices", "answer")


@dataclass(frozen=True)
class SubjectRows:
    """Where a subject's rows are.

    Attributes:
        name: the file with its folder, for messages.
        read: the rows' fields: question, choices, answer, where the file is sound.
    """

    name: str
    read: Callable[[], list[list[str]]]


def find_subjects(folder: Path, split: str) -> dict[str, SubjectRows]:
    """A split's subjects in the order of names; most files are not opened yet.

    Raises:
        InputError: there is no file of the split, or the one with all is not sound.
        ToolError: pyarrow is missing for that one.
    """
    ending = f"_{split}.csv"
    found = {
        path.name.removesuffix(ending): _rows_of(path, _csv_rows)
        for path in sorted((folder / split).glob(f"*{ending}"))
    } or {
        path.parent.name: _rows_of(path, _parquet_rows)
        for path in sorted(folder.glob(f"*/{split}-*.parquet"))
        if path.parent.name not in _NO_SUBJECTS
    }
    for path in () if found else sorted(folder.glob(f"{split}-*.parquet")):
        found |= _all_subjects(path)
    if not found:
        problem = f"has no {split}/SUBJECT{ending}"
        raise InputError(STAGE, folder, problem, REMEDY)
    return found


def _rows_of(path: Path, read: Callable[[Path], list[list[str]]]) -> SubjectRows:
    return SubjectRows(_name(path), lambda: read(path))


def _all_subjects(path: Path) -> dict[str, SubjectRows]:
    """Subjects that share a file; rows are counted in each, as in its own file."""
    rows: dict[str, list[list[str]]] = {}
    for row in read_parquet(path, ("subject", *_COLUMNS)):
        rows.setdefault(str(row["subject"]), []).append(_fields(row))
    return {
        subject: SubjectRows(f"{_name(path)} {subject}", rows[subject].copy)
        for subject in sorted(rows)
    }


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _csv_rows(path: Path) -> list[list[str]]:
    text = io.StringIO(read_text(path), newline="")
    reader = csv.reader(text, strict=True)
    rows = []
    try:
        for fields in reader:
            # CRLF may end a row, as RFC 4180 has it, but inside a question it would
            # silently change the prompt.
            if any("\r" in field for field in fields):
                problem = f"line {reader.line_num}: has a carriage return in a field"
                raise InputError(STAGE, path, problem, "write LF inside fields")
            if fields:
                rows.append(fields)
    except csv.Error as error:
        problem = f"line {reader.line_num}: is not CSV ({error})"
        raise InputError(STAGE, path, problem, REMEDY) from error
    return rows


def _parquet_rows(path: Path) -> list[list[str]]:
    return [_fields(row) for row in read_parquet(path, _COLUMNS)]


def _fields(row: Mapping[str, Any]) -> list[str]:
    """A row as CSV has it; what is missing is an empty text, and named as such."""
    choices, answer = row["choices"], row["answer"]
    if isinstance(answer, int) and 0 <= answer < len(LETTERS):
        answer = LETTERS[answer]  # numbers out of range stay numbers
    values = (row["question"], *(choices if isinstance(choices, list) else ()), answer)
    return ["" if value is None else str(value) for value in values]

"""Base of all records: unknown keys are refused; schema names; canonical JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ewq_gguf.errors import InputError
from ewq_gguf.strict_json import read_json

R = TypeVar("R", bound="Record")
P = TypeVar("P", bound="Part")


class Part(BaseModel):
    """A piece of a record: frozen, unknown keys refused, no NaN or infinity."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, strict=True
    )


class Record(Part):
    """A record that is saved as a file of its own.

    Each record class narrows both fields to its own values; the version rises when a
    field changes its meaning.

    Attributes:
        schema_name: name of the schema, such as `ewq.plan`.
        schema_version: version of that schema.
    """

    schema_name: str
    schema_version: int

    def to_json(self) -> str:
        """Canonical JSON: sorted and indented; equal records give equal bytes."""
        values = self.model_dump(mode="json")
        return json.dumps(values, indent=1, sort_keys=True) + "\n"

    @property
    def sha256(self) -> str:
        """SHA-256 of the canonical JSON, as hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def load_record(record_type: type[R], path: Path, stage: str) -> R:
    """Read a record from its file.

    Raises:
        InputError: the file is missing, too large, not JSON, or not such a record.
    """
    schema = record_type.model_fields["schema_name"].default
    text, values = read_json(path, stage, f"give a file that ewq wrote as {schema}")
    if not isinstance(values, dict) or values.get("schema_name") != schema:
        raise InputError(stage, path, f"is not a {schema} file", "check the path")
    try:
        return record_type.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        pointer = "/" + "/".join(str(part) for part in first["loc"])
        raise InputError(
            stage,
            path,
            f"at {pointer}: {first['msg']}",
            "make it anew with this version of ewq",
        ) from error


def load_cached(record_type: type[R], path: Path, stage: str) -> R | None:
    """A record from the cache, or None where it is missing or not sound any more."""
    try:
        return load_record(record_type, path, stage) if path.exists() else None
    except InputError:
        return None


@contextmanager
def open_journal(path: Path) -> Iterator[Callable[[Part], None]]:
    """A function that adds a part to a journal; parts of a killed run stay."""
    with path.open("a", encoding="utf-8") as file:
        file.write("\n")  # ends what was left half

        def keep(part: Part) -> None:
            file.write(f"{part.model_dump_json()}\n")
            file.flush()

        yield keep


def read_journal(path: Path, part_type: type[P]) -> dict[str, P]:
    """Parts that were written one a line, by their `name`; broken lines are left out.

    A killed run may leave half a line at the end; everything before it is sound.
    """
    parts: dict[str, P] = {}
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                part = part_type.model_validate_json(line)
            except ValidationError:
                continue
            parts[str(getattr(part, "name"))] = part  # noqa: B009 - of any part
    return parts

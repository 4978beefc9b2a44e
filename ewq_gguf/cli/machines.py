"""The machines of a cluster from the command line: one by one, or from a file."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

from ewq_gguf.errors import InputError
from ewq_gguf.records.placement import Machine
from ewq_gguf.rpc.machines import check_machines, machines_of_tables, parse_machine

_MAX_FILE_BYTES = 1 << 20


def machines_of(texts: Sequence[str], file: Path | None) -> tuple[Machine, ...]:
    """The file's machines, then those of `--machine`; the first is the main one.

    Raises:
        UsageError: one has another form, or a name is given twice.
        InputError: the file cannot be read, or is not a list of machines.
    """
    listed = () if file is None else machines_of_tables(_read_toml(file))
    machines = (*listed, *map(parse_machine, texts))
    check_machines(machines)
    return machines


def _read_toml(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES).decode()
    except OSError as error:
        raise InputError(
            "plan", path, f"cannot be read ({error.strerror})", "check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError("plan", path, "is not UTF-8", "save it as UTF-8") from error
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(
            "plan", path, f"is not TOML ({error})", "give [[machine]] tables"
        ) from error

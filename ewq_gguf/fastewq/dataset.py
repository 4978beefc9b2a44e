"""The rows FastEWQ learns from: the paper's, the user's own, and those in use.

`rows.csv` in the cache collects the user's scans. It changes no plan until
`ewq fastewq train` has written `trained.csv`, the paper's rows and the user's merged;
from then on that file is in use. No fitted model is ever stored: a forest over these
rows takes a fraction of a second, and a pickle could run anything.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from ewq_gguf import data, store
from ewq_gguf.errors import InputError
from ewq_gguf.fastewq.classifier import STAGE, Row, merge_rows, parse_rows

COLUMNS = (
    "model_name", "num_blocks", "exec_index", "num_parameters", "quantization_type",
    "quantized", "source", "original_num_parameters",
)  # fmt: skip


def shipped_rows() -> tuple[Row, ...]:
    """The 147 layers whose labels the paper's tables 2 and 8 tell."""
    return parse_rows(data.table("fastewq_rows"), "fastewq_rows.csv")


def own_rows() -> tuple[Row, ...]:
    """The layers of the user's own scans; empty before the first `add`.

    Raises:
        InputError: the file is not sound.
    """
    return _read(own_path())


def rows_in_use() -> tuple[Row, ...]:
    """What the policy `fastewq` learns from: trained ones, else the paper's.

    Raises:
        InputError: the file is not sound.
    """
    return _read(trained_path()) or shipped_rows()


def own_path() -> Path:
    """Where the user's own rows are."""
    return store.cache_dir("fastewq") / "rows.csv"


def trained_path() -> Path:
    """Where the rows in use are, if not the paper's."""
    return store.cache_dir("fastewq") / "trained.csv"


def add(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Put models' rows among the user's own, in place of what was known of them.

    Returns:
        All rows now in the file.

    Raises:
        InputError: the file is not sound.
        ResourceError: it cannot be written.
        LockedError: another process writes it.
    """
    new = tuple(rows)
    models = {row.model_name for row in new}
    path = own_path()
    with store.locked(path, stage=STAGE, wait=True):
        kept = [row for row in own_rows() if row.model_name not in models]
        merged = merge_rows(kept, new)
        store.write_text(path, to_csv(merged), stage=STAGE, force=True)
    return merged


def merged_rows() -> tuple[Row, ...]:
    """The paper's rows and the user's own; of one layer the user's counts.

    Raises:
        InputError: the user has no rows, or the file is not sound.
    """
    own = own_rows()
    if not own:
        raise InputError(
            STAGE, None, "there are no rows of your own", "`ewq fastewq add SCAN...`"
        )
    return merge_rows(shipped_rows(), own)


def use(rows: Iterable[Row]) -> None:
    """Let plans learn from these rows instead of the paper's.

    Raises:
        ResourceError: the file cannot be written.
    """
    store.write_text(trained_path(), to_csv(rows), stage=STAGE, force=True)


def reset() -> None:
    """Put the paper's rows in use again; the user's own stay."""
    trained_path().unlink(missing_ok=True)


def to_csv(rows: Iterable[Row]) -> str:
    """Rows as a CSV file; equal rows give equal bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([getattr(row, column) for column in COLUMNS] for row in rows)
    return text.getvalue()


def rows_sha256(rows: Iterable[Row]) -> str:
    """SHA-256 of the rows as a CSV file."""
    return store.sha256_text(to_csv(rows))


def _read(path: Path) -> tuple[Row, ...]:
    if not path.exists():
        return ()
    remedy = "delete it, and run `ewq fastewq add`, then `train`, again"
    try:
        text = path.read_text(encoding="utf-8")
        rows = parse_rows(csv.DictReader(text.splitlines()), path.name)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(STAGE, path, f"cannot be read ({error})", remedy) from error
    if path == trained_path() and len({row.quantized for row in rows}) != 2:
        raise InputError(STAGE, path, "has layers of one label only", remedy)
    return rows

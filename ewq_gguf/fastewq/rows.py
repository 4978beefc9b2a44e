"""Labelled layers that FastEWQ learns from: the paper's, the user's, those in use.

The paper's 700 rows were never published; 147 of them can be derived from its tables
(docs/ewq-and-fastewq.md).

`rows.csv` in the cache collects the user's scans. It changes no plan until
`ewq fastewq train` has written `trained.csv`, the paper's rows and the user's merged;
from then on that file is in use. No fitted model is ever stored: a forest over these
rows takes a fraction of a second, and a pickle could run anything.

Source: arXiv:2503.04704 section 4.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ewq_gguf import data, store
from ewq_gguf.errors import InputError
from ewq_gguf.plan.ewq import decide, thresholds
from ewq_gguf.plan.model_tensors import check_whole
from ewq_gguf.records import LayoutTensor, Scan, TensorScan
from ewq_gguf.tensor_names import layer_idx

STAGE = "fastewq"
COLUMNS = (
    "model_name", "num_blocks", "exec_index", "num_parameters", "quantization_type",
    "quantized", "source", "original_num_parameters",
)  # fmt: skip
#: num_blocks, exec_index and num_parameters of a layer.
Features = tuple[int, int, int]

_LABELS = ("4-bit", "8-bit", "raw")
#: A layer with more is an error; a classifier's numbers stay finite.
_MOST_PARAMETERS = 10**15
_REMEDY = "delete the file, and run `ewq fastewq add`, then `train`, again"


@dataclass(frozen=True)
class Row:
    """One labelled layer.

    Attributes:
        model_name: Hub id, or a folder's name.
        num_blocks: transformer layers of the model.
        exec_index: layer_idx + 2; the token embedding is 1.
        num_parameters: parameters of the layer, norms and biases included.
        quantization_type: EWQ's decision: `raw`, `8-bit` or `4-bit`.
        source: `table 2` or `table 8` of the paper, or `scan`.
        original_num_parameters: as printed, where the paper's own number is wrong.
    """

    model_name: str
    num_blocks: int
    exec_index: int
    num_parameters: int
    quantization_type: str
    source: str
    original_num_parameters: int | None = None

    @property
    def quantized(self) -> int:
        """The label: 1 for a quantised layer, 0 for a raw one."""
        return int(self.quantization_type != "raw")

    @property
    def features(self) -> Features:
        """The three numbers that a classifier sees."""
        return self.num_blocks, self.exec_index, self.num_parameters

    @property
    def key(self) -> tuple[str, int]:
        """The model's name and the layer's place in it."""
        return self.model_name, self.exec_index


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
    """The rows that policy `fastewq` learns from: trained ones, else the paper's.

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
    """Put models' rows among the user's own, in place of earlier rows of these models.

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


def merge_rows(*sets: Iterable[Row]) -> tuple[Row, ...]:
    """Rows of several sets, sorted; of one layer the last set's row counts."""
    merged = {row.key: row for rows in sets for row in rows}
    return tuple(merged[key] for key in sorted(merged))


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
    try:
        text = path.read_text(encoding="utf-8")
        rows = parse_rows(csv.DictReader(text.splitlines()), path.name)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(STAGE, path, f"cannot be read ({error})", _REMEDY) from error
    if path == trained_path() and len({row.quantized for row in rows}) != 2:
        raise InputError(STAGE, path, "has layers of one label only", _REMEDY)
    return rows


def parse_rows(table: Iterable[Mapping[str, str]], name: str) -> tuple[Row, ...]:
    """Rows from a CSV file's, checked.

    Args:
        table: as csv.DictReader gives them.
        name: the file's name, for errors.

    Raises:
        InputError: a column is missing, a number is none, or the label contradicts
            the type.
    """
    return tuple(_parse_row(values, f"{name}:{n}") for n, values in enumerate(table, 2))


def _parse_row(values: Mapping[str, str], where: str) -> Row:
    try:
        row = Row(
            model_name=values["model_name"],
            num_blocks=int(values["num_blocks"]),
            exec_index=int(values["exec_index"]),
            num_parameters=int(values["num_parameters"]),
            quantization_type=values["quantization_type"],
            source=values["source"],
            original_num_parameters=int(values["original_num_parameters"] or 0) or None,
        )
        is_sound = (
            row.quantization_type in _LABELS
            and int(values["quantized"]) == row.quantized
            and 2 <= row.exec_index <= row.num_blocks + 1
            and 0 < row.num_parameters < _MOST_PARAMETERS
        )
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound:
        raise InputError(STAGE, where, "is not a labelled layer", _REMEDY)
    return row


def rows_of_scan(scan: Scan) -> tuple[Row, ...]:
    """A scanned model's layers, labelled by EWQ with the paper's defaults.

    Raises:
        InputError: the scan is a part, has no layers, or another epsilon.
    """
    model = scan.model
    check_whole(scan)
    if not scan.layers:
        raise InputError(
            STAGE, model.name, "the model has no layers", "scan another one"
        )
    if scan.measures.epsilon != 0.01:
        raise InputError(
            STAGE,
            model.name,
            f"was scanned with epsilon {scan.measures.epsilon:g}, the labels need 0.01",
            "scan again without --epsilon",
        )
    features = layer_features(scan.tensors, model.n_layers)
    labels = _ewq_labels([layer.softmax_entropy_nats for layer in scan.layers])
    return tuple(
        Row(
            model_name=model.hub_id or model.name,
            num_blocks=model.n_layers,
            exec_index=features[layer.layer_idx][1],
            num_parameters=features[layer.layer_idx][2],
            quantization_type=label,
            source="scan",
        )
        for layer, label in zip(scan.layers, labels, strict=True)
    )


def _ewq_labels(entropies: Sequence[float]) -> list[str]:
    limits = thresholds(entropies, 1.0)
    return [_LABELS[decide(entropy, limits, 3)] for entropy in entropies]


def layer_features(
    tensors: Iterable[LayoutTensor | TensorScan], n_blocks: int
) -> dict[int, Features]:
    """The features of each layer, by layer_idx, from shapes alone."""
    sizes: Counter[int] = Counter()
    for tensor in tensors:
        idx = layer_idx(tensor.name)
        if idx is not None:
            sizes[idx] += prod(tensor.shape)
    return {idx: (n_blocks, idx + 2, sizes[idx]) for idx in sorted(sizes)}

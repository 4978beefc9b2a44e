"""A scan in 80 columns: its layers with small bars, and two scans side by side."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from math import fsum, sqrt

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ewq_gguf.errors import printable
from ewq_gguf.records import Scan, TensorScan

_BAR = " ▏▎▍▌▋▊▉█"
_BAR_CELLS = 6
_N_CHANGED = 20


def scan_view(scan: Scan) -> RenderableType:
    """The model, its layers, and the tensors outside them."""
    return Group(_head(scan), Text(), _layers(scan), Text(), _others(scan))


def bar(share: float, cells: int = _BAR_CELLS) -> str:
    """A bar of eighths of a cell, for a share of 0 to 1."""
    eighths = round(min(max(share, 0.0), 1.0) * cells * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_BAR[rest] if rest else "")).ljust(cells)


def _lattice_line(scan: Scan) -> str:
    """Matrices that hold the values of a ggml type already, by the smallest type."""
    counts = Counter(tensor.lattice[0] for tensor in scan.tensors if tensor.lattice)
    return ", ".join(f"{n} matrices hold {name} values" for name, n in counts.items())


def _head(scan: Scan) -> Table:
    table = Table.grid(padding=(0, 2))
    n_weights = sum(tensor.n_weights for tensor in scan.tensors)
    table.add_row("model", Text(printable(scan.model.name)))
    table.add_row("weights", f"{n_weights:,} in {len(scan.tensors)} tensors")
    table.add_row(
        "measures",
        f"softmax with epsilon {scan.measures.epsilon:g}; histogram of "
        f"{scan.measures.n_bins} bins",
    )
    code_bits = _mean_by_weights(scan.tensors, lambda t: t.code_entropy_bits)
    if code_bits is not None:
        table.add_row(
            "code entropy", f"{code_bits:.2f} bits per weight: a lossless size"
        )
    if line := _lattice_line(scan):
        table.add_row("quantised", line)
    if scan.dropped:
        table.add_row("left out", f"{len(scan.dropped)} tensors that hold no weights")
    return table


def _layers(scan: Scan) -> Table:
    """One row per layer; the bars run from the smallest to the largest."""
    members: dict[int, list[TensorScan]] = defaultdict(list)
    for tensor in scan.tensors:
        if tensor.layer_idx is not None:
            members[tensor.layer_idx].append(tensor)
    softmax = [layer.softmax_entropy_nats for layer in scan.layers]
    histogram = [layer.histogram_entropy_bits for layer in scan.layers]
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in ("layer", "weights", "softmax nats", "z", "", "histogram bits", ""):
        table.add_column(name, justify="left" if not name else "right")
    table.add_column("std", justify="right")
    table.add_column("> 6σ", justify="right")
    for layer in scan.layers:
        tensors = members[layer.layer_idx]
        std = _mean_by_weights(tensors, lambda t: t.std)
        outliers = _mean_by_weights(tensors, lambda t: t.outlier_share)
        table.add_row(
            str(layer.layer_idx),
            f"{layer.n_weights / 1e6:.2f}M",
            f"{layer.softmax_entropy_nats:.8f}",
            _z_text(layer.softmax_entropy_nats, softmax),
            bar(_share(layer.softmax_entropy_nats, softmax)),
            f"{layer.histogram_entropy_bits:.4f}",
            bar(_share(layer.histogram_entropy_bits, histogram)),
            f"{std:.4f}",
            f"{1e6 * (outliers or 0):.0f}ppm",
        )
    return table


def _others(scan: Scan) -> Table:
    table = Table.grid(padding=(0, 2))
    for tensor in scan.tensors:
        if tensor.layer_idx is None and len(tensor.shape) > 1:
            table.add_row(
                Text(printable(tensor.name)),
                f"{tensor.n_weights / 1e6:.2f}M",
                f"{tensor.softmax_entropy_nats:.8f} nats",
                f"{tensor.histogram_entropy_bits:.4f} bits",
                f"std {tensor.std:.4f}",
            )
    return table


def diff_view(a: Scan, b: Scan) -> RenderableType:
    """Tensors whose weights differ between two scans, with both scans' numbers."""
    first = {tensor.name: tensor for tensor in a.tensors}
    second = {tensor.name: tensor for tensor in b.tensors}
    both = [name for name in first if name in second]
    changed = [n for n in both if _weights(first[n]) != _weights(second[n])]
    head = Table.grid(padding=(0, 2))
    head.add_row("A", Text(printable(a.model.name)))
    head.add_row("B", Text(printable(b.model.name)))
    head.add_row("same weights", f"{len(both) - len(changed)} tensors")
    head.add_row("other weights", f"{len(changed)} tensors")
    for label, names in (
        ("only in A", sorted(first.keys() - second.keys())),
        ("only in B", sorted(second.keys() - first.keys())),
    ):
        if names:
            shown = ", ".join(printable(name) for name in names[:3])
            head.add_row(label, Text(f"{len(names)} tensors: {shown}"))
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("tensor, largest change first")
    for name in ("Δ softmax nats", "Δ histogram bits", "std B/A", "> 6σ B-A"):
        table.add_column(name, justify="right")
    by_change = sorted(
        changed,
        key=lambda n: (
            -abs(second[n].histogram_entropy_bits - first[n].histogram_entropy_bits),
            n,
        ),
    )
    for name in by_change[:_N_CHANGED]:
        old, new = first[name], second[name]
        table.add_row(
            Text(printable(name)),
            f"{new.softmax_entropy_nats - old.softmax_entropy_nats:+.2e}",
            f"{new.histogram_entropy_bits - old.histogram_entropy_bits:+.4f}",
            f"{new.std / old.std:.4f}" if old.std else "-",
            f"{1e6 * (new.outlier_share - old.outlier_share):+.0f}ppm",
        )
    parts: list[RenderableType] = [head]
    if changed:
        parts += [Text(), table]
    if len(by_change) > _N_CHANGED:
        parts.append(Text(f"and {len(by_change) - _N_CHANGED} more (--json has all)"))
    return Group(*parts)


def diff_values(a: Scan, b: Scan) -> dict[str, dict[str, float | bool | None]]:
    """Each tensor's differences B - A, by its name; None where one has it not."""
    first = {tensor.name: tensor for tensor in a.tensors}
    second = {tensor.name: tensor for tensor in b.tensors}
    result: dict[str, dict[str, float | bool | None]] = {}
    for name in sorted(first.keys() | second.keys()):
        old, new = first.get(name), second.get(name)
        result[name] = {
            "in_a": old is not None,
            "in_b": new is not None,
            "same_weights": _weights(old) == _weights(new) if old and new else None,
            **{
                f"{key}_difference": None
                if not (old and new)
                else getattr(new, key) - getattr(old, key)
                for key in ("softmax_entropy_nats", "histogram_entropy_bits", "std")
            },
        }
    return result


def _weights(tensor: TensorScan) -> tuple[object, ...]:
    return (tensor.shape, tensor.dtype, tensor.weights_crc32)


def _mean_by_weights(
    tensors: Sequence[TensorScan], value: Callable[[TensorScan], float | None]
) -> float | None:
    """Mean over the weights of the tensors that have the value."""
    pairs = [(t.n_weights, v) for t in tensors if (v := value(t)) is not None]
    total = sum(n for n, _ in pairs)
    return fsum(n * v for n, v in pairs) / total if total else None


def _z_text(value: float, values: Sequence[float]) -> str:
    mean = fsum(values) / len(values)
    std = sqrt(fsum((v - mean) ** 2 for v in values) / len(values))
    return f"{(value - mean) / std:+.2f}" if std else "-"


def _share(value: float, values: Sequence[float]) -> float:
    low, high = min(values), max(values)
    return (value - low) / (high - low) if high > low else 1.0

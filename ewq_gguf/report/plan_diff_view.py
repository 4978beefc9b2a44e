"""Two plans side by side in 80 columns: what changes, where, and how many bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ewq_gguf.errors import InputError, printable
from ewq_gguf.plan.naming import plan_label
from ewq_gguf.records import Plan, PlanTensor
from ewq_gguf.report.text import Column, Map, in_order, short_role, type_style

#: A tensor of A and of B; one that a plan lacks is None.
Pair = tuple[PlanTensor | None, PlanTensor | None]
_N_SHOWN = 3


def plan_diff_view(a: Plan, b: Plan) -> RenderableType:
    """The totals, the changes by pair of types, and a layer x role map of changes.

    Raises:
        InputError: the plans are of models that cannot be compared.
    """
    pairs = _pairs(a, b)
    changed = [pair for pair in pairs.values() if _type(pair[0]) != _type(pair[1])]
    parts: list[RenderableType] = [_head(a, b, pairs, changed)]
    if changed:
        parts += [Text(), _type_changes(changed)]
    if any(_any(pair).layer_idx is not None for pair in changed):
        parts += [Text(), _map(pairs.values())]
    if outside := [pair for pair in changed if _any(pair).layer_idx is None]:
        parts += [Text(), _outside(outside)]
    return Group(*parts)


def plan_diff_values(a: Plan, b: Plan) -> dict[str, Any]:
    """The same as values: totals, and each changed layer and tensor by its name.

    Bytes are B's less A's; a type is None where a plan lacks the tensor.

    Raises:
        InputError: the plans are of models that cannot be compared.
    """
    pairs = _pairs(a, b)
    changed = {n: p for n, p in pairs.items() if _type(p[0]) != _type(p[1])}
    layers: dict[str, int] = defaultdict(int)
    for pair in changed.values():
        if (idx := _any(pair).layer_idx) is not None:
            layers[str(idx)] += _gain(pair)
    return {
        **{
            which: {
                "model": plan.model.name,
                "policy": plan_label(plan),
                "sha256": plan.sha256,
                "file_size_bytes": plan.totals.file_size_bytes,
                "bpw": plan.totals.bpw,
            }
            for which, plan in (("a", a), ("b", b))
        },
        "file_size_bytes_difference": b.totals.file_size_bytes
        - a.totals.file_size_bytes,
        "layers": {idx: {"size_bytes_difference": n} for idx, n in layers.items()},
        "tensors": {
            name: {
                "a": _type(pair[0]),
                "b": _type(pair[1]),
                "size_bytes_difference": _gain(pair),
            }
            for name, pair in changed.items()
        },
    }


def _pairs(a: Plan, b: Plan) -> dict[str, Pair]:
    """Each tensor of either plan, by name.

    Raises:
        InputError: no name is in both, or a shape differs.
    """
    first = {tensor.name: tensor for tensor in a.tensors}
    second = {tensor.name: tensor for tensor in b.tensors}
    wrong = next(
        (n for n in first if n in second and first[n].shape != second[n].shape), None
    )
    if wrong or not first.keys() & second.keys():
        problem = (
            f"{wrong} has shape {first[wrong].shape} in A and {second[wrong].shape} "
            "in B"
            if wrong
            else "has no tensor in common with B"
        )
        raise InputError(
            "plan", a.model.name, problem, "give two plans of the same model"
        )
    return {name: (first.get(name), second.get(name)) for name in first | second}


def _any(pair: Pair) -> PlanTensor:
    tensor = pair[0] or pair[1]
    assert tensor is not None
    return tensor


def _type(tensor: PlanTensor | None) -> str | None:
    return tensor.written_type if tensor else None


def _gain(pair: Pair) -> int:
    """Bytes that B's tensor has more than A's."""
    a, b = (tensor.size_bytes if tensor else 0 for tensor in pair)
    return b - a


def _head(a: Plan, b: Plan, pairs: dict[str, Pair], changed: Sequence[Pair]) -> Table:
    table = Table.grid(padding=(0, 2))
    for which, plan in (("A", a), ("B", b)):
        label = f"{plan.model.name}, {plan_label(plan)}"
        table.add_row(which, Text(printable(label)))
        table.add_row(
            "",
            f"{plan.totals.file_size_bytes:,} bytes, {plan.totals.bpw:.3f} bits per "
            f"weight{' (estimate)' if plan.totals.is_estimate else ''}",
        )
    gain = b.totals.file_size_bytes - a.totals.file_size_bytes
    table.add_row(
        "B - A",
        f"{gain:+,} bytes ({gain / a.totals.file_size_bytes:+.1%}), "
        f"{b.totals.bpw - a.totals.bpw:+.3f} bits per weight",
    )
    layers, of = (
        {_any(pair).layer_idx for pair in some} - {None}
        for some in (changed, pairs.values())
    )
    table.add_row(
        "changed",
        f"{len(changed)} of {len(pairs)} tensors, in {len(layers)} of {len(of)} layers",
    )
    for which, side in (("A", 1), ("B", 0)):
        if only := [name for name, pair in pairs.items() if pair[side] is None]:
            more = ", ..." if len(only) > _N_SHOWN else ""
            shown = ", ".join(map(printable, only[:_N_SHOWN])) + more
            table.add_row(f"only in {which}", Text(f"{len(only)} tensors: {shown}"))
    return table


def _type_changes(changed: Iterable[Pair]) -> Table:
    """One row per pair of types, most bytes first."""
    by_types: dict[str, list[Pair]] = defaultdict(list)
    for pair in changed:
        by_types[_cell(pair).plain].append(pair)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("A>B")
    table.add_column("tensors", justify="right")
    table.add_column("MB", justify="right")
    table.add_column("roles")
    gains = {types: sum(map(_gain, pairs)) for types, pairs in by_types.items()}
    for types in sorted(by_types, key=lambda types: (-abs(gains[types]), types)):
        pairs = by_types[types]
        roles = in_order({_any(pair).role for pair in pairs})
        table.add_row(
            _cell(pairs[0]),
            str(len(pairs)),
            _megabytes(gains[types]),
            Text(printable(" ".join(map(short_role, roles)))),
        )
    return table


def _map(pairs: Iterable[Pair]) -> Map:
    """One row per layer that changes; the others are folded.

    Roles that change alike in every layer share a column.
    """
    layers: dict[int, dict[str, Pair]] = defaultdict(dict)
    for pair in pairs:
        tensor = _any(pair)
        if tensor.layer_idx is not None and tensor.is_quantizable:
            layers[tensor.layer_idx][tensor.role] = pair
    names: list[str] = []
    rows: list[dict[str, Pair]] = []
    for same, run in groupby(sorted(layers), lambda idx: _is_same(layers[idx])):
        indices = list(run)
        if same:
            last = f"-{indices[-1]}" if len(indices) > 1 else ""
            names.append(f"{indices[0]}{last}")
            rows.append({})
        else:
            names += map(str, indices)
            rows += [layers[idx] for idx in indices]
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for role in in_order({role for row in rows for role in row}):
        alike[tuple(_layer_cell(row, role).plain for row in rows)].append(role)
    lead = [
        Column("layer", [Text(name) for name in names], is_number=True),
        Column(
            "MB",
            [Text(_megabytes(sum(map(_gain, row.values())))) for row in rows],
            is_number=True,
        ),
    ]
    return Map(
        lead,
        [
            Column(
                " ".join(map(short_role, roles)),
                [_layer_cell(row, roles[0]) for row in rows],
            )
            for roles in alike.values()
        ],
    )


def _is_same(layer: Mapping[str, Pair]) -> bool:
    return all(_type(a) == _type(b) for a, b in layer.values())


def _layer_cell(layer: Mapping[str, Pair], role: str) -> Text:
    """Cell of a layer's role: `=` without a change, `-` without such a role."""
    pair = layer.get(role)
    if pair is None and layer:
        return Text("-", style="dim")
    if pair is None or _type(pair[0]) == _type(pair[1]):
        return Text("=", style="dim")
    return _cell(pair)


def _cell(pair: Pair) -> Text:
    """`Q4_K>Q8_0`: A's type and B's."""
    a, b = (_type(tensor) or "none" for tensor in pair)
    style = type_style(b) if b != "none" else ""
    return Text(f"{a}>{b}", style=f"bold {style}".strip())


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:+,.2f}" if n_bytes else "0"


def _outside(pairs: Iterable[Pair]) -> Table:
    table = Table.grid(padding=(0, 2))
    for pair in pairs:
        table.add_row(
            Text(printable(_any(pair).name)),
            _cell(pair),
            f"{_megabytes(_gain(pair))} MB",
        )
    return table

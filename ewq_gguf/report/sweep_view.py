"""Plans of one factor after another, a line each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ewq_gguf.ggml_types import bits_per_weight
from ewq_gguf.plan.naming import nearest_preset
from ewq_gguf.records import EwqPolicy, Plan


def sweep_rows(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Values for --json: factor, layers (or tensors) by type, bytes and bits."""
    return [
        {
            "factor": _policy(plan).factor,
            "counts": dict(_counts(plan)),
            "file_size_bytes": plan.totals.file_size_bytes,
            "is_estimate": plan.totals.is_estimate,
            "bpw": plan.totals.bpw,
        }
        for plan in plans
    ]


def sweep_view(plans: Sequence[Plan], presets: Mapping[str, int]) -> RenderableType:
    """A table; neighbouring factors that plan the same share a line.

    Args:
        plans: plans of policy `ewq` that differ in the factor only.
        presets: file sizes of the standard presets, by name; may be empty.
    """
    types = sorted(set().union(*map(_counts, plans)), key=lambda t: -bits_per_weight(t))
    largest = max(plan.totals.file_size_bytes for plan in plans)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("factor", justify="right")
    for name in types:
        table.add_column(name, justify="right")
    for name in ("MB", "bpw", ""):
        table.add_column(name, justify="right" if name else "left")
    if presets:
        table.add_column("nearest preset")
    for _, run in groupby(plans, key=lambda p: [t.ggml_type for t in p.tensors]):
        alike = list(run)
        plan, counts = alike[0], _counts(alike[0])
        size = plan.totals.file_size_bytes
        factors = dict.fromkeys(f"{_policy(p).factor:g}" for p in (plan, alike[-1]))
        table.add_row(
            " - ".join(factors),
            *(str(counts[name] or "·") for name in types),
            f"{size / 1e6:,.1f}",
            f"{plan.totals.bpw:.3f}",
            Text("█" * round(16 * size / largest)),
            *([nearest_preset(size, presets)] if presets else []),
        )
    unit = "tensors" if _policy(plans[0]).granularity == "tensor" else "layers"
    is_estimate = plans[0].totals.is_estimate
    end = "; sizes are estimates: the header is not known" if is_estimate else ""
    return Group(table, Text(f"{unit} of each type{end}"))


def _policy(plan: Plan) -> EwqPolicy:
    assert isinstance(plan.policy, EwqPolicy)
    return plan.policy


def _counts(plan: Plan) -> Counter[str]:
    if _policy(plan).granularity == "tensor":
        return Counter(
            tensor.ggml_type
            for tensor in plan.tensors
            if tensor.layer_idx is not None and tensor.is_quantizable
        )
    return Counter(layer.ggml_type for layer in plan.layers if layer.ggml_type)

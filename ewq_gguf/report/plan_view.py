"""A plan in 80 columns: its decision, and a layer x role map in colour."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import prod

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ewq_gguf.errors import printable
from ewq_gguf.ggml_types import TERNARY_TYPES, bits_per_weight
from ewq_gguf.plan.ewq import z_score
from ewq_gguf.plan.grammar import describe
from ewq_gguf.records import (
    Budget,
    EwqPolicy,
    FastEwqPolicy,
    Imatrix,
    ImportedPolicy,
    Plan,
    PlanTensor,
)
from ewq_gguf.report.placement_view import placement_view
from ewq_gguf.report.search_view import search_view
from ewq_gguf.report.text import (
    Column,
    Map,
    in_order,
    short_role,
    type_style,
)
from ewq_gguf.size_text import size_text


def plan_view(plan: Plan) -> RenderableType:
    """The whole view, for a rich console."""
    note_lines = [Text(f"note: {line}") for line in notes(plan)]
    below = []
    if plan.search:
        below += [Text(), search_view(plan.search)]
    if plan.placement:
        below += [Text(), placement_view(plan.placement)]
    return Group(
        _head(plan),
        *note_lines,
        Text(),
        _layer_map(plan),
        Text(),
        _other(plan),
        *below,
    )


def layer_counts(plan: Plan) -> str:
    """`27 BF16 · 2 Q8_0 · 1 Q4_K`: layers by type, most bits first."""
    counts = Counter(layer.ggml_type or "mixed" for layer in plan.layers)
    return " · ".join(f"{counts[name]} {name}" for name in sorted(counts, key=_rank))


def _rank(name: str) -> tuple[float, str]:
    return (1.0 if name == "mixed" else -bits_per_weight(name), name)


def fallback_lines(plan: Plan) -> list[str]:
    """A line for each type that llama-quantize replaces, for rows of odd lengths."""
    weights: Counter[tuple[str, str, int]] = Counter()
    for t in plan.tensors:
        if t.ggml_type != t.written_type:
            weights[t.ggml_type, t.written_type, t.shape[-1]] += prod(t.shape)
    return [
        f"{ggml_type} on rows of {columns} becomes {written}: "
        f"{n / plan.totals.n_weights:.0%} of the weights"
        for (ggml_type, written, columns), n in weights.most_common()
    ]


def notes(plan: Plan) -> list[str]:
    """Notes on what the plan does and cannot promise."""
    policy, lines = plan.policy, []
    exact = sum(tensor.is_exact for tensor in plan.tensors)
    if exact:
        count = sum(tensor.is_quantizable for tensor in plan.tensors)
        lines.append(
            f"{exact} of {count} matrices are quantised already, in values of the type "
            "that they get: nothing of them is lost"
        )
    if any(t.is_exact and t.written_type in TERNARY_TYPES for t in plan.tensors):
        lines.append(
            "llama.cpp has no CUDA kernels for TQ1_0 and TQ2_0: there the CPU computes "
            "these matrices (--no-lattice plans them like any others)"
        )
    types = {t.ggml_type for t in plan.tensors if t.is_quantizable and not t.is_exact}
    if ternary := types & TERNARY_TYPES:
        lines.append(
            f"{' and '.join(sorted(ternary))} is for weights trained to be ternary; "
            "others lose nearly all of their information in it"
        )
    if isinstance(policy, EwqPolicy) and policy.granularity == "tensor":
        lines.append(
            "tensors are compared within their role only: across roles entropy ranks "
            "them by size and shape"
        )
    if isinstance(policy, FastEwqPolicy):
        lines.append(
            "the layers were chosen by a classifier that saw none of these weights; "
            "`ewq fastewq evaluate` says how well it generalises"
        )
    if isinstance(policy, ImportedPolicy):
        lines.append("the types were imported; ewq has decided nothing here")
    return lines


def _head(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
    totals, policy = plan.totals, plan.policy
    table.add_row("model", Text(printable(plan.model.name)))
    table.add_row("policy", Text(printable(describe(policy))))
    if (limits := plan.thresholds.get("layer")) and isinstance(policy, EwqPolicy):
        unit = "nats" if policy.measure == "softmax" else "bits"
        high = f", 75th percentile {limits.high:.9g}" if policy.rule == "q75" else ""
        table.add_row(
            "decision",
            f"mu {limits.mean:.9g}, sigma {limits.std:.3g}, "
            f"mu - {policy.factor:g} sigma {limits.low:.9g}{high} {unit}",
        )
    if plan.layers:
        table.add_row("layers", layer_counts(plan))
    if plan.imatrix is not None:
        table.add_row("imatrix", Text(_imatrix_text(plan.imatrix)))
    if plan.budget is not None:
        table.add_row("budget", Text(_budget_text(plan, plan.budget)))
    estimate = " (estimate: header not known)" if totals.is_estimate else ""
    table.add_row(
        "file",
        f"{totals.file_size_bytes:,} bytes, {totals.bpw:.3f} bits per weight{estimate}",
    )
    return table


def _imatrix_text(imatrix: Imatrix) -> str:
    name, text = printable(imatrix.file_name), printable(imatrix.dataset or "no name")
    return (
        f"{name}, {imatrix.n_entries} tensors, {imatrix.n_chunks} chunks of {text}, "
        f"SHA-256 {printable(imatrix.file_sha256[:12])}"
    )


def _budget_text(plan: Plan, budget: Budget) -> str:
    gap = budget.limit_bytes - plan.totals.file_size_bytes
    steps = {
        None: "filled by a search",
        1: "everything fits unquantised",
        2: f"the decision fits, {budget.n_steps} steps up",
        3: f"started from {budget.start}, {budget.n_steps} steps",
        4: f"started from {budget.start}, {budget.n_steps} steps below the ladder",
    }[budget.case]
    context = (
        f" beside {budget.context_bytes:,} for {budget.n_ctx} tokens of context"
        if budget.context_bytes is not None
        else ""
    )
    # On a cluster, the table of machines shows how full each one is.
    unused = "" if plan.placement else f", {gap:,} unused"
    return f"{budget.asked}, {budget.limit_bytes:,} bytes{context}{unused}: {steps}"


def _layer_map(plan: Plan) -> Map:
    """One row per layer; z is how many sigmas its entropy lies from the mean."""
    members: dict[int, dict[str, PlanTensor]] = defaultdict(dict)
    for tensor in plan.tensors:
        if tensor.layer_idx is not None and tensor.is_quantizable:
            members[tensor.layer_idx][tensor.role] = tensor
    layers = sorted(members)
    entropies = {layer.layer_idx: layer.entropy for layer in plan.layers}
    sizes = (sum(t.size_bytes for t in members[idx].values()) for idx in layers)
    lead = [Column("layer", [Text(str(idx)) for idx in layers], is_number=True)]
    if "layer" in plan.thresholds:
        zs = [Text(_z_text(plan, entropies.get(idx))) for idx in layers]
        lead.append(Column("z", zs, is_number=True))
    columns = [
        Column(short_role(role), [_type_text(members[i].get(role)) for i in layers])
        for role in in_order({role for layer in members.values() for role in layer})
    ]
    megabytes = [Text(f"{size / 1e6:.2f}") for size in sizes]
    return Map(lead, [*columns, Column("MB", megabytes, is_number=True)])


def _z_text(plan: Plan, entropy: float | None) -> str:
    limits = plan.thresholds.get("layer")
    if entropy is None or limits is None or limits.std == 0:
        return "-"
    return f"{z_score(entropy, limits):+.2f}"


def _type_text(tensor: PlanTensor | None) -> Text:
    if tensor is None:
        return Text("-")
    return Text(tensor.written_type, style=type_style(tensor.written_type))


def _other(plan: Plan) -> Table:
    """The tensors outside the layers, and the small ones together."""
    table = Table.grid(padding=(0, 2))
    small = [tensor for tensor in plan.tensors if not tensor.is_quantizable]
    for tensor in plan.tensors:
        if tensor.layer_idx is None and tensor.is_quantizable:
            table.add_row(
                Text(printable(tensor.name)),
                _type_text(tensor),
                size_text(tensor.size_bytes),
            )
    if small:
        table.add_row(
            f"{len(small)} norms and other tensors llama-quantize leaves alone",
            " ".join(sorted({tensor.written_type for tensor in small})),
            size_text(sum(tensor.size_bytes for tensor in small)),
        )
    for line in fallback_lines(plan):
        table.add_row(line)
    return table

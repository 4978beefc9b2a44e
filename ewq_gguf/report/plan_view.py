"""A plan in 80 columns: what was decided, and a layer x role map in colour."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import prod

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ewq_gguf.errors import printable
from ewq_gguf.ggml_types import bits_per_weight
from ewq_gguf.plan.ewq import z_score
from ewq_gguf.records import (
    Budget,
    EwqPolicy,
    FastEwqPolicy,
    ImportedPolicy,
    Plan,
    PlanTensor,
    UniformPolicy,
)
from ewq_gguf.report.placement_view import placement_view
from ewq_gguf.report.text import size_text, type_style

_SHORT = {
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o",
    "attn_qkv": "qkv", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
}  # fmt: skip


def plan_view(plan: Plan) -> RenderableType:
    """The whole view, for a rich console."""
    said = [Text(f"note: {line}") for line in notes(plan)]
    placed = [Text(), placement_view(plan.placement)] if plan.placement else []
    return Group(
        _head(plan), *said, Text(), _layer_map(plan), Text(), _other(plan), *placed
    )


def layer_counts(plan: Plan) -> str:
    """`27 BF16 · 2 Q8_0 · 1 Q4_K`: layers by type, most bits first."""
    counts = Counter(layer.ggml_type or "mixed" for layer in plan.layers)
    return " · ".join(f"{counts[name]} {name}" for name in sorted(counts, key=_rank))


def _rank(name: str) -> tuple[float, str]:
    return (1.0 if name == "mixed" else -bits_per_weight(name), name)


def fallback_lines(plan: Plan) -> list[str]:
    """What llama-quantize writes instead of a type that does not fit the rows."""
    weights: Counter[tuple[str, str, int]] = Counter()
    for t in plan.tensors:
        if t.ggml_type != t.written_type:
            weights[t.ggml_type, t.written_type, t.shape[-1]] += prod(t.shape)
    return [
        f"{asked} on rows of {columns} becomes {written}: "
        f"{n / plan.totals.n_weights:.0%} of the weights"
        for (asked, written, columns), n in weights.most_common()
    ]


def notes(plan: Plan) -> list[str]:
    """What a user should know of a plan before trusting it."""
    policy, lines = plan.policy, []
    types = {t.ggml_type for t in plan.tensors if t.is_quantizable}
    if ternary := types & {"TQ1_0", "TQ2_0"}:
        lines.append(
            f"{' and '.join(sorted(ternary))} is for weights trained to be ternary; "
            "others lose nearly all of their meaning in it"
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
    table.add_row("policy", Text(_policy_text(plan)))
    if (limits := plan.thresholds.get("layer")) and isinstance(policy, EwqPolicy):
        unit = "nats" if policy.measure == "softmax" else "bits"
        high = f", 75th percentile {limits.high:.9g}" if policy.rule == "q75" else ""
        table.add_row(
            "decision",
            f"mu {limits.mean:.9g}, sigma {limits.std:.3g}, "
            f"mu - {policy.factor:g} sigma {limits.low:.9g}{high} {unit}",
        )
    table.add_row("layers", layer_counts(plan))
    if plan.budget is not None:
        table.add_row("budget", Text(_budget_text(plan, plan.budget)))
    estimate = " (estimate: header not known)" if totals.is_estimate else ""
    table.add_row(
        "file",
        f"{totals.file_size_bytes:,} bytes, {totals.bpw:.3f} bits per weight{estimate}",
    )
    return table


def _budget_text(plan: Plan, budget: Budget) -> str:
    gap = budget.limit_bytes - plan.totals.file_size_bytes
    how = {
        1: "everything fits unquantised",
        2: f"the decision fits, {budget.n_steps} steps up",
        3: f"begun with {budget.start}, {budget.n_steps} steps",
        4: f"begun with {budget.start}, {budget.n_steps} steps below the ladder",
    }[budget.case]
    context = (
        f" beside {budget.context_bytes:,} for {budget.n_ctx} tokens of context"
        if budget.context_bytes is not None
        else ""
    )
    return (
        f"{budget.asked}, {budget.limit_bytes:,} bytes{context}, {gap:,} unused: {how}"
    )


def _policy_text(plan: Plan) -> str:
    policy = plan.policy
    if isinstance(policy, UniformPolicy):
        return f"uniform {policy.ggml_type}"
    if isinstance(policy, ImportedPolicy):
        return f"imported from {printable(policy.file_name)}"
    ladder = f"ladder {', '.join(policy.ladder)}"
    if isinstance(policy, FastEwqPolicy):
        return f"fastewq, variant {policy.variant}, {ladder}"
    measure = (
        f"softmax, epsilon {policy.epsilon:g}"
        if policy.measure == "softmax"
        else f"histogram, {policy.n_bins} bins"
    )
    by = ", by tensor" if policy.granularity == "tensor" else ""
    rule = f", rule {policy.rule}" if policy.rule != "mean" else ""
    return f"ewq, {measure}{rule}, factor {policy.factor:g}{by}, {ladder}"


def _layer_map(plan: Plan) -> Table:
    """One row per layer; z is how many sigmas its entropy lies from the mean."""
    members: dict[int, list[PlanTensor]] = defaultdict(list)
    for tensor in plan.tensors:
        if tensor.layer_idx is not None and tensor.is_quantizable:
            members[tensor.layer_idx].append(tensor)
    found = {tensor.role for tensors in members.values() for tensor in tensors}
    roles = sorted(found, key=lambda role: (_role_rank(role), role))
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("layer", justify="right")
    table.add_column("z", justify="right")
    for role in roles:
        table.add_column(_SHORT.get(role, role))
    table.add_column("MB", justify="right")
    entropies = {layer.layer_idx: layer.entropy for layer in plan.layers}
    for layer_idx in sorted(members):
        types = {tensor.role: tensor.written_type for tensor in members[layer_idx]}
        size = sum(tensor.size_bytes for tensor in members[layer_idx])
        table.add_row(
            str(layer_idx),
            _z_text(plan, entropies.get(layer_idx)),
            *(_type_text(types.get(role)) for role in roles),
            f"{size / 1e6:.2f}",
        )
    return table


def _role_rank(role: str) -> int:
    ranks = list(_SHORT)
    return ranks.index(role) if role in ranks else len(ranks)


def _z_text(plan: Plan, entropy: float | None) -> str:
    limits = plan.thresholds.get("layer")
    if entropy is None or limits is None or limits.std == 0:
        return "-"
    return f"{z_score(entropy, limits):+.2f}"


def _type_text(ggml_type: str | None) -> Text:
    if ggml_type is None:
        return Text("-")
    return Text(ggml_type, style=type_style(ggml_type))


def _other(plan: Plan) -> Table:
    """The tensors outside the layers, and the small ones together."""
    table = Table.grid(padding=(0, 2))
    small = [tensor for tensor in plan.tensors if not tensor.is_quantizable]
    for tensor in plan.tensors:
        if tensor.layer_idx is None and tensor.is_quantizable:
            table.add_row(
                Text(tensor.name),
                _type_text(tensor.written_type),
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

"""Short names of policies and plans, for files."""

from __future__ import annotations

from collections.abc import Mapping
from math import log

from ewq_gguf.records import (
    EwqPolicy,
    FastEwqPolicy,
    ImportedPolicy,
    Plan,
    Policy,
    UniformPolicy,
)


def plan_name(plan: Plan) -> str:
    """`NAME.POLICY`, without what is the policy's default."""
    bases = {t.base_type for t in plan.tensors if t.is_quantizable}
    parts = [policy_label(plan.policy)]
    if plan.budget is not None:
        asked, _, _ = plan.budget.asked.partition(" (")
        parts.append(f"budget-{asked.replace('%', 'pct').replace(' ', '')}")
    if plan.raw_type not in bases and "F32" not in bases:
        parts.append(f"raw-{plan.raw_type}")
    if plan.imatrix is not None:
        parts.append("imatrix")
    return f"{plan.model.name}.{'-'.join(parts)}"


def policy_label(policy: Policy) -> str:
    """What differs from the policy's defaults."""
    if isinstance(policy, ImportedPolicy):
        return f"imported-{policy.file_sha256[:8]}"
    if isinstance(policy, UniformPolicy):
        parts = [policy.name, policy.ggml_type]
    else:
        parts = [policy.name, *_own_parts(policy)]
        if policy.ladder != EwqPolicy().ladder:
            parts.append("-".join(policy.ladder))
    if policy.embedding_type != "auto":
        parts.append(f"embd-{policy.embedding_type}")
    if policy.output_type != "auto":
        parts.append(f"out-{policy.output_type}")
    return "-".join(parts)


def _own_parts(policy: EwqPolicy | FastEwqPolicy) -> list[str]:
    if isinstance(policy, FastEwqPolicy):
        variant = [] if policy.variant == "full" else [policy.variant]
        return [*variant, *([f"low{policy.n_low}"] if policy.n_low else [])]
    parts, standard = [], EwqPolicy()
    if policy.measure == "histogram":
        parts.append("histogram")
        if policy.n_bins != standard.n_bins:
            parts.append(f"bins{policy.n_bins}")
    elif policy.epsilon != standard.epsilon:
        parts.append(f"eps{policy.epsilon:g}")
    if policy.rule != standard.rule:
        parts.append(policy.rule)
    if policy.granularity != standard.granularity:
        parts.append(policy.granularity)
    if policy.factor != standard.factor:
        parts.append(f"x{policy.factor:g}")
    return parts


def nearest_preset(size_bytes: int, presets: Mapping[str, int]) -> str:
    """The preset whose size is nearest, by ratio."""
    return min(presets, key=lambda name: abs(log(presets[name] / size_bytes)))

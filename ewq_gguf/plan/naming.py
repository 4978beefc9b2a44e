"""Short names of policies and plans, for files."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from zlib import crc32

from ewq_gguf.records import (
    Budget,
    ControlPolicy,
    EwqPolicy,
    FastEwqPolicy,
    ImportedPolicy,
    OptimalPolicy,
    Plan,
    Policy,
    PresetPolicy,
    ProbePolicy,
    UniformPolicy,
)


def plan_name(plan: Plan) -> str:
    """`NAME.POLICY`, for files."""
    return f"{plan.model.name}.{plan_label(plan)}"


def plan_label(plan: Plan) -> str:
    """The policy and the budget, without what is their default."""
    bases = {t.base_type for t in plan.tensors if t.is_quantizable}
    parts = [_policy_label(plan.policy)]
    if plan.budget is not None:
        parts.append(_budget_label(plan, plan.budget))
    if plan.raw_type not in bases and "F32" not in bases:
        parts.append(f"raw-{plan.raw_type}")
    if plan.imatrix is not None:
        parts.append("imatrix")
    if plan.totals.is_estimate:
        parts.append("estimate")
    return "-".join(parts)


def _budget_label(plan: Plan, budget: Budget) -> str:
    asked = budget.asked.partition(" (")[0].replace("%", "pct").replace(" ", "")
    if budget.n_ctx is None:
        return f"budget-{asked}"
    # What else it depends on: the devices or machines, and the context.
    machines = plan.placement.machines if plan.placement else ()
    key = repr((budget.asked, budget.n_ctx, machines)).encode()
    return f"budget-{asked}-{crc32(key):08x}"


def _policy_label(policy: Policy) -> str:
    """What differs from the policy's defaults."""
    if isinstance(policy, ImportedPolicy):
        return f"imported-{policy.file_sha256[:8]}"
    if isinstance(policy, PresetPolicy):
        return policy.preset
    if isinstance(policy, ProbePolicy):
        return f"probe-{policy.part.replace(' ', '')}-{policy.ggml_type}"
    if isinstance(policy, ControlPolicy):
        seed = "" if policy.seed is None else str(policy.seed)
        return f"control-{policy.order}{seed}-{policy.plan_sha256[:8]}"
    if isinstance(policy, OptimalPolicy):
        return _optimal_label(policy)
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


def _optimal_label(policy: OptimalPolicy) -> str:
    """The name, and a mark of other parameters: they may be many."""
    if policy == OptimalPolicy():
        return policy.name
    return f"{policy.name}-{crc32(policy.model_dump_json().encode()):08x}"


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

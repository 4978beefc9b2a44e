"""Short names of policies and plans, for files."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from zlib import crc32

from ewq_gguf.plan.grammar import label
from ewq_gguf.records import Budget, Plan


def plan_name(plan: Plan) -> str:
    """`NAME.POLICY`, for files."""
    return f"{plan.model.name}.{plan_label(plan)}"


def plan_label(plan: Plan) -> str:
    """The policy and the budget, without what is their default."""
    bases = {t.base_type for t in plan.tensors if t.is_quantizable}
    parts = [label(plan.policy)]
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


def nearest_preset(size_bytes: int, presets: Mapping[str, int]) -> str:
    """The preset whose size is nearest, by ratio."""
    return min(presets, key=lambda name: abs(log(presets[name] / size_bytes)))

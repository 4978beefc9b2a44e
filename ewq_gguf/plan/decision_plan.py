"""From a policy's decision to a plan, within a size target where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ewq_gguf.errors import InputError
from ewq_gguf.ggml_types import tensor_bytes
from ewq_gguf.plan.assemble import assemble, header_of
from ewq_gguf.plan.budget import fit_types, group_bytes
from ewq_gguf.plan.groups import AllocationGroup, Decision
from ewq_gguf.plan.lattice import Lattices
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.plan.size_target import SizeTarget
from ewq_gguf.plan.sizes import padded
from ewq_gguf.records import Budget, EwqPolicy, FastEwqPolicy, Plan, PlanLayer


def plan_of_decision(
    model: ModelTensors,
    policy: EwqPolicy | FastEwqPolicy,
    decision: Decision,
    target: SizeTarget | None,
) -> Plan:
    """Give every tensor its type, as decided or as the size target allows.

    Tensors that are quantised already keep their values first, and the target is for
    the rest; where the rest would then be demoted below the ladder, all are fitted
    alike.

    Args:
        model: tensors of the model that is planned.
        policy: policy that decided.
        decision: a rung of the ladder for each group of tensors.
        target: size that the file may have; None for any.

    Raises:
        InputError: no file is as small.
    """
    if target is not None and model.lattices:
        try:
            plan = _plan_with(model, policy, decision, target, model.lattices)
        except InputError:
            pass  # the tensors that keep their values alone are too large
        else:
            if plan.budget is not None and plan.budget.case != 4:
                return plan
    return _plan_with(model, policy, decision, target, {})


def _plan_with(
    model: ModelTensors,
    policy: EwqPolicy | FastEwqPolicy,
    decision: Decision,
    target: SizeTarget | None,
    kept: Lattices,
) -> Plan:
    """The plan where some tensors keep their values, whatever else is decided."""
    raw = model.raw_type
    groups = [
        replace(group, fixed=group.fixed and model.plain(group.fixed))
        for group in decision.groups
    ]
    ladder = [model.plain(name) for name in policy.ladder]
    decided = [raw if group.rung is None else ladder[group.rung] for group in groups]
    types = [group.fixed or name for group, name in zip(groups, decided, strict=True)]
    budget = None
    if target is not None:
        types, budget = _types_within(model, policy, groups, target, kept)
    types_by_tensor = {
        tensor.name: name
        for group, name in zip(groups, types, strict=True)
        for tensor in group.tensors
    } | {name: exact[0] for name, exact in kept.items()}
    by_tensor = isinstance(policy, EwqPolicy) and policy.granularity == "tensor"
    return assemble(
        model,
        policy,
        types_by_tensor,
        layers=[
            PlanLayer(
                layer_idx=group.key,
                entropy=group.entropy,
                decision=decision_type,
                ggml_type=name,
            )
            for group, decision_type, name in zip(groups, decided, types, strict=True)
            if isinstance(group.key, int)
        ],
        thresholds=decision.thresholds,
        entropies={str(g.key): g.entropy for g in groups} if by_tensor else {},
        budget=budget,
    )


def _types_within(
    model: ModelTensors,
    policy: EwqPolicy | FastEwqPolicy,
    groups: Sequence[AllocationGroup],
    target: SizeTarget,
    kept: Lattices,
) -> tuple[list[str], Budget]:
    """Each group's type within a target; kept tensors count with their own bytes."""
    groups = [
        replace(group, tensors=tuple(t for t in group.tensors if t.name not in kept))
        for group in groups
    ]
    in_groups = {tensor.name for group in groups for tensor in group.tensors}
    other_bytes = (header_of(model) or 0) + sum(
        padded(
            tensor_bytes(kept.get(tensor.name, (tensor.ggml_type,))[0], tensor.shape)
        )
        for tensor in model.tensors
        if tensor.name not in in_groups
    )
    raw_bytes = sum(group_bytes(group.tensors, model.raw_type) for group in groups)
    limit = target.limit(other_bytes + raw_bytes, model.tensors)
    fitted = fit_types(
        groups,
        [model.plain(name) for name in policy.ladder],
        model.raw_type,
        limit,
        other_bytes=other_bytes,
        demote_decision=isinstance(policy, FastEwqPolicy),
        entries=model.importance.n_values.keys() if model.importance else None,
    )
    file_bytes = other_bytes + sum(
        group_bytes(group.tensors, name)
        for group, name in zip(groups, fitted.types, strict=True)
    )
    return list(fitted.types), Budget(
        asked=limit.asked,
        # More than raw takes is left out: it varies from one minute to the next.
        limit_bytes=file_bytes if fitted.case == 1 else limit.n_bytes,
        case=fitted.case,
        start=fitted.start,
        n_steps=fitted.n_steps,
        n_ctx=limit.n_ctx,
        context_bytes=limit.context_bytes,
    )

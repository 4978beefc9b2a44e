"""From a scan and a policy to a plan with every tensor's type and the file's bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from ewq_gguf.errors import InputError
from ewq_gguf.ggml_types import tensor_bytes
from ewq_gguf.plan.assemble import assemble, header_of
from ewq_gguf.plan.budget import fit, group_bytes
from ewq_gguf.plan.groups import AllocationGroup, Decision, decide_ewq, decide_fast
from ewq_gguf.plan.importance import Importance
from ewq_gguf.plan.lattice import Lattices, lattices_of
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.plan.policy import check_policy
from ewq_gguf.plan.size_target import SizeTarget
from ewq_gguf.plan.sizes import padded
from ewq_gguf.records import (
    Budget,
    EwqPolicy,
    FastEwqPolicy,
    Layout,
    Plan,
    PlanLayer,
    Scan,
    UniformPolicy,
)
from ewq_gguf.rpc.placement import can_place, place
from ewq_gguf.tensor_names import layer_idx


def make_plan(
    scan: Scan,
    policy: EwqPolicy | UniformPolicy,
    layout: Layout | None = None,
    *,
    raw_type: str = "auto",
    budget: SizeTarget | None = None,
    importance: Importance | None = None,
    keep_lattice: bool = True,
) -> Plan:
    """Plan every tensor of the file and predict its size.

    Args:
        scan: of the checkpoint.
        policy: with every parameter.
        layout: the converter's; without it the size is an estimate.
        raw_type: what `raw` means: `F16`, `BF16`, or `auto` for the source's own.
        budget: what the file may take; only of policy `ewq`.
        importance: the matrix the file is made with.
        keep_lattice: what is quantised already keeps its values.

    Raises:
        UsageError: the policy names an unknown type or an impossible ladder.
        InputError: a type needs an importance matrix or an entry of it, the scan has
            other measures, or the budget cannot be met.
    """
    has_budget, has_imatrix = budget is not None, importance is not None
    check_policy(policy, has_budget=has_budget, has_imatrix=has_imatrix)
    model = ModelTensors.of_scan(scan, layout, raw_type)
    lattices = lattices_of(scan) if keep_lattice else {}
    model = replace(model, importance=importance, lattices=lattices)
    if isinstance(policy, UniformPolicy):
        wanted = model.plain(policy.ggml_type)
        layers = [
            PlanLayer(
                layer_idx=layer.layer_idx,
                entropy=None,
                decision=wanted,
                ggml_type=wanted,
            )
            for layer in scan.layers
        ]
        types = {
            tensor.name: model.plain(_uniform_type(policy, tensor.name))
            for tensor in model.tensors
        }
        return assemble(model, policy, types, layers=layers)
    _check_measures(scan, policy)
    return _planned(model, policy, decide_ewq(policy, scan, model.tensors), budget)


def _uniform_type(policy: UniformPolicy, name: str) -> str:
    """The type of a tensor; one outside the layers may have its own."""
    if layer_idx(name) is not None:
        return policy.ggml_type
    is_output = name == "output.weight"
    asked = policy.output_type if is_output else policy.embedding_type
    return policy.ggml_type if asked == "auto" else asked


def make_fast_plan(
    model: ModelTensors,
    policy: FastEwqPolicy,
    selected: Iterable[int],
    *,
    budget: SizeTarget | None = None,
) -> Plan:
    """Plan by the layers that a classifier selected; no weight has to be read.

    Args:
        model: Tensors of the model that is planned.
        policy: with every parameter.
        selected: layers to quantise.
        budget: what the file may take.

    Raises:
        UsageError, InputError: as of `make_plan`.
    """
    has_budget, has_imatrix = budget is not None, model.importance is not None
    check_policy(policy, has_budget=has_budget, has_imatrix=has_imatrix)
    decision = decide_fast(policy, selected, model.tensors)
    return _planned(model, policy, decision, budget)


def _planned(
    model: ModelTensors,
    policy: EwqPolicy | FastEwqPolicy,
    decision: Decision,
    ask: SizeTarget | None,
) -> Plan:
    """A decision's plan within a budget and, on a cluster, placed.

    Raises:
        InputError: the budget cannot be met, or nothing can be placed.
    """
    plan = _decided(model, policy, decision, ask)
    if ask is None or not ask.machines:
        return plan
    if not can_place(plan.tensors, ask.machines, ask.n_ctx):
        whole = plan.budget
        smaller = replace(ask, machines=(), may_exceed=True)
        plan = _placeable(
            lambda n: _decided(model, policy, decision, replace(smaller, n_bytes=n)),
            plan.totals.file_size_bytes,
            ask,
        )
        assert whole is not None
        assert plan.budget is not None
        kept = {"limit_bytes", "n_ctx", "context_bytes"}
        budget = plan.budget.model_copy(update=whole.model_dump(include=kept))
        plan = plan.model_copy(update={"budget": budget})
    placement = place(plan.tensors, ask.machines, ask.n_ctx)
    return plan.model_copy(update={"placement": placement})


def _placeable(plan_of: Callable[[int], Plan], too_large: int, ask: SizeTarget) -> Plan:
    """The largest plan that can be placed, to a 65 536th of its bytes.

    Together machines have room that no run of layers on each of them fills: halve what
    lies between a plan that can be placed and one that cannot.
    """
    small, best = 0, None
    while too_large - small > too_large >> 16:
        n_bytes = (small + too_large) // 2
        try:
            plan = plan_of(n_bytes)
        except InputError:  # less than the ladder reaches
            small = n_bytes
            continue
        if can_place(plan.tensors, ask.machines, ask.n_ctx):
            small, best = n_bytes, plan
        else:
            too_large = plan.totals.file_size_bytes
    if best is None:
        raise InputError(
            "plan",
            "--machine",
            f"not even {too_large:,} bytes can be placed on {ask.text} with "
            f"{ask.n_ctx} tokens of context",
            "give them more memory, or use more of them or a smaller --ctx",
        )
    return best


def _decided(
    model: ModelTensors,
    policy: EwqPolicy | FastEwqPolicy,
    decision: Decision,
    ask: SizeTarget | None,
) -> Plan:
    """A decision's plan, fitted to a budget if there is one.

    What is quantised already is exact first, and the budget is for the rest; where the
    rest would then be demoted below the ladder, all are fitted alike.
    """
    if ask is not None and model.lattices:
        try:
            plan = _fitted_plan(model, policy, decision, ask, model.lattices)
        except InputError:
            pass  # they alone take more than there is
        else:
            if plan.budget is not None and plan.budget.case != 4:
                return plan
    return _fitted_plan(model, policy, decision, ask, {})


def _fitted_plan(
    model: ModelTensors,
    policy: EwqPolicy | FastEwqPolicy,
    decision: Decision,
    ask: SizeTarget | None,
    kept: Lattices,
) -> Plan:
    """A decision's plan where some tensors are exact, whatever else is decided."""
    raw = model.raw_type
    groups = [
        replace(group, fixed=group.fixed and model.plain(group.fixed))
        for group in decision.groups
    ]
    ladder = [model.plain(name) for name in policy.ladder]
    decided = [raw if group.rung is None else ladder[group.rung] for group in groups]
    types = [group.fixed or name for group, name in zip(groups, decided, strict=True)]
    budget = None
    if ask is not None:
        types, budget = _fitted(model, policy, groups, ask, kept)
    asked = {
        tensor.name: name
        for group, name in zip(groups, types, strict=True)
        for tensor in group.tensors
    } | {name: types[0] for name, types in kept.items()}
    by_tensor = isinstance(policy, EwqPolicy) and policy.granularity == "tensor"
    entropies = {str(u.key): u.entropy for u in groups} if by_tensor else {}
    layers = [
        PlanLayer(
            layer_idx=group.key,
            entropy=group.entropy,
            decision=was,
            ggml_type=name,
        )
        for group, was, name in zip(groups, decided, types, strict=True)
        if isinstance(group.key, int)
    ]
    return assemble(
        model,
        policy,
        asked,
        layers=layers,
        thresholds=decision.thresholds,
        entropies=entropies,
        budget=budget,
    )


def _fitted(
    model: ModelTensors,
    policy: EwqPolicy | FastEwqPolicy,
    groups: Sequence[AllocationGroup],
    ask: SizeTarget,
    kept: Lattices,
) -> tuple[list[str], Budget]:
    """Each group's type under a budget; what is kept as it is takes its own bytes."""
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
    of_groups = sum(group_bytes(group.tensors, model.raw_type) for group in groups)
    limit = ask.limit(other_bytes + of_groups, model.tensors)
    fitted = fit(
        groups,
        [model.plain(name) for name in policy.ladder],
        model.raw_type,
        limit,
        other_bytes=other_bytes,
        demote_decision=isinstance(policy, FastEwqPolicy),
        entries=model.importance.n_values.keys() if model.importance else None,
    )
    of_file = other_bytes + sum(
        group_bytes(group.tensors, name)
        for group, name in zip(groups, fitted.types, strict=True)
    )
    return list(fitted.types), Budget(
        asked=limit.asked,
        # Room that nothing can fill is none: it varies from one minute to the next.
        limit_bytes=of_file if fitted.case == 1 else limit.n_bytes,
        case=fitted.case,
        start=fitted.start,
        n_steps=fitted.n_steps,
        n_ctx=limit.n_ctx,
        context_bytes=limit.context_bytes,
    )


def _check_measures(scan: Scan, policy: EwqPolicy) -> None:
    wrong = (
        f"epsilon {scan.measures.epsilon}, the policy {policy.epsilon}"
        if policy.measure == "softmax" and policy.epsilon != scan.measures.epsilon
        else f"{scan.measures.n_bins} bins, the policy {policy.n_bins}"
        if policy.measure == "histogram" and policy.n_bins != scan.measures.n_bins
        else None
    )
    if wrong:
        raise InputError(
            "plan",
            scan.model.name,
            f"the scan was measured with {wrong}",
            "scan again with the same",
        )

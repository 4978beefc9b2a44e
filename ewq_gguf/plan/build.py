"""From a scan and a policy to a plan with every tensor's type and the file's bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from ewq_gguf.errors import InputError
from ewq_gguf.ggml_types import tensor_bytes
from ewq_gguf.plan.ask import Ask
from ewq_gguf.plan.assemble import assemble, header_of
from ewq_gguf.plan.budget import fit, unit_bytes
from ewq_gguf.plan.importance import Importance
from ewq_gguf.plan.lattice import Lattices, lattices_of
from ewq_gguf.plan.policy import check_policy
from ewq_gguf.plan.sizes import padded
from ewq_gguf.plan.subject import Subject
from ewq_gguf.plan.units import Decision, Unit, decide_ewq, decide_fast
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
    budget: Ask | None = None,
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
    subject = Subject.of_scan(scan, layout, raw_type)
    lattices = lattices_of(scan) if keep_lattice else {}
    subject = replace(subject, importance=importance, lattices=lattices)
    if isinstance(policy, UniformPolicy):
        wanted = subject.plain(policy.ggml_type)
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
            tensor.name: subject.plain(_uniform_type(policy, tensor.name))
            for tensor in subject.tensors
        }
        return assemble(subject, policy, types, layers=layers)
    _check_measures(scan, policy)
    return _planned(subject, policy, decide_ewq(policy, scan, subject.tensors), budget)


def _uniform_type(policy: UniformPolicy, name: str) -> str:
    """The type of a tensor; one outside the layers may have its own."""
    if layer_idx(name) is not None:
        return policy.ggml_type
    is_output = name == "output.weight"
    asked = policy.output_type if is_output else policy.embedding_type
    return policy.ggml_type if asked == "auto" else asked


def make_fast_plan(
    subject: Subject,
    policy: FastEwqPolicy,
    selected: Iterable[int],
    *,
    budget: Ask | None = None,
) -> Plan:
    """Plan by the layers that a classifier selected; no weight has to be read.

    Args:
        subject: what is planned.
        policy: with every parameter.
        selected: layers to quantise.
        budget: what the file may take.

    Raises:
        UsageError, InputError: as of `make_plan`.
    """
    has_budget, has_imatrix = budget is not None, subject.importance is not None
    check_policy(policy, has_budget=has_budget, has_imatrix=has_imatrix)
    decision = decide_fast(policy, selected, subject.tensors)
    return _planned(subject, policy, decision, budget)


def _planned(
    subject: Subject,
    policy: EwqPolicy | FastEwqPolicy,
    decision: Decision,
    ask: Ask | None,
) -> Plan:
    """A decision's plan within a budget and, on a cluster, placed.

    Raises:
        InputError: the budget cannot be met, or nothing can be placed.
    """
    plan = _decided(subject, policy, decision, ask)
    if ask is None or not ask.machines:
        return plan
    if not can_place(plan.tensors, ask.machines, ask.n_ctx):
        whole = plan.budget
        smaller = replace(ask, machines=(), may_exceed=True)
        plan = _placeable(
            lambda n: _decided(subject, policy, decision, replace(smaller, n_bytes=n)),
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


def _placeable(plan_of: Callable[[int], Plan], too_large: int, ask: Ask) -> Plan:
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
    subject: Subject,
    policy: EwqPolicy | FastEwqPolicy,
    decision: Decision,
    ask: Ask | None,
) -> Plan:
    """A decision's plan, fitted to a budget if there is one.

    What is quantised already is exact first, and the budget is for the rest; where the
    rest would then be demoted below the ladder, all are fitted alike.
    """
    if ask is not None and subject.lattices:
        try:
            plan = _fitted_plan(subject, policy, decision, ask, subject.lattices)
        except InputError:
            pass  # they alone take more than there is
        else:
            if plan.budget is not None and plan.budget.case != 4:
                return plan
    return _fitted_plan(subject, policy, decision, ask, {})


def _fitted_plan(
    subject: Subject,
    policy: EwqPolicy | FastEwqPolicy,
    decision: Decision,
    ask: Ask | None,
    kept: Lattices,
) -> Plan:
    """A decision's plan where some tensors are exact, whatever else is decided."""
    raw = subject.raw_type
    units = [
        replace(unit, fixed=unit.fixed and subject.plain(unit.fixed))
        for unit in decision.units
    ]
    ladder = [subject.plain(name) for name in policy.ladder]
    decided = [raw if unit.rung is None else ladder[unit.rung] for unit in units]
    types = [unit.fixed or name for unit, name in zip(units, decided, strict=True)]
    budget = None
    if ask is not None:
        types, budget = _fitted(subject, policy, units, ask, kept)
    asked = {
        tensor.name: name
        for unit, name in zip(units, types, strict=True)
        for tensor in unit.tensors
    } | {name: types[0] for name, types in kept.items()}
    by_tensor = isinstance(policy, EwqPolicy) and policy.granularity == "tensor"
    entropies = {str(u.key): u.entropy for u in units} if by_tensor else {}
    layers = [
        PlanLayer(
            layer_idx=unit.key,
            entropy=unit.entropy,
            decision=was,
            ggml_type=name,
        )
        for unit, was, name in zip(units, decided, types, strict=True)
        if isinstance(unit.key, int)
    ]
    return assemble(
        subject,
        policy,
        asked,
        layers=layers,
        thresholds=decision.thresholds,
        entropies=entropies,
        budget=budget,
    )


def _fitted(
    subject: Subject,
    policy: EwqPolicy | FastEwqPolicy,
    units: Sequence[Unit],
    ask: Ask,
    kept: Lattices,
) -> tuple[list[str], Budget]:
    """Each unit's type under a budget; what is kept as it is takes its own bytes."""
    units = [
        replace(unit, tensors=tuple(t for t in unit.tensors if t.name not in kept))
        for unit in units
    ]
    in_units = {tensor.name for unit in units for tensor in unit.tensors}
    other_bytes = (header_of(subject) or 0) + sum(
        padded(
            tensor_bytes(kept.get(tensor.name, (tensor.ggml_type,))[0], tensor.shape)
        )
        for tensor in subject.tensors
        if tensor.name not in in_units
    )
    of_units = sum(unit_bytes(unit.tensors, subject.raw_type) for unit in units)
    limit = ask.limit(other_bytes + of_units, subject.tensors)
    fitted = fit(
        units,
        [subject.plain(name) for name in policy.ladder],
        subject.raw_type,
        limit,
        other_bytes=other_bytes,
        demote_decision=isinstance(policy, FastEwqPolicy),
        entries=subject.importance.n_values.keys() if subject.importance else None,
    )
    of_file = other_bytes + sum(
        unit_bytes(unit.tensors, name)
        for unit, name in zip(units, fitted.types, strict=True)
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

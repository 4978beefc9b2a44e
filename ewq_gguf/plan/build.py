"""From a scan and a policy to a plan with every tensor's type and the file's bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from ewq_gguf.errors import InputError
from ewq_gguf.plan.assemble import assemble
from ewq_gguf.plan.decision_plan import plan_of_decision
from ewq_gguf.plan.groups import Decision, decide_ewq, decide_fast
from ewq_gguf.plan.importance import Importance
from ewq_gguf.plan.lattice import lattices_of
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.plan.policy import check_policy
from ewq_gguf.plan.size_target import SizeTarget
from ewq_gguf.records import (
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
        scan: scan of the checkpoint.
        policy: policy with every parameter.
        layout: the converter's layout; without it the size is an estimate.
        raw_type: type that `raw` stands for: `F16`, `BF16`, or `auto` for the source's.
        budget: size that the file may have; only for policy `ewq`.
        importance: importance matrix that the file is made with.
        keep_lattice: whether weights that are quantised already keep their values.

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
        uniform = model.plain(policy.ggml_type)
        layers = [
            PlanLayer(
                layer_idx=layer.layer_idx,
                entropy=None,
                decision=uniform,
                ggml_type=uniform,
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
    own = policy.output_type if is_output else policy.embedding_type
    return policy.ggml_type if own == "auto" else own


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
        policy: policy with every parameter.
        selected: layers to quantise.
        budget: size that the file may have.

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
    target: SizeTarget | None,
) -> Plan:
    """The decision's plan within a target and, on a cluster, placed.

    Raises:
        InputError: no file is as small, or none can be placed.
    """
    plan = plan_of_decision(model, policy, decision, target)
    if target is None or not target.machines:
        return plan
    if not can_place(plan.tensors, target.machines, target.n_ctx):
        whole = plan.budget
        smaller = replace(target, machines=(), may_exceed=True)
        plan = _largest_placeable(
            lambda n: plan_of_decision(
                model, policy, decision, replace(smaller, n_bytes=n)
            ),
            plan.totals.file_size_bytes,
            target,
        )
        assert whole is not None
        assert plan.budget is not None
        kept = {"limit_bytes", "n_ctx", "context_bytes"}
        budget = plan.budget.model_copy(update=whole.model_dump(include=kept))
        plan = plan.model_copy(update={"budget": budget})
    placement = place(plan.tensors, target.machines, target.n_ctx)
    return plan.model_copy(update={"placement": placement})


def _largest_placeable(
    plan_of: Callable[[int], Plan], too_large: int, target: SizeTarget
) -> Plan:
    """The largest plan that can be placed, to a 65 536th of its bytes.

    Whole layers seldom fill each machine, so that the sum of the machines' memory is
    too much: a bisection between sizes that can be placed and sizes that cannot.
    """
    small, best = 0, None
    while too_large - small > too_large >> 16:
        n_bytes = (small + too_large) // 2
        try:
            plan = plan_of(n_bytes)
        except InputError:  # less than the ladder reaches
            small = n_bytes
            continue
        if can_place(plan.tensors, target.machines, target.n_ctx):
            small, best = n_bytes, plan
        else:
            too_large = plan.totals.file_size_bytes
    if best is None:
        raise InputError(
            "plan",
            "--machine",
            f"not even {too_large:,} bytes can be placed on {target.text} with "
            f"{target.n_ctx} tokens of context",
            "give them more memory, or use more of them or a smaller --ctx",
        )
    return best


def _check_measures(scan: Scan, policy: EwqPolicy) -> None:
    problem = (
        f"epsilon {scan.measures.epsilon}, the policy {policy.epsilon}"
        if policy.measure == "softmax" and policy.epsilon != scan.measures.epsilon
        else f"{scan.measures.n_bins} bins, the policy {policy.n_bins}"
        if policy.measure == "histogram" and policy.n_bins != scan.measures.n_bins
        else None
    )
    if problem:
        raise InputError(
            "plan",
            scan.model.name,
            f"the scan was measured with {problem}",
            "scan again with the same",
        )

"""Plans that no rule would make, to compare a rule's plan with.

A control has as many layers of each type as the plan it is a control of, dealt to other
layers. A probe quantises one part of the model and leaves the rest as it is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import factorial, prod

import numpy as np

from ewq_gguf.bench.statistics import spearman
from ewq_gguf.errors import UsageError
from ewq_gguf.experiments.study_record import StatisticCorrelation, StudyFile
from ewq_gguf.ggml_types import FLOAT_TYPES, bits_per_weight
from ewq_gguf.plan.assemble import ftype_of, layers_of, plan_tensor, totals_of
from ewq_gguf.records import (
    ControlPolicy,
    GivenPolicy,
    LayoutTensor,
    Plan,
    PlanTensor,
    ProbePolicy,
)

#: Parts that are no single layer and no role.
NOTHING, ALL_LAYERS = "nothing", "layers"
#: Type of the probe that bounds what the rounding of activations costs: it has that,
#: and as little of the weights' rounding as any type.
ROUNDING_TYPE = "Q8_0"


@dataclass(frozen=True)
class Probe:
    """One part of a model, quantised.

    Attributes:
        part: as of ProbePolicy.
        tensors: the tensors of that part.
        plan: a plan that quantises them and nothing else.
        role: their role, where the part is one.
    """

    part: str
    tensors: tuple[PlanTensor, ...]
    plan: Plan
    role: str | None = None


def retyped(plan: Plan, types: Mapping[str, str], policy: GivenPolicy) -> Plan:
    """A plan with other types for some tensors; its bytes are exact where they were.

    Args:
        plan: any; its budget and its machines are left behind.
        types: by tensor name; what is not named stays.
        policy: the policy that the new plan names.
    """
    tensors = tuple(
        plan_tensor(
            LayoutTensor(
                name=tensor.name, shape=tensor.shape, ggml_type=tensor.base_type
            ),
            types.get(tensor.name, tensor.ggml_type),
        )
        for tensor in plan.tensors
    )
    return plan.model_copy(
        update={
            "policy": policy,
            "ftype": ftype_of(tensors),
            "thresholds": {},
            "budget": None,
            "placement": None,
            "tensors": tensors,
            "layers": layers_of(tensors),
            # The header names every tensor's type in as many bytes.
            "totals": totals_of(tensors, plan.totals.header_bytes),
        }
    )


def probes(plan: Plan, ggml_type: str) -> Iterator[Probe]:
    """Nothing quantised, all layers a little, each layer alone and each role alone.

    Args:
        plan: any of the model.
        ggml_type: type of each layer and each role.
    """
    quantizable = [tensor for tensor in plan.tensors if tensor.is_quantizable]
    layers: dict[int, list[PlanTensor]] = defaultdict(list)
    roles: dict[str, list[PlanTensor]] = defaultdict(list)
    for tensor in quantizable:
        roles[tensor.role].append(tensor)
        if tensor.layer_idx is not None:
            layers[tensor.layer_idx].append(tensor)
    raw = {tensor.name: tensor.base_type for tensor in quantizable}

    def probe(
        part: str, tensors: Sequence[PlanTensor], wanted: str, role: str | None = None
    ) -> Probe:
        types = raw | {tensor.name: wanted for tensor in tensors}
        policy = ProbePolicy(part=part, ggml_type=wanted)
        return Probe(part, tuple(tensors), retyped(plan, types, policy), role)

    yield probe(NOTHING, [], ggml_type)
    yield probe(
        ALL_LAYERS, [t for some in layers.values() for t in some], ROUNDING_TYPE
    )
    for idx in sorted(layers):
        yield probe(f"layer {idx}", layers[idx], ggml_type)
    for role, tensors in roles.items():
        yield probe(role, tensors, ggml_type, role)


def controls(
    plan: Plan, variances: Mapping[int, float], n_permutations: int
) -> list[Plan]:
    """The plan's layer decisions dealt anew: at random, and by rules without entropy.

    Layers that no entropy decided keep their types.

    Args:
        plan: whose layers were decided as wholes, by entropy.
        variances: variance of the weights, by layer.
        n_permutations: how many random ones; no two alike, none the plan itself.

    Raises:
        UsageError: single tensors were decided, all layers have one type, or there are
            not so many permutations.
    """
    by_entropy = sorted(
        (layer.entropy, layer.layer_idx)
        for layer in plan.layers
        if layer.entropy is not None
    )
    order = [idx for _, idx in by_entropy]
    decided = {layer.layer_idx: layer.ggml_type for layer in plan.layers}
    types = [name for idx in order if (name := decided[idx]) is not None]
    _check(len(order), types, n_permutations)
    lowest_first = sorted(types, key=lambda name: (bits_per_weight(name), name))
    dealt: list[tuple[ControlPolicy, dict[int, str]]] = []

    def deal(idxs: Sequence[int], names: Sequence[str], **of: object) -> None:
        policy = ControlPolicy.model_validate({"plan_sha256": plan.sha256, **of})
        dealt.append((policy, dict(zip(idxs, names, strict=True))))

    for seed, names in _permutations(types, n_permutations):
        deal(order, names, order="random", seed=seed)
    deal(order, types[::-1], order="inverted")
    by_variance = sorted(order, key=lambda idx: (-variances[idx], idx))
    deal(by_variance, lowest_first, order="variance")
    deal(sorted(order), lowest_first, order="first")
    deal(sorted(order, reverse=True), lowest_first, order="last")
    return [_with_layers(plan, layers, policy) for policy, layers in dealt]


def _with_layers(plan: Plan, layers: Mapping[int, str], policy: ControlPolicy) -> Plan:
    types = {
        tensor.name: layers[idx]
        for tensor in plan.tensors
        if tensor.is_quantizable and (idx := tensor.layer_idx) in layers
        if idx is not None
    }
    return retyped(plan, types, policy)


def _permutations(
    types: Sequence[str], n_permutations: int
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Different ones, each with the seed that makes it alone."""
    seen = {tuple(types)}
    seed = 0
    while len(seen) <= n_permutations:
        order = np.random.default_rng(seed).permutation(len(types))
        names = tuple(types[i] for i in order)
        if names not in seen:
            seen.add(names)
            yield seed, names
        seed += 1


def _check(n_layers: int, types: Sequence[str], n_permutations: int) -> None:
    if not types or len(types) < n_layers:
        raise UsageError(
            "study",
            "--granularity",
            "no layer was decided as a whole",
            "use layer, so that there are layers to exchange",
        )
    counts = Counter(types).values()
    n_others = factorial(n_layers) // prod(map(factorial, counts)) - 1
    if n_others == 0:
        raise UsageError(
            "study",
            "the plan",
            f"gives all {n_layers} layers {types[0]}: there is nothing to exchange",
            "use another --factor or --ladder",
        )
    if n_others < n_permutations:
        raise UsageError(
            "study",
            "--permutations",
            f"{n_permutations} are asked for and there are {n_others}",
            f"ask for {n_others} at most",
        )


def check_probe_type(ggml_type: str) -> None:
    """Refuse a probe that would quantise nothing.

    Raises:
        UsageError: the type is a float's.
    """
    if ggml_type in FLOAT_TYPES | {"raw"}:
        raise UsageError(
            "study", "--type", f"{ggml_type} quantises nothing", "use such as Q4_0"
        )


def kld_mean(file: StudyFile) -> float:
    """Nats per token, of the base's distributions from the file's."""
    assert file.quality.kld is not None
    return file.quality.kld.kld_mean_nats


def correlations(
    statistics: Sequence[Mapping[str, float]], klds: Sequence[float]
) -> tuple[StatisticCorrelation, ...]:
    """Correlation of each statistic that every layer has with the layers' divergence.

    Args:
        statistics: statistics of each layer, by name.
        klds: divergence of each layer; nats.
    """
    names = [
        name
        for name in statistics[0]
        if all(name in of_layer for of_layer in statistics)
    ]
    return tuple(
        StatisticCorrelation(
            statistic=name,
            correlation=spearman([of_layer[name] for of_layer in statistics], klds),
        )
        for name in sorted(names)
    )


def rank_among(kld: float, others: Sequence[float]) -> int:
    """1 where none of the others is as low or lower."""
    return 1 + sum(other <= kld for other in others)

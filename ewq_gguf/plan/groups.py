"""Allocation groups, each a layer or a single tensor, and the rungs policies decide.

A group takes its steps up and down the ladder as a whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ewq_gguf.ggml_types import n_dims
from ewq_gguf.plan.ewq import decide, thresholds, z_score
from ewq_gguf.records import EwqPolicy, FastEwqPolicy, LayoutTensor, Scan, TensorScan
from ewq_gguf.records.plan import Thresholds
from ewq_gguf.tensor_names import is_quantizable, layer_idx, role

#: Priorities: the output head is promoted first, then other tensors outside the layers.
_LAYERS, _OUTSIDE, _OUTPUT = 0.0, 1.0, 2.0


@dataclass(frozen=True)
class AllocationGroup:
    """A layer or one tensor, whose type is chosen as a whole.

    Attributes:
        key: the layer's index, or the tensor's name.
        tensors: its quantisable tensors.
        rung: the policy's decision, an index into the ladder; None: raw, whatever the
            ladder has.
        priority: greater is promoted earlier and demoted later.
        entropy: entropy that decided, or None.
        fixed: the type the user gave it, or None.
    """

    key: int | str
    tensors: tuple[LayoutTensor, ...]
    rung: int | None
    priority: tuple[float, ...]
    entropy: float | None = None
    fixed: str | None = None


@dataclass(frozen=True)
class Decision:
    """A policy's decision, before any budget.

    Attributes:
        groups: every quantisable tensor is in exactly one.
        thresholds: by `layer` or role; empty where no entropy decided.
    """

    groups: tuple[AllocationGroup, ...]
    thresholds: dict[str, Thresholds]


def decide_ewq(
    policy: EwqPolicy, scan: Scan, tensors: Iterable[LayoutTensor]
) -> Decision:
    """Decide by the entropies of a scan.

    A layer without a linear matrix has no group; a tensor that was not scanned (the
    converter computed it) stays at the source's type.
    """
    layers, outside = _split(tensors, policy)
    if policy.granularity == "tensor":
        groups, limits = _by_tensor(policy, scan, layers)
    else:
        groups, limits = _by_layer(policy, scan, layers)
    return Decision((*groups, *outside), limits)


def decide_fast(
    policy: FastEwqPolicy, selected: Iterable[int], tensors: Iterable[LayoutTensor]
) -> Decision:
    """Decide by the layers a classifier selected; the last ones are demoted first.

    Source: arXiv:2503.04704 section 4.4.2.
    """
    chosen = sorted(selected, reverse=True)
    low, top = set(chosen[: policy.n_low]), len(policy.ladder) - 1
    layers, outside = _split(tensors, policy)
    groups = [
        AllocationGroup(
            key=idx,
            tensors=tuple(members),
            rung=top if idx not in chosen else max(top - 1 - (idx in low), 0),
            priority=(_LAYERS, float(idx not in chosen), -idx),
        )
        for idx, members in sorted(layers.items())
    ]
    return Decision((*groups, *outside), {})


def _by_layer(
    policy: EwqPolicy, scan: Scan, layers: Mapping[int, list[LayoutTensor]]
) -> tuple[list[AllocationGroup], dict[str, Thresholds]]:
    entropies = {
        layer.layer_idx: layer.softmax_entropy_nats
        if policy.measure == "softmax"
        else layer.histogram_entropy_bits
        for layer in scan.layers
    }
    limits = (
        thresholds(
            list(entropies.values()),
            policy.factor,
            rule=policy.rule,
            n_weights=[layer.n_weights for layer in scan.layers],
        )
        if entropies
        else None
    )
    groups = []
    for idx, tensors in sorted(layers.items()):
        entropy = entropies.get(idx)
        groups.append(
            AllocationGroup(
                key=idx,
                tensors=tuple(tensors),
                rung=_rung(entropy, limits, policy),
                priority=(_LAYERS, 0.0 if entropy is None else entropy, -idx),
                entropy=entropy,
            )
        )
    return groups, {"layer": limits} if limits else {}


def _by_tensor(
    policy: EwqPolicy, scan: Scan, layers: Mapping[int, list[LayoutTensor]]
) -> tuple[list[AllocationGroup], dict[str, Thresholds]]:
    """Each tensor among those of its role, ordered by how far it is from their mean.

    Both measures mostly rank matrices of different roles by their size and shape, so
    no entropy is compared across roles.
    """
    scanned = {tensor.name: tensor for tensor in scan.tensors}
    names = [tensor.name for members in layers.values() for tensor in members]
    by_role: dict[str, list[TensorScan]] = defaultdict(list)
    for name in names:
        if name in scanned:
            by_role[role(name)].append(scanned[name])
    limits = {
        role_name: thresholds(
            [_entropy(policy, tensor) for tensor in tensors],
            policy.factor,
            rule=policy.rule,
            n_weights=[tensor.n_weights for tensor in tensors],
        )
        for role_name, tensors in sorted(by_role.items())
    }
    groups = []
    for idx, members in sorted(layers.items()):
        for order, tensor in enumerate(members):
            scan_of_tensor = scanned.get(tensor.name)
            entropy = _entropy(policy, scan_of_tensor) if scan_of_tensor else None
            of_role = limits.get(role(tensor.name))
            z = 0.0 if entropy is None or not of_role else z_score(entropy, of_role)
            groups.append(
                AllocationGroup(
                    key=tensor.name,
                    tensors=(tensor,),
                    rung=_rung(entropy, of_role, policy),
                    priority=(_LAYERS, z, -idx, -order),
                    entropy=entropy,
                )
            )
    return groups, limits


def _rung(
    entropy: float | None, limits: Thresholds | None, policy: EwqPolicy
) -> int | None:
    if entropy is None or limits is None:
        return None
    return decide(entropy, limits, len(policy.ladder))


def _entropy(policy: EwqPolicy, tensor: TensorScan) -> float:
    softmax = policy.measure == "softmax"
    return tensor.softmax_entropy_nats if softmax else tensor.histogram_entropy_bits


def _split(
    tensors: Iterable[LayoutTensor], policy: EwqPolicy | FastEwqPolicy
) -> tuple[dict[int, list[LayoutTensor]], list[AllocationGroup]]:
    """Quantisable tensors by layer; a group for each tensor outside the layers."""
    layers: dict[int, list[LayoutTensor]] = defaultdict(list)
    outside = []
    for order, tensor in enumerate(tensors):
        if not is_quantizable(tensor.name, n_dims(tensor.shape)):
            continue
        idx = layer_idx(tensor.name)
        if idx is not None:
            layers[idx].append(tensor)
            continue
        is_output = tensor.name == "output.weight"
        own_type = policy.output_type if is_output else policy.embedding_type
        outside.append(
            AllocationGroup(
                key=tensor.name,
                tensors=(tensor,),
                rung=None,
                priority=(_OUTPUT if is_output else _OUTSIDE, -order),
                fixed=None if own_type == "auto" else own_type,
            )
        )
    return layers, outside

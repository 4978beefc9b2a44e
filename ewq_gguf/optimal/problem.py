"""The types whose costs are least within a limit: menus, bounds, and the whole file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import inf, prod

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.ggml_types import bits_per_weight, n_dims, tensor_bytes, written_type
from ewq_gguf.optimal.allocation import select
from ewq_gguf.optimal.latency import Latency
from ewq_gguf.plan.assemble import header_of
from ewq_gguf.plan.importance import needs_entry
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.plan.sizes import padded
from ewq_gguf.records import LayoutTensor, OptimalPolicy
from ewq_gguf.records.plan import TYPES
from ewq_gguf.tensor_names import is_quantizable, role

#: Of the bits that a limit leaves per weight: fewer would be given to a tensor by
#: mistake only, and the lowest types take the longest to try.
_LEAST_SHARE = 0.45
#: Of the price per second: until it is high enough, and until it is known.
_N_DOUBLINGS, _N_HALVINGS = 20, 24

Floats = NDArray[np.float64]


Menus = dict[str, tuple[str, ...]]


def menus_within(
    subject: ModelTensors, policy: OptimalPolicy, limit_bytes: int
) -> Menus:
    """What every tensor may be in a file of a size: no type that is far too small.

    Args:
        subject: what is planned.
        policy: the types, and bounds of roles.
        limit_bytes: of the whole file; where types that are left out are needed to
            keep it, none is.
    """
    menu = menus(subject, policy, _LEAST_SHARE * _mean_bits(subject, limit_bytes))
    if least_bytes(subject, menu) > limit_bytes:
        return menus(subject, policy)
    return menu


def with_unseen(
    subject: ModelTensors,
    menu: Mapping[str, tuple[str, ...]],
    costs: Mapping[str, Mapping[str, float]],
    limit_bytes: int,
) -> Menus:
    """The menus where tensors that cost nothing at all keep the file's mean bits.

    What is not computed with when a text is read, such as a head that predicts further
    tokens, is in the file for something else.

    Args:
        subject: what is planned.
        menu: types by tensor.
        costs: by tensor and type.
        limit_bytes: of the whole file; where it could not be kept, the menus stay.
    """
    mean = _mean_bits(subject, limit_bytes)
    found = dict(menu)
    for name, types in menu.items():
        if not any(costs[name][ggml_type] for ggml_type in types):
            high = [
                ggml_type for ggml_type in types if bits_per_weight(ggml_type) >= mean
            ]
            found[name] = tuple(high) or types[:1]
    return found if least_bytes(subject, found) <= limit_bytes else dict(menu)


def _mean_bits(subject: ModelTensors, limit_bytes: int) -> float:
    """Per weight that is quantised, of a whole file's bytes."""
    n_weights = sum(prod(tensor.shape) for tensor in quantizable(subject))
    return 8 * max(limit_bytes - other_bytes(subject), 0) / max(n_weights, 1)


def least_bytes(subject: ModelTensors, menu: Mapping[str, Collection[str]]) -> int:
    """The smallest whole file that menus allow."""
    return other_bytes(subject) + sum(
        min(
            padded(tensor_bytes(ggml_type, tensor.shape))
            for ggml_type in menu[tensor.name]
        )
        for tensor in quantizable(subject)
    )


def menus(
    subject: ModelTensors,
    policy: OptimalPolicy,
    least_bits: float = 0.0,
    *,
    has_entries: bool = False,
) -> Menus:
    """What every quantisable tensor may be, large to small; `raw` by its own name.

    Args:
        subject: what is planned.
        policy: the types, and bounds of roles.
        least_bits: per weight, of any type.
        has_entries: an importance matrix with every entry will be there.
    """
    importance = subject.importance
    entries = set(importance.n_values) if importance else set()
    if has_entries:
        entries = {tensor.name for tensor in subject.tensors}
    return {
        tensor.name: _menu(tensor, subject.raw_type, policy, least_bits, entries)
        for tensor in quantizable(subject)
    }


def keeps_bounds(
    policy: OptimalPolicy, types: Mapping[str, str], raw_type: str
) -> bool:
    """Whether somebody else's file has no type that the user excluded.

    Args:
        policy: the types, and bounds of roles. What is left out of all types by
            default is nobody's wish.
        types: by quantisable tensor.
        raw_type: what `raw` means.
    """
    is_narrow = bool(set(TYPES) - set(policy.types))
    return all(
        (not is_narrow or ggml_type == raw_type or ggml_type in policy.types)
        and _is_allowed(policy, role(name), ggml_type, raw_type)
        for name, ggml_type in types.items()
    )


def quantizable(subject: ModelTensors) -> list[LayoutTensor]:
    """The tensors that llama-quantize quantises."""
    return [t for t in subject.tensors if is_quantizable(t.name, n_dims(t.shape))]


def other_bytes(subject: ModelTensors) -> int:
    """Bytes of the file that no choice changes: the header, norms, biases."""
    return (header_of(subject) or 0) + sum(
        padded(tensor_bytes(tensor.ggml_type, tensor.shape))
        for tensor in subject.tensors
        if not is_quantizable(tensor.name, n_dims(tensor.shape))
    )


@dataclass(frozen=True)
class Pace:
    """How fast a file has to be.

    Attributes:
        latency: of the device.
        weights: that a token needs, by tensor.
        most_seconds: that a token may take.
    """

    latency: Latency
    weights: Mapping[str, float]
    most_seconds: float

    def keeps(self, types: Mapping[str, str]) -> bool:
        """Whether a file with these types, by tensor, is fast enough."""
        return self.latency.seconds(types, self.weights) <= self.most_seconds


def cheapest(
    subject: ModelTensors,
    costs: Mapping[str, Mapping[str, float]],
    limit_bytes: int,
    pace: Pace | None = None,
) -> dict[str, str] | None:
    """The types that cost least in a file of at most so many bytes.

    Args:
        subject: what is planned.
        costs: by tensor and type, all that it may be.
        limit_bytes: of the whole file.
        pace: that it has to keep; a price per second is raised until it does.

    Returns:
        By tensor; None where no types are as small, or as small and as fast.
    """
    tensors = [tensor for tensor in quantizable(subject) if tensor.name in costs]
    all_types = sorted(set().union(*costs.values()))
    number = {ggml_type: i for i, ggml_type in enumerate(all_types)}
    cost = np.full((len(tensors), len(all_types)), inf)
    size = np.zeros((len(tensors), len(all_types)), np.int64)
    for i, tensor in enumerate(tensors):
        for ggml_type, value in costs[tensor.name].items():
            cost[i, number[ggml_type]] = value
            size[i, number[ggml_type]] = padded(tensor_bytes(ggml_type, tensor.shape))

    limit = limit_bytes - other_bytes(subject)

    def solve(costs: Floats) -> dict[str, str] | None:
        found = select(costs, size, limit)
        if found is None:
            return None
        return {
            tensor.name: all_types[choice]
            for tensor, choice in zip(tensors, found.options.tolist(), strict=True)
        }

    types = solve(cost)
    if types is None or pace is None or pace.keeps(types):
        return types
    per_weight = np.array([pace.latency.of_type(name) for name in all_types])
    needed = np.array([pace.weights[tensor.name] for tensor in tensors])
    seconds = needed[:, None] * per_weight
    # The price at which all errors together are worth a token's whole time.
    low, high = 0.0, float(cost[np.isfinite(cost)].sum()) / pace.most_seconds
    for _ in range(_N_DOUBLINGS):
        types = solve(cost + high * seconds)
        if types is None or pace.keeps(types):
            break
        low, high = high, 4 * high
    else:
        return None
    for _ in range(_N_HALVINGS):
        price = (low + high) / 2
        found = solve(cost + price * seconds)
        if found is not None and pace.keeps(found):
            high, types = price, found
        else:
            low = price
    return types


def _menu(
    tensor: LayoutTensor,
    raw: str,
    policy: OptimalPolicy,
    least: float,
    entries: Collection[str],
) -> tuple[str, ...]:
    n_columns = tensor.shape[-1]
    fitting = [
        ggml_type
        for ggml_type in (raw if name == "raw" else name for name in policy.types)
        if written_type(ggml_type, n_columns) == ggml_type
        and not (needs_entry(ggml_type, n_columns) and tensor.name not in entries)
    ]
    allowed = [
        ggml_type
        for ggml_type in dict.fromkeys((raw, *fitting))
        if _is_allowed(policy, role(tensor.name), ggml_type, raw)
    ]
    # The user's order is any.
    allowed.sort(key=bits_per_weight, reverse=True)
    # Bounds that the user set hold, whatever is too small for this file otherwise.
    low = [ggml_type for ggml_type in allowed if bits_per_weight(ggml_type) >= least]
    return tuple(low or allowed[:1]) or (raw,)


def _is_allowed(policy: OptimalPolicy, of: str, ggml_type: str, raw: str) -> bool:
    floor, ceiling = (
        raw if bound == "raw" else bound
        for named in (policy.floors, policy.ceilings)
        for bound in [named.get(of, named.get("*"))]
    )
    return (floor is None or bits_per_weight(ggml_type) >= bits_per_weight(floor)) and (
        ceiling is None or bits_per_weight(ggml_type) <= bits_per_weight(ceiling)
    )

"""Nats per unit of each tensor's error, from the costs of probed groups of tensors.

A small error of the weights costs KL divergence in proportion to its square, and the
costs of tensors add up (HIGGS, arXiv:2411.17525): KLD = sum a_t e_t, where e_t is the
share of its energy that a tensor loses. The a_t are measured by role first; a
group that costs much is halved by depth until its tensors are known one by one, so that
an outlier is found wherever it is and no probes are spent on tensors that hardly cost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import log

from ewq_gguf.records.quant_error import QuantError
from ewq_gguf.tensor_names import layer_idx, role

#: Names of tensors of one role, first layer first.
Group = tuple[str, ...]


def roles_of(names: Iterable[str]) -> list[Group]:
    """The tensors by their role, layers in order."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names, key=lambda name: layer_idx(name) or 0):
        groups[role(name)].append(name)
    return [tuple(group) for group in groups.values()]


def halves(group: Group) -> tuple[Group, Group]:
    """The earlier and the later layers of a group."""
    middle = len(group) // 2
    return group[:middle], group[middle:]


def groups_to_halve(costs: Mapping[Group, float], min_share: float) -> list[Group]:
    """Groups of two tensors or more that cost much, the costliest first.

    Args:
        costs: nats by group; the groups are disjoint.
        min_share: share of the whole cost, below which a group stays as it is.
    """
    total = sum(costs.values())
    costly = [
        group
        for group, cost in costs.items()
        if len(group) > 1 and cost > min_share * total
    ]
    return sorted(costly, key=lambda group: -costs[group])


def slopes(
    costs: Mapping[Group, float], errors: Mapping[str, float]
) -> dict[str, float]:
    """Nats per unit of each tensor's error; equal within a group.

    Args:
        costs: nats by group, in the probes' type.
        errors: relative squared error by tensor, in that type.
    """
    slope_of: dict[str, float] = {}
    for group, cost in costs.items():
        error = sum(errors[name] for name in group)
        # A tensor of zeros loses nothing in any type.
        slope_of |= dict.fromkeys(group, max(cost, 0.0) / error if error else 0.0)
    return slope_of


def larger_error(error: QuantError, probed: QuantError) -> float:
    """A type's error by its ratio to the probed type's, weighted or plain.

    The larger of both ratios counts.
    """
    plain = probed.error * error.plain_error / probed.plain_error
    return max(error.error, plain)


def needs_own_probe(error: QuantError, probed: QuantError, ratio: float) -> bool:
    """Whether a probe in one type says little about the cost of another.

    Where the importance of one column dwarfs all others (the attention sink's massive
    activations), a type that happens to hit that column looks almost free: its error
    with the importance and its error without go different ways.

    Args:
        error: error of the type in question.
        probed: error of the probed type, for the same tensor.
        ratio: factor between the two ratios (weighted and plain), beyond which the
            answer is yes.
    """
    if not (error.error and error.plain_error and probed.error and probed.plain_error):
        return False
    weighted = error.error / probed.error
    plain = error.plain_error / probed.plain_error
    return abs(log(weighted / plain)) > log(ratio)

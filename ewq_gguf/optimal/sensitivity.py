"""What turns a tensor's error into loss: groups are probed, the costly ones halved.

A small error of the weights costs KL divergence in proportion to its square, and the
costs of tensors add up (HIGGS, arXiv:2411.17525): KLD = sum a_t e_t, where e_t is the
share of its energy that a tensor loses. What is measured is a_t, of whole roles first;
a group that costs much is halved by depth until its tensors are known one by one, so
that an outlier is found wherever it is and nothing is spent on what hardly costs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import log

from ewq_gguf.records.quant_error import QuantError
from ewq_gguf.tensor_names import layer_idx, role

#: Factor between the ratios of two types, weighed and not, from which on a tensor's own
#: probe is wanted.
_DOUBT = 2.0

#: Names of tensors of one role, first layer first.
Group = tuple[str, ...]


def roles_of(names: Iterable[str]) -> list[Group]:
    """The tensors by their role, layers in order."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names, key=lambda name: layer_idx(name) or 0):
        groups[role(name)].append(name)
    return [tuple(group) for group in groups.values()]


def halves(group: Group) -> tuple[Group, Group]:
    """Its earlier and its later layers."""
    middle = len(group) // 2
    return group[:middle], group[middle:]


def next_groups(leaves: Mapping[Group, float], least_share: float) -> list[Group]:
    """Groups to halve, the costliest first.

    Args:
        leaves: what each group costs; nats.
        least_share: of all that is lost, below which a group stays as it is.
    """
    total = sum(leaves.values())
    large = [
        group
        for group, cost in leaves.items()
        if len(group) > 1 and cost > least_share * total
    ]
    return sorted(large, key=lambda group: -leaves[group])


def slopes(
    leaves: Mapping[Group, float], errors: Mapping[str, float]
) -> dict[str, float]:
    """Nats per unit of each tensor's error; within a group all are taken as equal.

    Args:
        leaves: what each group costs in the probes' type; nats.
        errors: of each tensor in that type.
    """
    known: dict[str, float] = {}
    for group, cost in leaves.items():
        error = sum(errors[name] for name in group)
        # A tensor of zeros loses nothing in any type.
        known |= dict.fromkeys(group, max(cost, 0.0) / error if error else 0.0)
    return known


def scaled_error(error: QuantError, probed: QuantError) -> float:
    """A type's error by whichever ratio to the probe's is worse, weighed or plain."""
    plain = probed.error * error.plain_error / probed.plain_error
    return max(error.error, plain)


def is_doubtful(error: QuantError, probed: QuantError) -> bool:
    """Whether a probe in one type says little about another.

    Where the importance of one column dwarfs all others (the attention sink's massive
    activations), a type that happens to hit that column looks almost free: its error
    and the same unweighed then go different ways.

    Args:
        error: of the type in question.
        probed: of the probe's, for the same tensor.
    """
    if not (error.error and error.plain_error and probed.error and probed.plain_error):
        return False
    weighed = error.error / probed.error
    plain = error.plain_error / probed.plain_error
    return abs(log(weighed / plain)) > log(_DOUBT)

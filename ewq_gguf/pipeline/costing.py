"""What every type costs every tensor: errors times slopes, and probes of both."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping

from ewq_gguf.pipeline.probing import PROBE_TYPE, Prober, probe_slopes
from ewq_gguf.plan.sensitivity import is_doubtful, scaled_error
from ewq_gguf.records.quant_error import QuantError
from ewq_gguf.tensor_names import role

Costs = dict[str, dict[str, float]]

#: Of the time, what slopes may take; the rest is for the types that are chosen.
_SLOPES_SHARE = 0.6
#: A role in a type that costs less of the whole is not probed.
_LEAST_SHARE = 0.01
#: Probes before the clock is looked at again.
_MAX_PROBES = 24


def measured_costs(
    prober: Prober,
    errors: Mapping[str, Mapping[str, QuantError]],
    choose: Callable[[Costs], Mapping[str, str]],
    seconds: float,
) -> Costs:
    """Nats that each type costs each tensor.

    A probe in one type says what another costs only as far as their errors are alike:
    in a role, and for doubtful tensors one by one, the types that would be chosen are
    probed themselves, until all of it that matters is known.

    Args:
        prober: of the model.
        errors: by tensor and type.
        choose: the cheapest types by tensor.
        seconds: that probes may take; the roles are probed whatever it is.

    Raises:
        EwqError: as of `bench.probing.probe`.
    """
    started = time.monotonic()
    probed = {n: one[PROBE_TYPE] for n, one in errors.items() if PROBE_TYPE in one}
    slopes = probe_slopes(
        prober,
        {name: error.error for name, error in probed.items()},
        started + _SLOPES_SHARE * seconds,
    )
    costs: Costs = {}
    doubtful = set()
    for name, one in errors.items():
        costs[name] = {}
        for kind, error in one.items():
            cost = slopes.get(name, 0.0) * error.error
            if name in probed and is_doubtful(error, probed[name]):
                # Until it is probed itself, what is worse counts.
                doubtful.add((name, kind))
                cost = slopes[name] * scaled_error(error, probed[name])
            costs[name][kind] = cost
    _settle(costs, doubtful, choose, prober, started + seconds)
    return costs


def _settle(
    costs: Costs,
    doubtful: set[tuple[str, str]],
    choose: Callable[[Costs], Mapping[str, str]],
    prober: Prober,
    deadline: float,
) -> None:
    """Probe what is chosen until all that matters of it is known; correct the costs."""
    alone: set[tuple[str, str]] = set()
    known: set[tuple[str, str]] = set()
    while time.monotonic() < deadline:
        types = choose(costs)
        total = sum(costs[name][kind] for name, kind in types.items())
        cells: dict[tuple[str, str], list[str]] = defaultdict(list)
        singles = []
        for name, kind in types.items():
            if (name, kind) in doubtful - alone:
                singles.append((name, kind))
            elif costs[name][kind] and (name, kind) not in alone:
                cells[role(name), kind].append(name)
        shares = {
            cell: sum(costs[name][cell[1]] for name in names)
            for cell, names in cells.items()
            if cell not in known
        }
        singles = sorted(singles, key=lambda one: -costs[one[0]][one[1]])[:_MAX_PROBES]
        groups = sorted(shares, key=lambda cell: -shares[cell])
        groups = [g for g in groups if shares[g] > _LEAST_SHARE * total]
        groups = groups[: _MAX_PROBES - len(singles)]
        if not singles and not groups:
            return
        found = prober(
            [
                *(((name,), kind) for name, kind in singles),
                *((tuple(cells[cell]), cell[1]) for cell in groups),
            ]
        )
        for name, kind in singles:
            costs[name][kind] = found[(name,), kind]
            alone.add((name, kind))
        for cell in groups:
            of, kind = cell
            factor = found[tuple(cells[cell]), kind] / shares[cell]
            for name, one in costs.items():
                if role(name) == of and kind in one and (name, kind) not in alone:
                    one[kind] *= factor
            known.add(cell)

"""What every type costs every tensor: errors times slopes, and probes of both."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

from ewq_gguf.optimal.probes import PROBE_TYPE, Prober, probe_slopes
from ewq_gguf.optimal.sensitivity import is_doubtful, scaled_error
from ewq_gguf.records.quant_error import QuantError
from ewq_gguf.tensor_names import role

Costs = dict[str, dict[str, float]]

#: Of the time, what slopes may take; the rest is for the types that are chosen.
_SLOPES_SHARE = 0.6
#: A role in a type that costs less of the whole is not probed.
_LEAST_SHARE = 0.01
#: What a type was seen to cost at least, of what its error says.
_HOPE = 0.25
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
    in a role, and for doubtful tensors one by one, the types that might be chosen are
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
        for ggml_type, error in one.items():
            cost = slopes.get(name, 0.0) * error.error
            if name in probed and is_doubtful(error, probed[name]):
                # Until it is probed itself, what is worse counts.
                doubtful.add((name, ggml_type))
                cost = slopes[name] * scaled_error(error, probed[name])
            costs[name][ggml_type] = cost
    _settle(costs, doubtful, choose, prober, started + seconds)
    return costs


def _settle(
    costs: Costs,
    doubtful: set[tuple[str, str]],
    choose: Callable[[Costs], Mapping[str, str]],
    prober: Prober,
    deadline: float,
) -> None:
    """Probe what might be chosen until all that matters of it is known.

    What is not probed yet is taken to cost less than its error says, as it may: so a
    type is not passed over for a price that nobody measured. Whole roles are probed,
    whatever layers were chosen: the next size finds them known. Corrects the costs.
    """
    alone: set[tuple[str, str]] = set()
    known = {(role(name), PROBE_TYPE) for name in costs}
    while time.monotonic() < deadline:
        types = choose(_hopeful(costs, known, alone))
        total = sum(costs[name][ggml_type] for name, ggml_type in types.items())
        shares: dict[tuple[str, str], float] = defaultdict(float)
        singles = []
        for name, ggml_type in types.items():
            cost = costs[name][ggml_type]
            if (name, ggml_type) in doubtful - alone:
                singles.append((name, ggml_type))
            elif (
                cost
                and (role(name), ggml_type) not in known
                and (name, ggml_type) not in alone
            ):
                shares[role(name), ggml_type] += cost
        singles = sorted(singles, key=lambda one: -costs[one[0]][one[1]])[:_MAX_PROBES]
        cells = sorted(shares, key=lambda cell: -shares[cell])
        cells = [cell for cell in cells if shares[cell] > _LEAST_SHARE * total]
        groups = {
            cell: tuple(
                name
                for name, one in costs.items()
                if role(name) == cell[0]
                and one.get(cell[1])
                and (name, cell[1]) not in doubtful
            )
            for cell in cells[: _MAX_PROBES - len(singles)]
        }
        if not singles and not groups:
            return
        found = prober(
            [
                *(((name,), ggml_type) for name, ggml_type in singles),
                *((group, ggml_type) for (_, ggml_type), group in groups.items()),
            ]
        )
        for name, ggml_type in singles:
            costs[name][ggml_type] = found[(name,), ggml_type]
            alone.add((name, ggml_type))
        for cell, group in groups.items():
            ggml_type = cell[1]
            factor = found[group, ggml_type] / sum(
                costs[name][ggml_type] for name in group
            )
            for name, one in costs.items():
                if (
                    role(name) == cell[0]
                    and ggml_type in one
                    and (name, ggml_type) not in alone
                ):
                    one[ggml_type] *= factor
            known.add(cell)


def _hopeful(
    costs: Costs, known: Collection[tuple[str, str]], alone: Collection[tuple[str, str]]
) -> Costs:
    """The costs where what was not probed costs as little as it may."""
    return {
        name: {
            ggml_type: cost
            if (role(name), ggml_type) in known or (name, ggml_type) in alone
            else _HOPE * cost
            for ggml_type, cost in one.items()
        }
        for name, one in costs.items()
    }

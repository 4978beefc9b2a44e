"""Nats that every type costs every tensor: errors times slopes, corrected by probes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ewq_gguf.optimal.sensitivity import (
    Group,
    groups_to_halve,
    halves,
    larger_error,
    needs_own_probe,
    roles_of,
    slopes,
)
from ewq_gguf.optimal.settings import SearchSettings
from ewq_gguf.optimal.type_prober import TypeProber
from ewq_gguf.records.quant_error import QuantError
from ewq_gguf.tensor_names import role

#: Nats by tensor and type.
Costs = dict[str, dict[str, float]]
#: Gives the types, by tensor, that cost least within the limit.
Solve = Callable[[Costs], Mapping[str, str]]


def probed_costs(
    prober: TypeProber,
    errors: Mapping[str, Mapping[str, QuantError]],
    solve: Solve,
    seconds: float,
) -> Costs:
    """Nats that each type costs each tensor.

    A probe in one type tells the cost of another only as far as their errors are alike.
    So the types that might be selected are probed themselves, by role, and tensors
    whose errors say little one by one, until all of a selection that matters is known.

    Args:
        prober: prober of the model.
        errors: errors by tensor and type.
        solve: solver of the allocation.
        seconds: time that probes may take; the roles are probed whatever it is.

    Raises:
        EwqError: a probe failed.
    """
    started = time.monotonic()
    settings = prober.settings
    probed = {
        name: by_type[settings.probe_type]
        for name, by_type in errors.items()
        if settings.probe_type in by_type
    }
    slope_of = measured_slopes(
        prober,
        {name: error.error for name, error in probed.items()},
        started + settings.slope_time_share * seconds,
    )
    model = CostModel.of(errors, probed, slope_of, settings)
    model.probe_until_settled(prober, solve, started + seconds)
    return model.costs


def measured_slopes(
    prober: TypeProber, errors: Mapping[str, float], deadline: float
) -> dict[str, float]:
    """Nats per unit of each tensor's error: roles are probed, costly ones halved.

    Args:
        prober: prober of the model.
        errors: relative squared error by tensor, in the probes' type.
        deadline: time by `time.monotonic`; the roles are probed whatever it is.

    Raises:
        EwqError: a probe failed.
    """
    settings = prober.settings

    def probe(groups: Iterable[Group]) -> dict[Group, float]:
        costs = prober((group, settings.probe_type) for group in groups)
        return {group: cost for (group, _), cost in costs.items()}

    if not errors:
        return {}
    costs = probe(roles_of(errors))
    # Tensors that no text is computed with cost nothing, and tell nothing of the noise.
    used = [group for group, cost in costs.items() if cost > 0]
    if used:
        cheapest = min(used, key=lambda group: costs[group])
        middle = (cheapest[len(cheapest) // 2],)
        (prober.noise_nats,) = prober([(middle, settings.fine_type)]).values()
    costs = {group: prober.without_noise(cost) for group, cost in costs.items()}
    while time.monotonic() < deadline:
        costly = groups_to_halve(costs, settings.slope_min_share)
        costly = costly[: settings.slope_max_halved]
        if not costly:
            break
        parts = probe(half for group in costly for half in halves(group))
        for group in costly:
            del costs[group]
        costs |= parts
    return slopes(costs, errors)


@dataclass
class CostModel:
    """Costs of all types, and how each of them is known.

    Attributes:
        costs: nats by tensor and type.
        unreliable: tensors and types whose errors say little; each has its own probe.
        probed_tensors: tensors in types that were probed one by one.
        probed_roles: roles in types that were probed whole.
        settings: constants of the search.
    """

    costs: Costs
    unreliable: set[tuple[str, str]]
    settings: SearchSettings
    probed_tensors: set[tuple[str, str]] = field(default_factory=set)
    probed_roles: set[tuple[str, str]] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        errors: Mapping[str, Mapping[str, QuantError]],
        probed: Mapping[str, QuantError],
        slope_of: Mapping[str, float],
        settings: SearchSettings,
    ) -> CostModel:
        """The model as far as slopes and errors tell.

        Args:
            errors: errors by tensor and type.
            probed: errors by tensor in the probes' type.
            slope_of: nats per unit of error, by tensor.
            settings: constants of the search.
        """
        costs: Costs = {}
        unreliable = set()
        for name, by_type in errors.items():
            costs[name] = {}
            for ggml_type, error in by_type.items():
                cost = slope_of.get(name, 0.0) * error.error
                if name in probed and needs_own_probe(
                    error, probed[name], settings.doubt_ratio
                ):
                    # Until it is probed itself, the larger cost counts.
                    unreliable.add((name, ggml_type))
                    cost = slope_of[name] * larger_error(error, probed[name])
                costs[name][ggml_type] = cost
        roles = {(role(name), settings.probe_type) for name in costs}
        return cls(costs, unreliable, settings, probed_roles=roles)

    def probe_until_settled(
        self, prober: TypeProber, solve: Solve, deadline: float
    ) -> None:
        """Probe the selected types until all costs that matter are known.

        Args:
            prober: prober of the model.
            solve: solver of the allocation.
            deadline: time by `time.monotonic`.
        """
        while time.monotonic() < deadline:
            types = solve(self.optimistic_costs())
            tensors, roles = self._to_probe(types)
            if not tensors and not roles:
                return
            found = prober(
                [
                    *(((name,), ggml_type) for name, ggml_type in tensors),
                    *((group, ggml_type) for (_, ggml_type), group in roles.items()),
                ]
            )
            for name, ggml_type in tensors:
                self.costs[name][ggml_type] = found[(name,), ggml_type]
                self.probed_tensors.add((name, ggml_type))
            for cell, group in roles.items():
                self._correct_role(cell, group, found[group, cell[1]])

    def optimistic_costs(self) -> Costs:
        """The costs, where each that is not probed yet is as small as it may be.

        So no type is passed over for a cost that was not measured.
        """
        share = self.settings.unprobed_cost_share
        return {
            name: {
                ggml_type: cost if self._is_probed(name, ggml_type) else share * cost
                for ggml_type, cost in by_type.items()
            }
            for name, by_type in self.costs.items()
        }

    def _is_probed(self, name: str, ggml_type: str) -> bool:
        return (role(name), ggml_type) in self.probed_roles or (
            name,
            ggml_type,
        ) in self.probed_tensors

    def _to_probe(
        self, types: Mapping[str, str]
    ) -> tuple[list[tuple[str, str]], dict[tuple[str, str], Group]]:
        """Tensors to probe alone, and roles to probe whole, the costliest first.

        A role is probed whole, whichever of its layers have the type: the next size
        finds it known.
        """
        total = sum(self.costs[name][ggml_type] for name, ggml_type in types.items())
        role_costs: dict[tuple[str, str], float] = defaultdict(float)
        tensors = []
        for name, ggml_type in types.items():
            cost = self.costs[name][ggml_type]
            if (name, ggml_type) in self.unreliable - self.probed_tensors:
                tensors.append((name, ggml_type))
            elif cost and not self._is_probed(name, ggml_type):
                role_costs[role(name), ggml_type] += cost
        most = self.settings.type_max_probes
        tensors = sorted(tensors, key=lambda cell: -self.costs[cell[0]][cell[1]])[:most]
        least = self.settings.type_min_share * total
        cells = sorted(role_costs, key=lambda cell: -role_costs[cell])
        cells = [cell for cell in cells if role_costs[cell] > least]
        return tensors, {
            cell: self._reliable(*cell) for cell in cells[: most - len(tensors)]
        }

    def _reliable(self, role_name: str, ggml_type: str) -> Group:
        """A role's tensors that have a cost in the type and need no own probe."""
        return tuple(
            name
            for name, by_type in self.costs.items()
            if role(name) == role_name
            and by_type.get(ggml_type)
            and (name, ggml_type) not in self.unreliable
        )

    def _correct_role(
        self, cell: tuple[str, str], group: Group, cost_nats: float
    ) -> None:
        """Scale the costs of a role in a type so that the group's add up."""
        role_name, ggml_type = cell
        factor = cost_nats / sum(self.costs[name][ggml_type] for name in group)
        for name, by_type in self.costs.items():
            if (
                role(name) == role_name
                and ggml_type in by_type
                and (name, ggml_type) not in self.probed_tensors
            ):
                by_type[ggml_type] *= factor
        self.probed_roles.add(cell)

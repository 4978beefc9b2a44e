"""Cost of rounding a layer's input, beside that of the weights' errors.

llama.cpp rounds the input of quantised weights to 8 bits: on a CPU by blocks of 256 for
types of such blocks, where one massive activation costs all its neighbours more, and of
32 for the others. The file of a group of tensors in a type whose weights are nearly
exact shows that, beside the same values in a base of 16 bits.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ewq_gguf.errors import ResourceError
from ewq_gguf.ggml_types import activation_block, finest_types
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.optimal.candidate_types import quantizable
from ewq_gguf.optimal.sensitivity import Group, groups_to_halve, halves, roles_of
from ewq_gguf.optimal.type_prober import TypeProber
from ewq_gguf.plan.assemble import assemble
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.records import Plan, UniformPolicy
from ewq_gguf.stages.candidate_files import measure_plans, types_sha256

#: Types whose weights are nearly exact, by the activations that share a scale.
_FINEST = tuple(finest_types().values())
#: Nats by tensor and type.
Rounding = dict[str, dict[str, float]]
#: A group of tensors, and the type that they get.
Cell = tuple[Group, str]


class RoundingMeasurer:
    """Makes files that show the cost of rounding, one for each group of tensors.

    Args:
        prober: prober of the model; files are measured on its windows.
        toolchain: llama.cpp that quantises.
        model: model that is planned.
        types: types by tensor, whose rounding is to be known.
    """

    def __init__(
        self,
        prober: TypeProber,
        toolchain: Toolchain,
        model: ModelTensors,
        types: Mapping[str, Collection[str]],
    ) -> None:
        """Take what files are made of and measured with."""
        self._prober = prober
        self._toolchain = toolchain
        # Tensors that are raw in these files stay raw.
        self._model = replace(model, lattices={})
        self._types = types
        self._settings = prober.settings

    def measure(self, seconds: float) -> Rounding:
        """Measure roles, then halves of those that cost much.

        Within a group the cost is shared out evenly.

        Args:
            seconds: time that may be taken.

        Returns:
            Nats by tensor and type; empty where the time does not suffice for all
            roles, or the disk has no space for a file.

        Raises:
            EwqError: a file could not be made, or not be measured.
        """
        roles = [
            (group, ggml_type)
            for ggml_type in _FINEST
            for group in roles_of(
                name for name in self._types if self._types_like(name, ggml_type)
            )
        ]
        deadline = time.monotonic() + seconds
        if not roles or seconds <= 0:
            return {}
        try:
            costs = self._costs_of_roles(roles, deadline)
        except ResourceError as error:  # such a file is nearly as large as the base
            self._prober.progress.note(f"the cost of rounding is not measured: {error}")
            return {}
        while time.monotonic() < deadline and (costly := self._costly(costs)):
            for cell in costly:
                del costs[cell]
            costs |= self.costs_of(
                [
                    (half, ggml_type)
                    for group, ggml_type in costly
                    for half in halves(group)
                ]
            )
        rounding: Rounding = {}
        for (group, finest), cost in costs.items():
            for name in group:
                similar = self._types_like(name, finest)
                by_type = dict.fromkeys(similar, cost / len(group))
                rounding[name] = rounding.get(name, {}) | by_type
        return rounding

    def _costs_of_roles(
        self, roles: Sequence[Cell], deadline: float
    ) -> dict[Cell, float]:
        """Costs of all roles; empty where they cannot all be measured in time.

        Were some roles known and others not, the known ones would look expensive.
        """
        costs: dict[Cell, float] = {}
        slowest = 0.0
        # The first file may be in the cache, so the time is looked at more than once.
        while todo := roles[len(costs) : max(2 * len(costs), 1)]:
            before = time.monotonic()
            costs |= self.costs_of(todo)
            now = time.monotonic()
            slowest = max(slowest, (now - before) / len(todo))
            if now + slowest * (len(roles) - len(costs)) > deadline:
                return {}
        return costs

    def _costly(self, costs: Mapping[Cell, float]) -> list[Cell]:
        """Groups to halve, a few of each type."""
        return [
            (group, ggml_type)
            for ggml_type in _FINEST
            for group in groups_to_halve(
                {group: cost for (group, of), cost in costs.items() if of == ggml_type},
                self._settings.rounding_min_share,
            )[: self._settings.rounding_max_halved]
        ]

    def _types_like(self, name: str, ggml_type: str) -> list[str]:
        """The tensor's types whose activations share a scale as often."""
        length = activation_block(ggml_type)
        return [each for each in self._types[name] if activation_block(each) == length]

    def costs_of(self, cells: Sequence[Cell]) -> dict[Cell, float]:
        """The divergence of each group's file, less that of the same values."""
        tensors = quantizable(self._model)
        raw_type = self._model.raw_type
        raw = {tensor.name: raw_type for tensor in tensors}

        def plan(types: Mapping[str, str], ggml_type: str) -> Plan:
            return assemble(self._model, UniformPolicy(ggml_type=ggml_type), types)

        plans = {
            (group, ggml_type): plan(raw | dict.fromkeys(group, ggml_type), ggml_type)
            for group, ggml_type in cells
        }
        # From 32 bits to 16, all the other tensors are rounded too: that is no role's.
        unquantised = []
        if any(tensor.ggml_type != raw_type for tensor in tensors):
            unquantised = [plan(raw, raw_type)]
        parts = measure_plans(
            [*plans.values(), *unquantised],
            replace(self._prober.request, reference=None),
            self._toolchain,
            options=self._prober.options,
            progress=self._prober.progress,
            may_fail=True,
        )

        def loss(plan: Plan) -> float:
            part = parts.get(types_sha256(plan))
            # A file that cannot be measured is taken to cost nothing.
            return part.quality.kld.kld_mean_nats if part and part.quality.kld else 0.0

        weights = self._prober.costs_with_noise(cells)
        others = sum(map(loss, unquantised))
        return {
            cell: max(loss(plan) - weights[cell] - others, 0.0)
            for cell, plan in plans.items()
        }

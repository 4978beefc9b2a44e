"""Costs of all types for all tensors, as far as they can be measured before files are.

The error table and probes give the cost of the weights, files of single roles that of
rounding activations, and timed files the speed of each type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ewq_gguf.optimal.activation_rounding import RoundingMeasurer
from ewq_gguf.optimal.candidate_types import floor_unmeasured, quantizable
from ewq_gguf.optimal.cost_model import Costs, probed_costs
from ewq_gguf.optimal.error_table import error_table
from ewq_gguf.optimal.file_measurer import FileMeasurer
from ewq_gguf.optimal.latency_target import measure_latency_target
from ewq_gguf.optimal.predictor import Predictor
from ewq_gguf.optimal.search_space import SearchSpace, quantizable_types
from ewq_gguf.optimal.settings import SearchSettings
from ewq_gguf.optimal.type_prober import open_prober
from ewq_gguf.plan.lattice import without_loss
from ewq_gguf.records import Plan


@dataclass(frozen=True)
class MeasuredCosts:
    """Costs before any candidate is measured.

    Attributes:
        space: the search space, with the speeds of types where the user asks for one,
            and the file's mean bits at least for tensors that no text is computed with.
        predictor: predictor with the costs of all types.
        n_probes: number of probes.
    """

    space: SearchSpace
    predictor: Predictor
    n_probes: int


def measure_costs(
    space: SearchSpace,
    baselines: Mapping[str, Plan],
    measurer: FileMeasurer,
    seconds: float,
    settings: SearchSettings,
) -> MeasuredCosts:
    """Measure errors, speeds, rounding and sensitivities, in this order.

    Args:
        space: types, size and speed that files may have.
        baselines: plans whose files have to be predicted too.
        measurer: measures files.
        seconds: time for the whole search.
        settings: constants of the search.

    Raises:
        EwqError: a stage failed.
    """
    base, lib_dir = measurer.search.base, measurer.toolchain.lib_dir
    assert base is not None
    assert lib_dir is not None  # checked before
    model = space.model
    options, progress = measurer.options, measurer.progress
    types = _types_to_predict(space, baselines, settings)
    errors = error_table(
        base, types, lib_dir, options=options, progress=progress, settings=settings
    )
    if space.policy.min_tps:
        target = measure_latency_target(
            model, space.types, space.policy.min_tps, measurer
        )
        space = replace(space, latency_target=target)
    with open_prober(
        measurer.search, lib_dir, options=options, progress=progress, settings=settings
    ) as prober:
        rounding = RoundingMeasurer(prober, measurer.toolchain, model, types).measure(
            settings.rounding_time_share * seconds
        )

        def predictor(costs: Costs) -> Predictor:
            exact = without_loss(costs, model.lattices)
            return Predictor(exact, rounding=rounding, settings=settings)

        costs = probed_costs(
            prober,
            errors,
            lambda costs: space.solve(predictor(costs).corrected_costs()) or {},
            settings.probe_time_share * seconds,
        )
    learnt = predictor(costs)
    allowed = floor_unmeasured(model, space.types, learnt.costs, space.limit.n_bytes)
    return MeasuredCosts(replace(space, types=allowed), learnt, prober.n_probes)


def _types_to_predict(
    space: SearchSpace, baselines: Mapping[str, Plan], settings: SearchSettings
) -> dict[str, list[str]]:
    """Types of the space, of all baselines and of the probes, by tensor."""
    types = {name: {*allowed} for name, allowed in space.types.items()}
    for plan in baselines.values():
        for name, ggml_type in quantizable_types(plan).items():
            types[name].add(ggml_type)
    for tensor in quantizable(space.model):
        if tensor.shape[-1] % 32 == 0:
            types[tensor.name].add(settings.probe_type)
    return {name: sorted(tried) for name, tried in types.items()}

"""How fast a file has to be, with the time that each type takes on this machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ewq_gguf import ggml_types
from ewq_gguf.bench.runner import Request
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.errors import ResourceError
from ewq_gguf.optimal.candidate_types import quantizable
from ewq_gguf.optimal.file_measurer import FileMeasurer
from ewq_gguf.optimal.latency import LatencyTarget, fit_latency, needed_weights
from ewq_gguf.plan.assemble import assemble
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.records import UniformPolicy


def measure_latency_target(
    subject: ModelTensors,
    candidates: Mapping[str, Sequence[str]],
    min_tps: float,
    measurer: FileMeasurer,
) -> LatencyTarget:
    """Time a file of every type that tensors may have.

    Args:
        subject: The model's tensors.
        candidates: Types by tensor.
        min_tps: Tokens per second that a file has to generate.
        measurer: Makes and times the files.

    Raises:
        ResourceError: no file could be made and run.
        EwqError: quantising or timing failed.
    """
    subject = replace(subject, lattices={})  # each file is of its own type
    weights = needed_weights(quantizable(subject), _expert_share(measurer.search))
    plans = []
    for ggml_type in sorted(set().union(*candidates.values())):
        # A tensor that cannot have the type gets the nearest one in bits that it can.
        nearest = {
            name: _nearest(ggml_type, types) for name, types in candidates.items()
        }
        plans.append(assemble(subject, UniformPolicy(ggml_type=ggml_type), nearest))
    files = []
    for plan, tps in zip(plans, measurer.speeds(plans), strict=True):
        if not tps:
            continue  # too large to be run: the type's time is taken by its bits
        needed: dict[str, float] = defaultdict(float)
        for tensor in plan.tensors:
            if tensor.is_quantizable:
                needed[tensor.written_type] += weights[tensor.name]
        files.append((needed, 1 / tps))
    if not files:
        raise ResourceError(
            "plan",
            "--min-tps",
            "no file of any type could be timed",
            "see the lines above, or leave --min-tps out",
        )
    return LatencyTarget(fit_latency(files, measurer.settings), weights, 1 / min_tps)


def _nearest(ggml_type: str, types: Sequence[str]) -> str:
    if ggml_type in types:
        return ggml_type
    bits = ggml_types.bits_per_weight(ggml_type)
    return min(types, key=lambda name: abs(ggml_types.bits_per_weight(name) - bits))


def _expert_share(request: Request) -> float:
    """Share of the experts that a token is sent to; 1 without experts."""
    assert request.base is not None
    keys = read_gguf(request.base).kv
    architecture = keys.get("general.architecture")
    used, count = (
        keys.get(f"{architecture}.expert_{what}") for what in ("used_count", "count")
    )
    if isinstance(used, int) and isinstance(count, int) and count > 0:
        return used / count
    return 1.0

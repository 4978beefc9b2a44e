"""What rounding a layer's input costs, beside what the weights lose.

llama.cpp rounds the input of quantised weights to 8 bits: on a CPU by blocks of 256 for
types of such blocks, where one massive activation costs all its neighbours more, and of
32 for the others. A file that has one group of tensors in a type that holds its
weights nearly exactly shows that, beside the same values in a base of 16 bits.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ewq_gguf.errors import ResourceError
from ewq_gguf.ggml_types import activation_block, finest_types
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.optimal.candidate_types import quantizable
from ewq_gguf.optimal.probes import Prober
from ewq_gguf.optimal.sensitivity import Group, halves, next_groups, roles_of
from ewq_gguf.plan.assemble import assemble
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.records import Plan, UniformPolicy
from ewq_gguf.stages.candidate_files import measure_plans, types_sha256

Rounding = dict[str, dict[str, float]]

#: The type whose weights are nearest to exact, by activations that share a scale.
_FINEST = finest_types()
#: A group that costs less of the whole is not looked into.
_LEAST_SHARE = 0.04
#: Groups that are halved before the clock is looked at again.
_MAX_HALVED = 2


def measured_rounding(
    prober: Prober,
    toolchain: Toolchain,
    subject: ModelTensors,
    tried: Mapping[str, Collection[str]],
    seconds: float,
) -> Rounding:
    """Nats that rounding its input costs each tensor in each type.

    Roles first, as long as there is time for all of them; then halves of what costs
    much. Within a group it is shared out evenly.

    Args:
        prober: of the model; files are measured on its windows.
        toolchain: that quantises.
        subject: what is planned.
        tried: types by tensor.
        seconds: that may be taken.

    Returns:
        By tensor and type; nothing where there was no time, or no room for a file.

    Raises:
        EwqError: of the stage that failed, with what to do.
    """
    roles = [
        (group, ggml_type)
        for length, ggml_type in _FINEST.items()
        for group in roles_of(n for n in tried if _fitting(tried[n], length))
    ]
    started = time.monotonic()
    if not roles or seconds <= 0:
        return {}
    leaves: dict[tuple[Group, str], float] = {}
    slowest = 0.0
    # Were some roles known and others not, it would be held against the known. The
    # first may be in the cache: what one takes is looked at more than once.
    while todo := roles[len(leaves) : max(2 * len(leaves), 1)]:
        before = time.monotonic()
        try:
            leaves |= _costs(prober, toolchain, subject, todo)
        except ResourceError as error:  # such a file is nearly as large as the base
            prober.progress.note(f"what rounding costs is not measured: {error}")
            return {}
        now = time.monotonic()
        slowest = max(slowest, (now - before) / len(todo))
        if now - started + slowest * (len(roles) - len(leaves)) > seconds:
            return {}
    while time.monotonic() < started + seconds:
        large = [
            (group, ggml_type)
            for ggml_type in _FINEST.values()
            for group in next_groups(
                {
                    group: cost
                    for (group, of), cost in leaves.items()
                    if of == ggml_type
                },
                _LEAST_SHARE,
            )[:_MAX_HALVED]
        ]
        if not large:
            break
        for cell in large:
            del leaves[cell]
        parts = [
            (half, ggml_type) for group, ggml_type in large for half in halves(group)
        ]
        leaves |= _costs(prober, toolchain, subject, parts)
    rounding: Rounding = {}
    for (group, finest), cost in leaves.items():
        for name in group:
            types = _fitting(tried[name], activation_block(finest))
            known = dict.fromkeys(types, cost / len(group))
            rounding[name] = rounding.get(name, {}) | known
    return rounding


def _fitting(types: Collection[str], length: int) -> list[str]:
    return [ggml_type for ggml_type in types if activation_block(ggml_type) == length]


def _costs(
    prober: Prober,
    toolchain: Toolchain,
    subject: ModelTensors,
    cells: Sequence[tuple[Group, str]],
) -> dict[tuple[Group, str], float]:
    """Of groups, each in a type: its file's loss beyond that of the same values."""
    tensors = quantizable(subject)
    subject = replace(subject, lattices={})  # what is raw here stays raw
    raw = {tensor.name: subject.raw_type for tensor in tensors}
    plans = {
        (group, ggml_type): assemble(
            subject,
            UniformPolicy(ggml_type=ggml_type),
            raw | dict.fromkeys(group, ggml_type),
        )
        for group, ggml_type in cells
    }
    # From 32 bits to 16, all the other tensors are rounded too: that is no role's.
    others = []
    if any(tensor.ggml_type != subject.raw_type for tensor in tensors):
        others = [assemble(subject, UniformPolicy(ggml_type=subject.raw_type), raw)]
    parts = measure_plans(
        [*plans.values(), *others],
        replace(prober.request, reference=None),
        toolchain,
        options=prober.options,
        progress=prober.progress,
        may_fail=True,
    )

    def loss(plan: Plan) -> float:
        part = parts.get(types_sha256(plan))
        # What cannot be measured is taken to cost nothing.
        return part.quality.kld.kld_mean_nats if part and part.quality.kld else 0.0

    weights = prober.with_noise(cells)
    beside = sum(map(loss, others))
    return {
        cell: max(loss(plan) - weights[cell] - beside, 0.0)
        for cell, plan in plans.items()
    }

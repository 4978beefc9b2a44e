"""One type for each tensor: the least cost in a file that is small and fast enough."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ewq_gguf.ggml_types import tensor_bytes
from ewq_gguf.optimal.candidate_types import fixed_bytes, quantizable
from ewq_gguf.optimal.knapsack import solve_knapsack
from ewq_gguf.optimal.latency import LatencyTarget
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.plan.sizes import padded

#: Ticks of the clock that a token's time is counted in.
_N_TICKS = 2.0**40


def solve_allocation(
    subject: ModelTensors,
    costs: Mapping[str, Mapping[str, float]],
    limit_bytes: int,
    latency_target: LatencyTarget | None = None,
) -> dict[str, str] | None:
    """Choose the types that cost least in a file that is small and fast enough.

    Args:
        subject: The model's tensors.
        costs: Nats by tensor and type; other types are not in question.
        limit_bytes: Bytes of the whole file, at most.
        latency_target: Seconds per token, at most; None for any.

    Returns:
        Type of each tensor; None where no types are as small, or as small and as fast.
    """
    tensors = [tensor for tensor in quantizable(subject) if tensor.name in costs]
    types = sorted(set().union(*costs.values()))
    cost = np.array(
        [[costs[t.name].get(name, np.inf) for name in types] for t in tensors]
    )
    usages = [
        np.array(
            [
                [
                    padded(tensor_bytes(n, t.shape)) if n in costs[t.name] else 0
                    for n in types
                ]
                for t in tensors
            ]
        )
    ]
    limits = [float(limit_bytes - fixed_bytes(subject))]
    if latency_target is not None:
        latency, weights = latency_target.latency, latency_target.weights
        per_weight = [latency.of_type(name) for name in types]
        usages.append(np.outer([weights[t.name] for t in tensors], per_weight))
        limits.append(latency_target.max_seconds - latency.constant_seconds)
        if limits[1] > 0:
            # Integers, rounded up: sums are the same in any order.
            usages[1] = np.ceil(usages[1] * (_N_TICKS / limits[1]))
            limits[1] = _N_TICKS - 1
    selection = solve_knapsack(cost, usages, limits)
    if selection is None:
        return None
    chosen = zip(tensors, selection.options.tolist(), strict=True)
    return {tensor.name: types[option] for tensor, option in chosen}

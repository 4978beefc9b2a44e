"""How long a token takes: what reading and multiplying a weight of each type costs.

    seconds per token = constant + sum over types of r x weights of that type

A weight counts as often as a token needs it: experts by the share that is used, an
embedding that only looks rows up not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from ewq_gguf.ggml_types import bits_per_weight
from ewq_gguf.optimal.settings import DEFAULT, SearchSettings
from ewq_gguf.records import LayoutTensor
from ewq_gguf.tensor_names import role


@dataclass(frozen=True)
class Latency:
    """Time per token on one device.

    Attributes:
        constant_seconds: Seconds that do not depend on the types.
        seconds_per_weight: Seconds by type.
        seconds_per_bit: Seconds per weight and bit, for types that were not timed.
    """

    constant_seconds: float
    seconds_per_weight: Mapping[str, float]
    seconds_per_bit: float

    def of_type(self, ggml_type: str) -> float:
        """Seconds per weight."""
        by_bits = self.seconds_per_bit * bits_per_weight(ggml_type)
        return self.seconds_per_weight.get(ggml_type, by_bits)

    def seconds(self, types: Mapping[str, str], weights: Mapping[str, float]) -> float:
        """Seconds per token with these types.

        Args:
            types: Type of each tensor.
            weights: How many weights of each tensor a token needs.
        """
        return self.constant_seconds + sum(
            weights[name] * self.of_type(ggml_type) for name, ggml_type in types.items()
        )


@dataclass(frozen=True)
class LatencyTarget:
    """How fast a file has to generate.

    Attributes:
        latency: Times per weight on the device.
        weights: How many weights of each tensor a token needs.
        max_seconds: The longest that a token may take.
    """

    latency: Latency
    weights: Mapping[str, float]
    max_seconds: float

    def is_met(self, types: Mapping[str, str]) -> bool:
        """Whether a file with these types, by tensor, is fast enough."""
        return self.latency.seconds(types, self.weights) <= self.max_seconds


def needed_weights(
    tensors: Sequence[LayoutTensor], expert_share: float = 1.0
) -> dict[str, float]:
    """How many weights of each tensor a token needs.

    Args:
        tensors: All that are quantised.
        expert_share: Share of the experts that a token is sent to.
    """
    has_head = any(tensor.name == "output.weight" for tensor in tensors)
    needed = {}
    for tensor in tensors:
        share = 1.0
        is_looked_up = tensor.name.startswith("token_embd") and has_head
        if is_looked_up or tensor.name.startswith("per_layer_token_embd"):
            share = 0.0
        elif role(tensor.name).endswith("_exps"):
            share = expert_share
        needed[tensor.name] = share * prod(tensor.shape)
    return needed


def fit_latency(
    files: Sequence[tuple[Mapping[str, float], float]],
    settings: SearchSettings = DEFAULT,
) -> Latency:
    """The times per weight that explain measured files best.

    The prior is normal, around times in proportion to bits (memory bandwidth), so that
    a type that is in few files is not taken to be free. The result is the posterior's
    mean, never below a twentieth of the prior's.

    Args:
        files: For each file, the weights of each type that a token needs, and the
            seconds that it takes.
        settings: Constants of the prior and the noise.
    """
    types = sorted({ggml_type for weights, _ in files for ggml_type in weights})
    rows = np.array(
        [
            [1.0, *(weights.get(ggml_type, 0.0) for ggml_type in types)]
            for weights, _ in files
        ]
    )
    seconds = np.array([seconds for _, seconds in files])
    bits = np.array([bits_per_weight(ggml_type) for ggml_type in types])
    per_bit = float(np.median(seconds / (rows[:, 1:] @ bits)))
    prior = np.array([0.0, *(per_bit * bits)])
    constant_std = settings.latency_constant_std * seconds.mean()
    std = np.array([constant_std, *(settings.latency_type_std * per_bit * bits)])
    noise = settings.latency_noise * seconds
    # In units of the prior's deviations and the noise, the system is well conditioned.
    scaled = rows * std / noise[:, None]
    residual = (seconds - rows @ prior) / noise
    solved = np.linalg.solve(scaled.T @ scaled + np.eye(len(std)), scaled.T @ residual)
    fitted = np.maximum(prior + std * solved, prior / 20)
    per_weight = dict(zip(types, fitted[1:].tolist(), strict=True))
    return Latency(float(fitted[0]), per_weight, per_bit)

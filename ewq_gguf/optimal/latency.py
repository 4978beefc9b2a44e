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
from ewq_gguf.records import LayoutTensor
from ewq_gguf.tensor_names import role

#: Relative standard deviations: of a measured time, of a type's time per weight around
#: that of its bits, and of the constant as a share of a token's time.
_NOISE, _TYPE_STD, _CONSTANT_STD = 0.02, 0.5, 0.3


@dataclass(frozen=True)
class Latency:
    """What a token takes on one device.

    Attributes:
        constant_seconds: whatever the types.
        seconds_per_weight: by type.
        seconds_per_bit: of a type that was not timed.
    """

    constant_seconds: float
    seconds_per_weight: Mapping[str, float]
    seconds_per_bit: float

    def of_type(self, ggml_type: str) -> float:
        """Seconds per weight."""
        known = self.seconds_per_weight.get(ggml_type)
        return (
            self.seconds_per_bit * bits_per_weight(ggml_type)
            if known is None
            else known
        )

    def seconds(self, types: Mapping[str, str], weights: Mapping[str, float]) -> float:
        """A token's time with these types.

        Args:
            types: by tensor.
            weights: that a token needs, by tensor.
        """
        return self.constant_seconds + sum(
            weights[name] * self.of_type(ggml_type) for name, ggml_type in types.items()
        )


def needed_weights(
    tensors: Sequence[LayoutTensor], expert_share: float = 1.0
) -> dict[str, float]:
    """How many weights of each tensor a token needs.

    Args:
        tensors: that are quantised.
        expert_share: experts that a token is sent to, of all.
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


def fit_latency(files: Sequence[tuple[Mapping[str, float], float]]) -> Latency:
    """The times per weight that explain measured files best.

    A normal prior around times in proportion to bits (memory bandwidth), so that a type
    that is in few files is not thought free; the posterior's mean, never below a
    twentieth of the prior's.

    Args:
        files: weights by type that a token needs, and its seconds.
    """
    types = sorted({ggml_type for weights, _ in files for ggml_type in weights})
    rows = np.array(
        [
            [1.0, *(weights.get(ggml_type, 0.0) for ggml_type in types)]
            for weights, _ in files
        ]
    )
    seconds = np.array([taken for _, taken in files])
    bits = np.array([bits_per_weight(ggml_type) for ggml_type in types])
    pace = float(np.median(seconds / (rows[:, 1:] @ bits)))
    prior = np.array([0.0, *(pace * bits)])
    std = np.array([_CONSTANT_STD * seconds.mean(), *(_TYPE_STD * pace * bits)])
    # In units of the prior's deviations and the noise: well conditioned.
    scaled = rows * std / (_NOISE * seconds)[:, None]
    left = (seconds - rows @ prior) / (_NOISE * seconds)
    solved = np.linalg.solve(scaled.T @ scaled + np.eye(len(std)), scaled.T @ left)
    found = np.maximum(prior + std * solved, prior / 20)
    per_weight = dict(zip(types, found[1:].tolist(), strict=True))
    return Latency(float(found[0]), per_weight, pace)

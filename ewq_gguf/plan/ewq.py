"""The paper's decision: which precision of the ladder an entropy stands for.

    H >= high             -> highest of the ladder
    T <= H < high         -> second highest          T = mu - X sigma
    H <  T, and H < high  -> third highest, where the ladder has three or more

Rule `mean` (arXiv:2503.04704 section 3.3): mu and sigma of the layers, high = mu. Rule
`q75` (the public proof of concept): mu weighted by the layers' parameters, sigma
unweighted, high = the 75th percentile. A ladder of two never reaches T: the paper's
"8bit mixed". What a ladder has below its third is there for budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, sqrt
from typing import Literal

import numpy as np

from ewq_gguf.records.plan import Thresholds


def thresholds(
    entropies: Sequence[float],
    factor: float,
    *,
    rule: Literal["mean", "q75"] = "mean",
    n_weights: Sequence[int] = (),
) -> Thresholds:
    """The numbers that `decide` compares with.

    Args:
        entropies: at least one, of the layers or of the tensors of a role.
        factor: X.
        rule: `mean` or `q75`.
        n_weights: weights of each layer or tensor; rule `q75` needs them.
    """
    mean = _mean(entropies, [1] * len(entropies))
    variance = fsum((entropy - mean) ** 2 for entropy in entropies) / len(entropies)
    std = sqrt(variance)
    high = mean
    if rule == "q75":
        mean = _mean(entropies, n_weights)
        high = float(np.percentile(entropies, 75))
    return Thresholds(mean=mean, std=std, low=mean - factor * std, high=high)


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    """The weighted mean; of equal values it is that value, not a rounding below it."""
    total = fsum(w * v for w, v in zip(weights, values, strict=True))
    return min(max(total / sum(weights), min(values)), max(values))


def decide(entropy: float, limits: Thresholds, n_rungs: int) -> int:
    """The rung of a ladder with `n_rungs` (2 or more), counted from 0, the lowest."""
    if entropy >= limits.high:
        return n_rungs - 1
    if n_rungs >= 3 and entropy < limits.low:
        return n_rungs - 3
    return n_rungs - 2


def z_score(entropy: float, limits: Thresholds) -> float:
    """How many sigmas an entropy lies above the mean; 0 where all are equal."""
    return (entropy - limits.mean) / limits.std if limits.std else 0.0

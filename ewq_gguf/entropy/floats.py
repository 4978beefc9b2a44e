"""32-bit weights, in two streaming passes over fixed parts.

The first pass finds what the second needs: range, mean and the softmax's normaliser.
Parts are cut at fixed offsets and combined in order, so that the result does not
depend on which thread read which part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, log, sqrt

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ewq_gguf.entropy.summary import (
    Summary,
    histogram_bits,
    histogram_edges,
    histogram_index,
    p_log1p,
)


@dataclass(frozen=True)
class FirstPass:
    """A part's range and softmax sums, relative to its own maximum."""

    n_weights: int
    n_finite: int
    min: float
    max: float
    total: float
    exp_sum: float
    exp_moment: float


@dataclass(frozen=True)
class Norms:
    """What the second pass needs of the whole tensor."""

    n_weights: int
    n_finite: int
    min: float
    max: float
    mean: float
    exp_sum: float
    exp_moment: float


@dataclass(frozen=True)
class SecondPass:
    """A part's deviations, entropy tail and histogram."""

    square: float
    tail: float
    bins: NDArray[np.int64]


def first_pass(data: NDArray[np.float32]) -> FirstPass:
    """Range and sums of one part, (n,) float32."""
    return FirstPass(data.size, *_first(data))


def combine_first(parts: Sequence[FirstPass]) -> Norms:
    """The whole tensor's norms from its parts, in order."""
    finite = [part for part in parts if part.n_finite]
    n_weights = sum(part.n_weights for part in parts)
    if not finite:
        return Norms(n_weights, 0, 0.0, 0.0, 0.0, 0.0, 0.0)
    high = max(part.max for part in finite)
    n_finite = sum(part.n_finite for part in finite)
    scales = [float(np.exp(part.max - high)) for part in finite]
    return Norms(
        n_weights=n_weights,
        n_finite=n_finite,
        min=min(part.min for part in finite),
        max=high,
        mean=fsum(part.total for part in finite) / n_finite,
        exp_sum=fsum(s * p.exp_sum for s, p in zip(scales, finite, strict=True)),
        # sum e^(w - high) (w - high), each part's own maximum moved to `high`
        exp_moment=fsum(
            s * (p.exp_moment + (p.max - high) * p.exp_sum)
            for s, p in zip(scales, finite, strict=True)
        ),
    )


def second_pass(
    data: NDArray[np.float32], norms: Norms, *, epsilon: float, n_bins: int
) -> SecondPass:
    """Deviations, entropy tail and histogram of one part, (n,) float32."""
    edges = histogram_edges(norms.min, norms.max, n_bins)
    bins = np.zeros(n_bins, np.int64)
    square, tail = _second(
        data, norms.mean, norms.max, norms.exp_sum, epsilon, edges, bins
    )
    return SecondPass(square, tail, bins)


def summarise_floats(
    norms: Norms, parts: Sequence[SecondPass], *, epsilon: float
) -> Summary:
    """Everything about a tensor from both passes; see codes.summarise_codes."""
    if norms.n_finite == 0:
        return Summary.empty(norms.n_weights)
    if epsilon > 0:
        entropy = -(log(epsilon) + fsum(part.tail for part in parts))
    else:
        entropy = log(norms.exp_sum) - norms.exp_moment / norms.exp_sum
    bins: NDArray[np.int64] = np.stack([part.bins for part in parts]).sum(axis=0)
    return Summary(
        n_weights=norms.n_weights,
        n_nonfinite=norms.n_weights - norms.n_finite,
        softmax_entropy_nats=entropy,
        histogram_entropy_bits=histogram_bits(bins),
        mean=norms.mean,
        std=sqrt(fsum(part.square for part in parts) / norms.n_finite),
        min=norms.min,
        max=norms.max,
    )


@njit(nogil=True, cache=True)
def _first(
    data: NDArray[np.float32],
) -> tuple[int, float, float, float, float, float]:
    low, high, total, n_finite = np.inf, -np.inf, 0.0, 0
    for i in range(data.size):
        value = np.float64(data[i])
        if np.isfinite(value):
            low = min(low, value)
            high = max(high, value)
            total += value
            n_finite += 1
    exp_sum, exp_moment = 0.0, 0.0
    for i in range(data.size):
        value = np.float64(data[i])
        if np.isfinite(value):
            weight = np.exp(value - high)
            exp_sum += weight
            exp_moment += weight * (value - high)
    return n_finite, low, high, total, exp_sum, exp_moment


@njit(nogil=True, cache=True)
def _second(
    data: NDArray[np.float32],
    mean: float,
    high: float,
    exp_sum: float,
    epsilon: float,
    edges: NDArray[np.float64],
    bins: NDArray[np.int64],
) -> tuple[float, float]:
    square, tail = 0.0, 0.0
    for i in range(data.size):
        value = np.float64(data[i])
        if np.isfinite(value):
            square += (value - mean) ** 2
            bins[histogram_index(value, edges)] += 1
            if epsilon > 0:
                tail += p_log1p(np.exp(value - high) / exp_sum, epsilon)
    return square, tail

"""16-bit weights by their codes: count each code once, then know everything.

A 16-bit format has 65 536 codes, so the counts of the codes lose nothing: every measure
follows from them, and counts of row ranges, shards or experts just add. Counting is
integer arithmetic: the result does not depend on the order of the parts.
"""

from __future__ import annotations

from functools import cache

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

N_CODES = 1 << 16

#: Largest |weight| for which exp() of the plain weight stays well inside float64.
_MAX_PLAIN = 600.0


@cache
def code_values(dtype: str) -> NDArray[np.float64]:
    """The weight each code stands for; (65536,) float64, NaN and inf among them.

    Args:
        dtype: `BF16` or `F16`.

    Raises:
        ValueError: it is neither.
    """
    codes = np.arange(N_CODES, dtype=np.uint16)
    if dtype == "BF16":
        values = (codes.astype(np.uint32) << 16).view(np.float32)
    elif dtype == "F16":
        values = codes.view(np.float16).astype(np.float32)
    else:
        raise ValueError(f"{dtype} is not a 16-bit dtype")
    with np.errstate(invalid="ignore"):  # signalling NaN codes
        return values.astype(np.float64)


@njit(nogil=True, cache=True)
def count_codes(data: NDArray[np.uint16], counts: NDArray[np.uint32]) -> None:
    """Add each code's occurrences in `data`, (n,) uint16, to `counts`, (65536,)."""
    for i in range(data.size):
        counts[data[i]] += 1


def summarise_codes(
    counts: NDArray[np.int64], dtype: str, *, epsilon: float, n_bins: int
) -> Summary:
    """Everything about a tensor, from its code counts.

    Args:
        counts: (65536,) occurrences of each code.
        dtype: `BF16` or `F16`.
        epsilon: of the softmax measure.
        n_bins: of the histogram measure.

    Returns:
        The summary of the finite weights; non-finite ones are only counted.
    """
    values = code_values(dtype)
    n_weights = int(counts.sum())
    low, high, n_finite = _range(counts, values)
    if n_finite == 0:
        return Summary.empty(n_weights)
    if max(-low, high) < _MAX_PLAIN:
        shift, weights = 0.0, _plain_exponentials(dtype)
    else:
        shift = high
        with np.errstate(over="ignore", invalid="ignore"):
            weights = np.exp(values - shift)
    edges = histogram_edges(low, high, n_bins)
    entropy, mean, std, bins = _summarise(
        counts, values, weights, shift, n_finite, edges, epsilon
    )
    return Summary(
        n_weights=n_weights,
        n_nonfinite=n_weights - n_finite,
        softmax_entropy_nats=entropy,
        histogram_entropy_bits=histogram_bits(bins),
        mean=mean,
        std=std,
        min=low,
        max=high,
    )


@cache
def _plain_exponentials(dtype: str) -> NDArray[np.float64]:
    """exp(value) of each code, 0 where it would leave float64's range."""
    values = code_values(dtype)
    usable = np.abs(values) < _MAX_PLAIN
    result: NDArray[np.float64] = np.where(
        usable, np.exp(np.where(usable, values, 0.0)), 0.0
    )
    return result


@njit(nogil=True, cache=True)
def _range(
    counts: NDArray[np.int64], values: NDArray[np.float64]
) -> tuple[float, float, int]:
    low, high, n_finite = np.inf, -np.inf, 0
    for code in range(counts.size):
        if counts[code] and np.isfinite(values[code]):
            low = min(low, values[code])
            high = max(high, values[code])
            n_finite += counts[code]
    return low, high, n_finite


@njit(nogil=True, cache=True)
def _summarise(
    counts: NDArray[np.int64],
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    shift: float,
    n_finite: int,
    edges: NDArray[np.float64],
    epsilon: float,
) -> tuple[float, float, float, NDArray[np.int64]]:
    """Softmax entropy, mean, std and histogram; `weights` are exp(values - shift)."""
    total, moment, mean = 0.0, 0.0, 0.0
    bins = np.zeros(edges.size - 1, np.int64)
    for code in range(counts.size):
        n = counts[code]
        value = values[code]
        if n and np.isfinite(value):
            total += n * weights[code]
            moment += n * (weights[code] * (value - shift))
            mean += n * value
            bins[histogram_index(value, edges)] += n
    mean /= n_finite
    tail, square = 0.0, 0.0
    for code in range(counts.size):
        n = counts[code]
        value = values[code]
        if n and np.isfinite(value):
            square += n * (value - mean) ** 2
            if epsilon > 0:
                tail += n * p_log1p(weights[code] / total, epsilon)
    std = np.sqrt(square / n_finite)
    if epsilon > 0:
        return -(np.log(epsilon) + tail), mean, std, bins
    return np.log(total) - moment / total, mean, std, bins

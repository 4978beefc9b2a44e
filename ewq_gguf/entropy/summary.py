"""The small formulas that codes and floats share."""

from __future__ import annotations

from math import log1p, log2

import numpy as np
from numba import njit
from numpy.typing import NDArray

#: Weights farther from the mean than this many standard deviations are outliers.
OUTLIER_SIGMAS = 6.0


#: Below this six terms of ln(1 + x)'s series are exact to float64.
SERIES_LIMIT = 1e-3


@njit(nogil=True, cache=True, inline="always")
def p_log1p(p: float, epsilon: float) -> float:
    """One term of the tail: p ln(1 + p / epsilon).

    -sum p ln(p + epsilon) = -ln(epsilon) - the sum of these.

    p / epsilon is mostly tiny: six terms of the series are exact to float64 there, and
    ten times faster than the library's log1p.
    """
    x = p / epsilon
    if x > SERIES_LIMIT:
        return p * log1p(x)
    return (
        p
        * x
        * (1 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x * (1 / 5 - x * (1 / 6))))))
    )


def histogram_edges(low: float, high: float, n_bins: int) -> NDArray[np.float64]:
    """The edges `numpy.histogram` uses on [low, high]; (n_bins + 1,)."""
    if low == high:  # numpy widens an empty range the same way
        half = max(0.5, abs(low) * 2**-40)  # 0.5 is nothing beside a huge weight
        low, high = low - half, high + half
    return np.linspace(low, high, n_bins + 1)


def histogram_scale(edges: NDArray[np.float64]) -> float:
    """Bins per unit; the edges of `histogram_edges` always have a width."""
    return (edges.size - 1) / float(edges[-1] - edges[0])


@njit(nogil=True, cache=True, inline="always")
def histogram_index(value: float, edges: NDArray[np.float64], scale: float) -> int:
    """The bin `numpy.histogram` puts a value in, rounding at the edges included."""
    last = edges.size - 2
    index = min(max(int((value - edges[0]) * scale), 0), last)
    if value < edges[index]:
        index -= 1
    elif value >= edges[index + 1] and index != last:
        index += 1
    return max(index, 0)


@njit(nogil=True, cache=True)
def histogram_bits(bins: NDArray[np.int64]) -> float:
    """-sum q log2 q of counts, in bits; 0 where one thing is counted, or nothing."""
    total = bins.sum()
    bits = 0.0
    for n in bins:
        if 0 < n < total:
            bits -= n / total * log2(n / total)
    return bits

"""What is said of a set of weights, and the small formulas both measures share."""

from __future__ import annotations

from dataclasses import dataclass
from math import log1p
from typing import Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

#: Weights farther from the mean than this many standard deviations are outliers.
OUTLIER_SIGMAS = 6.0


@dataclass(frozen=True)
class Summary:
    """A tensor's numbers; see records.scan.TensorScan for the units."""

    n_weights: int
    n_nonfinite: int
    softmax_entropy_nats: float
    histogram_entropy_bits: float
    mean: float
    std: float
    min: float
    max: float
    excess_kurtosis: float
    outlier_share: float
    zero_share: float
    exponent_entropy_bits: float
    code_entropy_bits: float | None
    n_distinct: int | None

    @classmethod
    def empty(cls, n_weights: int) -> Self:
        """Of a tensor without one finite weight."""
        zero = 0.0
        return cls(
            n_weights, n_weights, zero, zero, zero, zero, zero, zero, zero, zero, zero,
            exponent_entropy_bits=zero, code_entropy_bits=None, n_distinct=None,
        )  # fmt: skip


@njit(nogil=True, cache=True, inline="always")
def p_log1p(p: float, epsilon: float) -> float:
    """One term of the tail: p ln(1 + p / epsilon).

    -sum p ln(p + epsilon) = -ln(epsilon) - the sum of these.

    p / epsilon is mostly tiny: six terms of the series are exact to float64 there, and
    ten times faster than the library's log1p.
    """
    x = p / epsilon
    if x > 1e-3:
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


@njit(nogil=True, cache=True, inline="always")
def histogram_index(value: float, edges: NDArray[np.float64]) -> int:
    """The bin `numpy.histogram` puts a value in, rounding at the edges included."""
    n_bins = edges.size - 1
    low = edges[0]
    if low == edges[n_bins]:  # one value, too large for numpy's widening to show
        return 0
    index = int((value - low) * (n_bins / (edges[n_bins] - low)))
    index = min(max(index, 0), n_bins - 1)
    if value < edges[index]:
        index -= 1
    elif value >= edges[index + 1] and index != n_bins - 1:
        index += 1
    return index


def histogram_bits(bins: NDArray[np.int64]) -> float:
    """-sum q log2 q of counts, in bits; 0 where one thing is counted, or nothing."""
    if not bins.any():
        return 0.0
    q = bins[bins > 0] / bins.sum()
    return float(-(q * np.log2(q)).sum()) + 0.0

"""Compiled loops over 32- and 64-bit weights, for both passes of `floats`."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ewq_gguf.entropy.summary import histogram_index, p_log1p

Floats = NDArray[np.float32] | NDArray[np.float64]

#: Sums of powers 2 to 7 of the softmax's exponentials.
Powers = tuple[float, float, float, float, float, float]

#: Sums may be taken in any order, as wide registers do; only finite floats get there.
_REORDER = {"reassoc", "contract", "nnan", "nsz"}

#: Steps of the table of exponentials: (step / 2)^5 / 120 is below float64's last bit.
_N_STEPS = 4096
_MIN_STEP, _MAX_STEP = 1e-300, 2e-3  # 1 / step stays finite


@njit(nogil=True, cache=True, fastmath=_REORDER)
def value_range(data: Floats) -> tuple[float, float, float, int]:
    """Smallest, largest, mean, and how many are zero, of finite floats."""
    low = np.float64(data[0])
    high, total, n_zero = low, 0.0, 0
    for i in range(data.size):
        value = np.float64(data[i])
        low = min(low, value)
        high = max(high, value)
        total += value
        n_zero += int(value == 0)
    return low, high, total / data.size, n_zero


def exponentials(low: float, high: float) -> tuple[NDArray[np.float64], float]:
    """exp(w - high) at equal steps from low to high, and the step.

    Between two of them a polynomial of four terms is exact to float64, ten times
    faster than the library's exp. A wider range than that gets no table.
    """
    step = max((high - low) / _N_STEPS, _MIN_STEP)
    if step > _MAX_STEP:
        return np.empty(0), 1.0
    table: NDArray[np.float64] = np.exp(np.arange(_N_STEPS + 1) * step + (low - high))
    return table, step


@njit(nogil=True, cache=True, fastmath=_REORDER)
def softmax_sums(
    data: Floats,
    low: float,
    high: float,
    mean: float,
    table: NDArray[np.float64],
    step: float,
) -> tuple[float, float, float, Powers]:
    """Squared deviations, and the softmax's sums, of finite floats."""
    square, exp_sum, exp_moment = 0.0, 0.0, 0.0
    e2, e3, e4, e5, e6, e7 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(data.size):
        value = np.float64(data[i])
        square += (value - mean) * (value - mean)
        if table.size:
            k = np.int32((value - low) * (1 / step) + 0.5)
            rest = (value - low) - k * step
            weight = table[k] * (
                1 + rest * (1 + rest * (1 / 2 + rest * (1 / 6 + rest * (1 / 24))))
            )
        else:
            weight = np.exp(value - high)
        exp_sum += weight
        exp_moment += weight * (value - high)
        power2 = weight * weight
        power4 = power2 * power2
        e2 += power2
        e3 += power2 * weight
        e4 += power4
        e5 += power4 * weight
        e6 += power4 * power2
        e7 += power4 * power2 * weight
    return square, exp_sum, exp_moment, (e2, e3, e4, e5, e6, e7)


@njit(nogil=True, cache=True, fastmath=_REORDER)
def deviations(data: Floats, mean: float, limit: float) -> tuple[float, int]:
    """The sum of deviations' fourth powers; how many squares are beyond `limit`."""
    fourth, n_outliers = 0.0, 0
    for i in range(data.size):
        square = (np.float64(data[i]) - mean) * (np.float64(data[i]) - mean)
        fourth += square * square
        n_outliers += int(square > limit)
    return fourth, n_outliers


@njit(nogil=True, cache=True)
def count_bins(
    data: Floats,
    edges: NDArray[np.float64],
    scale: float,
    bins: NDArray[np.int64],
) -> None:
    """Count the floats in each bin of the histogram."""
    for i in range(data.size):
        bins[histogram_index(np.float64(data[i]), edges, scale)] += 1


@njit(nogil=True, cache=True)
def count_exponents(
    bits: NDArray[np.uint32] | NDArray[np.uint64],
    shift: int,
    mask: int,
    exponents: NDArray[np.int64],
) -> None:
    """Count the floats' exponent fields."""
    for i in range(bits.size):
        exponents[np.int64(bits[i] >> shift) & mask] += 1


@njit(nogil=True, cache=True)
def entropy_tail(data: Floats, high: float, exp_sum: float, epsilon: float) -> float:
    """Sum of p ln(1 + p / epsilon) over the softmax's probabilities p."""
    tail = 0.0
    for i in range(data.size):
        tail += p_log1p(np.exp(np.float64(data[i]) - high) / exp_sum, epsilon)
    return tail

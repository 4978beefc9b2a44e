"""32- and 64-bit weights, in two streaming passes over fixed parts.

The first pass finds what the second needs: range, mean and the softmax's normaliser.
Parts are cut at fixed offsets and combined in order, so that the result does not
depend on which thread read which part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import frexp, fsum, log, sqrt

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ewq_gguf.entropy.summary import (
    OUTLIER_SIGMAS,
    SERIES_LIMIT,
    histogram_bits,
    histogram_edges,
    histogram_index,
    histogram_scale,
    p_log1p,
)
from ewq_gguf.records import Statistics

Floats = NDArray[np.float32] | NDArray[np.float64]

#: No GGUF type holds a larger weight: beyond it a 64-bit one is as good as infinite.
MAX_WEIGHT = float(np.finfo(np.float32).max)

#: Below these, which only 64-bit weights reach, numbers would leave float64.
_TINY_RANGE, _TINY_STD = 1e-300, 1e-70

#: Where the exponent field lies: (shift, mask), by the bytes of a float.
_EXPONENT = {4: (23, 255), 8: (52, 2047)}
_N_EXPONENTS = 2048

#: Sums of powers 2 to 7 of the softmax's exponentials.
Powers = tuple[float, float, float, float, float, float]
_NO_POWERS: Powers = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)

#: Sums may be taken in any order, as wide registers do; only finite floats get there.
_REORDER = {"reassoc", "contract", "nnan", "nsz"}

#: Of the table of exponentials: (step / 2)^5 / 120 is below float64's last bit.
_N_STEPS = 4096
_MIN_STEP, _MAX_STEP = 1e-300, 2e-3  # 1 / step stays finite


@dataclass(frozen=True)
class FirstPass:
    """A part's range, moments, and softmax sums relative to its own maximum."""

    n_weights: int
    n_finite: int
    n_zero: int
    min: float
    max: float
    mean: float
    square: float
    exp_sum: float
    exp_moment: float
    exp_powers: Powers


@dataclass(frozen=True)
class Norms:
    """What the second pass needs of the whole tensor, and what is final already."""

    n_weights: int
    n_finite: int
    n_zero: int
    min: float
    max: float
    mean: float
    std: float
    exp_sum: float
    exp_moment: float
    exp_powers: Powers

    @property
    def unit(self) -> float:
        """A power of two that keeps fourth powers of tiny deviations from being 0."""
        return 2.0 ** -frexp(self.std)[1] if self.std < _TINY_STD else 1.0

    def has_series(self, epsilon: float) -> bool:
        """Whether p / epsilon is small enough for the entropy's series everywhere."""
        return bool(self.exp_sum) and 1 / self.exp_sum <= SERIES_LIMIT * epsilon


@dataclass(frozen=True)
class SecondPass:
    """A part's fourth moment, outliers, entropy tail, histogram and exponents."""

    fourth: float
    n_outliers: int
    tail: float
    bins: NDArray[np.int64]
    exponents: NDArray[np.int64]


def first_pass(data: Floats) -> FirstPass:
    """Range and sums of one part, (n,) float32 or float64."""
    finite = _finite(data)
    if not finite.size:
        return FirstPass(data.size, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, _NO_POWERS)
    low, high, mean, n_zero = _range(finite)
    sums = _sums(finite, low, high, mean, *_exponentials(low, high))
    return FirstPass(data.size, finite.size, n_zero, low, high, mean, *sums)


def _finite(data: Floats) -> Floats:
    """The weights that a GGUF type can hold; no copy where all are."""
    is_finite = np.abs(data) <= MAX_WEIGHT
    return data if is_finite.all() else data[is_finite]


def _scaled(data: Floats, unit: float) -> Floats:
    """Times a power of two, which takes nothing away; mostly 1."""
    return data if unit == 1 else data * unit


def combine_first(parts: Sequence[FirstPass]) -> Norms:
    """The whole tensor's norms from its parts, in order."""
    finite = [part for part in parts if part.n_finite]
    n_weights = sum(part.n_weights for part in parts)
    if not finite:
        return Norms(n_weights, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, _NO_POWERS)
    high = max(part.max for part in finite)
    n_finite = sum(part.n_finite for part in finite)
    scales = [float(np.exp(part.max - high)) for part in finite]
    mean = fsum(part.n_finite * part.mean for part in finite) / n_finite
    square = fsum(p.square + p.n_finite * (p.mean - mean) ** 2 for p in finite)
    return Norms(
        n_weights=n_weights,
        n_finite=n_finite,
        n_zero=sum(part.n_zero for part in finite),
        min=min(part.min for part in finite),
        max=high,
        mean=mean,
        std=sqrt(square / n_finite),
        exp_sum=fsum(s * p.exp_sum for s, p in zip(scales, finite, strict=True)),
        # sum e^(w - high) (w - high), each part's own maximum moved to `high`
        exp_moment=fsum(
            s * (p.exp_moment + (p.max - high) * p.exp_sum)
            for s, p in zip(scales, finite, strict=True)
        ),
        exp_powers=_combine_powers(finite, scales),
    )


def _combine_powers(parts: Sequence[FirstPass], scales: Sequence[float]) -> Powers:
    """Sums of powers 2 to 7, each part's own maximum moved to the whole's."""
    sums = [
        fsum(s**k * p.exp_powers[k - 2] for s, p in zip(scales, parts, strict=True))
        for k in range(2, 8)
    ]
    return sums[0], sums[1], sums[2], sums[3], sums[4], sums[5]


def second_pass(
    data: Floats, norms: Norms, *, epsilon: float, n_bins: int
) -> SecondPass:
    """What needs the whole tensor's norms, of one part, (n,) floats."""
    data = _finite(data)
    bins = np.zeros(n_bins, np.int64)
    exponents = np.zeros(_N_EXPONENTS, np.int64)
    unit = norms.unit
    limit = (OUTLIER_SIGMAS * norms.std * unit) ** 2
    fourth, n_outliers = _deviations(_scaled(data, unit), norms.mean * unit, limit)
    unit = 2.0**600 if 0 < norms.max - norms.min < _TINY_RANGE else 1.0
    edges = histogram_edges(norms.min * unit, norms.max * unit, n_bins)
    _count(_scaled(data, unit), edges, histogram_scale(edges), bins)
    _count_exponents(
        data.view(f"u{data.itemsize}"), *_EXPONENT[data.itemsize], exponents
    )
    tail = 0.0
    if epsilon > 0 and not norms.has_series(epsilon):
        tail = _tail(data, norms.max, norms.exp_sum, epsilon)
    return SecondPass(fourth, n_outliers, tail, bins, exponents)


def summarise_floats(
    norms: Norms, parts: Sequence[SecondPass], *, epsilon: float
) -> Statistics:
    """Everything about a tensor from both passes; see codes.summarise_codes."""
    if norms.n_finite == 0:
        return Statistics.nonfinite(norms.n_weights)
    if epsilon > 0 and norms.has_series(epsilon):
        entropy = -(log(epsilon) + _series(norms, epsilon))
    elif epsilon > 0:
        entropy = -(log(epsilon) + fsum(part.tail for part in parts))
    else:
        entropy = log(norms.exp_sum) - norms.exp_moment / norms.exp_sum
    bins: NDArray[np.int64] = np.stack([part.bins for part in parts]).sum(axis=0)
    exponents: NDArray[np.int64] = np.stack([p.exponents for p in parts]).sum(axis=0)
    fourth = fsum(part.fourth for part in parts) / norms.n_finite
    square = (norms.std * norms.unit) ** 2
    return Statistics(
        n_weights=norms.n_weights,
        n_nonfinite=norms.n_weights - norms.n_finite,
        softmax_entropy_nats=entropy,
        histogram_entropy_bits=histogram_bits(bins),
        mean=norms.mean,
        std=norms.std,
        min=norms.min,
        max=norms.max,
        excess_kurtosis=fourth / square**2 - 3 if square else 0.0,
        outlier_share=sum(part.n_outliers for part in parts) / norms.n_finite,
        zero_share=norms.n_zero / norms.n_weights,
        exponent_entropy_bits=histogram_bits(exponents),
        # More codes than can be counted in bounded memory.
        code_entropy_bits=None,
        n_distinct=None,
    )


def _series(norms: Norms, epsilon: float) -> float:
    """Sum of p ln(1 + p / epsilon), from sums of powers of the exponentials.

    Six terms of the logarithm's series, as in `p_log1p`, need powers 2 to 7.
    """
    return fsum(
        (-1) ** k * power / norms.exp_sum**k / (epsilon ** (k - 1) * (k - 1))
        for k, power in enumerate(norms.exp_powers, 2)
    )


@njit(nogil=True, cache=True, fastmath=_REORDER)
def _range(data: Floats) -> tuple[float, float, float, int]:
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


def _exponentials(low: float, high: float) -> tuple[NDArray[np.float64], float]:
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
def _sums(
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
def _deviations(data: Floats, mean: float, limit: float) -> tuple[float, int]:
    """The sum of deviations' fourth powers; how many squares are beyond `limit`."""
    fourth, n_outliers = 0.0, 0
    for i in range(data.size):
        square = (np.float64(data[i]) - mean) * (np.float64(data[i]) - mean)
        fourth += square * square
        n_outliers += int(square > limit)
    return fourth, n_outliers


@njit(nogil=True, cache=True)
def _count(
    data: Floats,
    edges: NDArray[np.float64],
    scale: float,
    bins: NDArray[np.int64],
) -> None:
    for i in range(data.size):
        bins[histogram_index(np.float64(data[i]), edges, scale)] += 1


@njit(nogil=True, cache=True)
def _count_exponents(
    bits: NDArray[np.uint32] | NDArray[np.uint64],
    shift: int,
    mask: int,
    exponents: NDArray[np.int64],
) -> None:
    """Count the floats' exponent fields."""
    for i in range(bits.size):
        exponents[np.int64(bits[i] >> shift) & mask] += 1


@njit(nogil=True, cache=True)
def _tail(data: Floats, high: float, exp_sum: float, epsilon: float) -> float:
    tail = 0.0
    for i in range(data.size):
        tail += p_log1p(np.exp(np.float64(data[i]) - high) / exp_sum, epsilon)
    return tail

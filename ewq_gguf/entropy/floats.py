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
from numpy.typing import NDArray

from ewq_gguf.entropy.float_kernels import (
    Floats,
    Powers,
    count_bins,
    count_exponents,
    deviations,
    entropy_tail,
    exponentials,
    softmax_sums,
    value_range,
)
from ewq_gguf.entropy.summary import (
    OUTLIER_SIGMAS,
    SERIES_LIMIT,
    histogram_bits,
    histogram_edges,
    histogram_scale,
)
from ewq_gguf.records import Statistics

#: No GGUF type holds a larger weight: beyond it a 64-bit one is as good as infinite.
MAX_WEIGHT = float(np.finfo(np.float32).max)

#: Below these, which only 64-bit weights reach, numbers would leave float64.
_TINY_RANGE, _TINY_STD = 1e-300, 1e-70

#: Where the exponent field lies: (shift, mask), by the bytes of a float.
_EXPONENT = {4: (23, 255), 8: (52, 2047)}
_N_EXPONENTS = 2048

_NO_POWERS: Powers = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


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
    """Sums of the whole tensor that the second pass needs."""

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
    low, high, mean, n_zero = value_range(finite)
    sums = softmax_sums(finite, low, high, mean, *exponentials(low, high))
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
    """Sums of one part, (n,) floats, that need the whole tensor's norms."""
    data = _finite(data)
    bins = np.zeros(n_bins, np.int64)
    exponents = np.zeros(_N_EXPONENTS, np.int64)
    unit = norms.unit
    limit = (OUTLIER_SIGMAS * norms.std * unit) ** 2
    fourth, n_outliers = deviations(_scaled(data, unit), norms.mean * unit, limit)
    unit = 2.0**600 if 0 < norms.max - norms.min < _TINY_RANGE else 1.0
    edges = histogram_edges(norms.min * unit, norms.max * unit, n_bins)
    count_bins(_scaled(data, unit), edges, histogram_scale(edges), bins)
    count_exponents(
        data.view(f"u{data.itemsize}"), *_EXPONENT[data.itemsize], exponents
    )
    tail = 0.0
    if epsilon > 0 and not norms.has_series(epsilon):
        tail = entropy_tail(data, norms.max, norms.exp_sum, epsilon)
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

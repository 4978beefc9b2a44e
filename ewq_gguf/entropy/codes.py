"""8- and 16-bit weights by their codes: count each once, then know everything.

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
    OUTLIER_SIGMAS,
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
    """The weight each code stands for, NaN and infinities among them.

    Args:
        dtype: `BF16`, `F16`, `F8_E4M3` (the variant without infinities) or `F8_E5M2`.

    Returns:
        (65536,) or, for FP8, (256,) float64.

    Raises:
        ValueError: it is none of these.
    """
    codes = np.arange(N_CODES, dtype=np.uint16)
    if dtype == "BF16":
        values = (codes.astype(np.uint32) << 16).view(np.float32)
    elif dtype == "F16":
        values = codes.view(np.float16).astype(np.float32)
    elif dtype == "F8_E5M2":  # the upper half of an F16
        values = (codes[:256] << 8).view(np.float16).astype(np.float32)
    elif dtype == "F8_E4M3":
        values = _e4m3_values()
    else:
        raise ValueError(f"{dtype} is not an 8- or 16-bit dtype")
    with np.errstate(invalid="ignore"):  # signalling NaN codes
        return values.astype(np.float64)


def _e4m3_values() -> NDArray[np.float32]:
    """Sign, 4 exponent bits with bias 7, 3 mantissa bits; 0x7F and 0xFF are NaN."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(
        exponent == 0,
        mantissa / 8 * 2.0**-6,
        (1 + mantissa / 8) * 2.0 ** (exponent - 7),
    )
    size[(codes & 127) == 127] = np.nan
    return np.where(codes < 128, size, -size).astype(np.float32)


@njit(nogil=True, cache=True)
def count_codes(data: NDArray[np.uint16], counts: NDArray[np.uint32]) -> None:
    """Add each code's occurrences in `data`, (n,) uint8 or uint16, to `counts`."""
    for i in range(data.size):
        counts[data[i]] += 1


def summarise_codes(
    counts: NDArray[np.int64], dtype: str, *, epsilon: float, n_bins: int
) -> Summary:
    """Everything about a tensor, from its code counts.

    Args:
        counts: occurrences of each code, as many as the dtype has.
        dtype: as for `code_values`.
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
    entropy, bins = _entropies(counts, values, weights, shift, edges, epsilon)
    mean, std, kurtosis, n_outliers = _moments(counts, values, n_finite)
    return Summary(
        n_weights=n_weights,
        n_nonfinite=n_weights - n_finite,
        softmax_entropy_nats=entropy,
        histogram_entropy_bits=histogram_bits(bins),
        mean=mean,
        std=std,
        min=low,
        max=high,
        excess_kurtosis=kurtosis,
        outlier_share=n_outliers / n_finite,
        zero_share=int(counts[values == 0].sum()) / n_weights,
        exponent_entropy_bits=histogram_bits(
            np.bincount(_exponents(dtype), counts).astype(np.int64)
        ),
        code_entropy_bits=histogram_bits(counts),
        n_distinct=int(np.count_nonzero(counts)),
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


@cache
def _exponents(dtype: str) -> NDArray[np.int64]:
    """The exponent field of each code."""
    shift, mask = {
        "BF16": (7, 255),
        "F16": (10, 31),
        "F8_E4M3": (3, 15),
        "F8_E5M2": (2, 31),
    }[dtype]
    return (np.arange(code_values(dtype).size) >> shift) & mask


@njit(nogil=True, cache=True)
def _entropies(
    counts: NDArray[np.int64],
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    shift: float,
    edges: NDArray[np.float64],
    epsilon: float,
) -> tuple[float, NDArray[np.int64]]:
    """Softmax entropy and histogram; `weights` are exp(values - shift)."""
    total, moment = 0.0, 0.0
    bins = np.zeros(edges.size - 1, np.int64)
    for code in range(counts.size):
        n = counts[code]
        value = values[code]
        if n and np.isfinite(value):
            total += n * weights[code]
            moment += n * (weights[code] * (value - shift))
            bins[histogram_index(value, edges)] += n
    if epsilon == 0:
        return np.log(total) - moment / total, bins
    tail = 0.0
    for code in range(counts.size):
        if counts[code] and np.isfinite(values[code]):
            tail += counts[code] * p_log1p(weights[code] / total, epsilon)
    return -(np.log(epsilon) + tail), bins


@njit(nogil=True, cache=True)
def _moments(
    counts: NDArray[np.int64], values: NDArray[np.float64], n_finite: int
) -> tuple[float, float, float, int]:
    """Mean, standard deviation, excess kurtosis, and how many are outliers."""
    mean = 0.0
    for code in range(counts.size):
        if counts[code] and np.isfinite(values[code]):
            mean += counts[code] * values[code]
    mean /= n_finite
    square, fourth = 0.0, 0.0
    for code in range(counts.size):
        if counts[code] and np.isfinite(values[code]):
            deviation = (values[code] - mean) ** 2
            square += counts[code] * deviation
            fourth += counts[code] * deviation * deviation
    variance = square / n_finite
    if variance == 0:
        return mean, 0.0, 0.0, 0
    n_outliers = 0
    for code in range(counts.size):
        if counts[code] and np.isfinite(values[code]):
            if (values[code] - mean) ** 2 > OUTLIER_SIGMAS**2 * variance:
                n_outliers += counts[code]
    return mean, np.sqrt(variance), fourth / n_finite / variance**2 - 3, n_outliers

"""8- and 16-bit weights by their codes: count each once, then know everything.

A 16-bit format has 65 536 codes, so the counts of the codes lose nothing: every measure
follows from them, and counts of row ranges, shards or experts just add. Counting is
integer arithmetic: the result does not depend on the order of the parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import log
from typing import Self
from zlib import crc32

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ewq_gguf.entropy.summary import (
    OUTLIER_SIGMAS,
    histogram_bits,
    histogram_edges,
    histogram_index,
    histogram_scale,
    p_log1p,
)
from ewq_gguf.records import Statistics

N_CODES = 1 << 16

#: Where a dtype's exponent field lies: (shift, mask).
_EXPONENT = {
    "BF16": (7, 255),
    "F16": (10, 31),
    "F8_E4M3": (3, 15),
    "F8_E5M2": (2, 31),
}

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


def count_codes(
    data: NDArray[np.uint8] | NDArray[np.uint16], counts: NDArray[np.uint32]
) -> None:
    """Add each code's occurrences in `data`, (n,) uint8 or uint16, to `counts`."""
    n_fours = data.size // 4 * 4
    if data.dtype == np.uint16:
        _count_fours(data[:n_fours].view(np.uint64), counts)
        data = data[n_fours:]
    _count_each(data, counts)


@njit(nogil=True, cache=True)
def _count_fours(data: NDArray[np.uint64], counts: NDArray[np.uint32]) -> None:
    """Four 16-bit codes at a time: one load fewer for each."""
    for i in range(data.size):
        four = data[i]
        counts[four & 0xFFFF] += 1
        counts[(four >> 16) & 0xFFFF] += 1
        counts[(four >> 32) & 0xFFFF] += 1
        counts[four >> 48] += 1


@njit(nogil=True, cache=True)
def _count_each(
    data: NDArray[np.uint8] | NDArray[np.uint16], counts: NDArray[np.uint32]
) -> None:
    for i in range(data.size):
        counts[data[i]] += 1


@dataclass(frozen=True)
class CodeCounts:
    """The codes that occur and how often: what is left of a 65 536-entry table.

    Attributes:
        codes: (m,) int64, rising.
        counts: (m,) int64, positive.
    """

    codes: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, table: NDArray[np.uint32] | NDArray[np.int64]) -> Self:
        """From a table of every code's occurrences."""
        return cls(*_occurring(table))

    @property
    def crc32(self) -> int:
        """Other weights have another one, most likely; the same on every machine."""
        codes = crc32(self.codes.astype("<i8", copy=False).data)
        return crc32(self.counts.astype("<i8", copy=False).data, codes)


def summarise_codes(
    code_counts: CodeCounts, dtype: str, *, epsilon: float, n_bins: int
) -> Statistics:
    """Everything about a tensor, from its code counts.

    Args:
        code_counts: the codes that occur, with their counts.
        dtype: dtype in the checkpoint, as for `code_values`.
        epsilon: epsilon of the softmax entropy.
        n_bins: bins of the histogram entropy.

    Returns:
        The summary of the finite weights; non-finite ones are only counted.
    """
    n_weights = int(code_counts.counts.sum())
    values = code_values(dtype)[code_counts.codes]
    is_finite = np.isfinite(values)
    codes, counts = code_counts.codes, code_counts.counts
    if not is_finite.all():
        codes, counts = codes[is_finite], counts[is_finite]
        values = values[is_finite]
    if not counts.size:
        return Statistics.nonfinite(n_weights)
    n_finite = int(counts.sum())
    low, high = float(values.min()), float(values.max())
    if max(-low, high) < _MAX_PLAIN:
        shift, weights = 0.0, _plain_exponentials(dtype)[codes]
    else:
        shift, weights = high, np.exp(values - high)
    edges = histogram_edges(low, high, n_bins)
    bins = _histogram(counts, values, edges, histogram_scale(edges))
    entropy = _softmax_entropy(counts, values, weights, shift, epsilon)
    mean, std, kurtosis, n_outliers = _moments(counts, values, n_finite)
    exponents = _count_exponents(codes, counts, *_EXPONENT[dtype])
    return Statistics(
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
        exponent_entropy_bits=histogram_bits(exponents),
        code_entropy_bits=histogram_bits(code_counts.counts),
        n_distinct=code_counts.codes.size,
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
def _count_exponents(
    codes: NDArray[np.int64], counts: NDArray[np.int64], shift: int, mask: int
) -> NDArray[np.int64]:
    exponents = np.zeros(mask + 1, np.int64)
    for i in range(codes.size):
        exponents[(codes[i] >> shift) & mask] += counts[i]
    return exponents


@njit(nogil=True, cache=True)
def _occurring(
    table: NDArray[np.uint32] | NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    n = 0
    for code in range(table.size):
        n += table[code] != 0
    codes, counts = np.empty(n, np.int64), np.empty(n, np.int64)
    n = 0
    for code in range(table.size):
        if table[code]:
            codes[n], counts[n] = code, table[code]
            n += 1
    return codes, counts


@njit(nogil=True, cache=True)
def _softmax_entropy(
    counts: NDArray[np.int64],
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    shift: float,
    epsilon: float,
) -> float:
    """In nats; `weights` are exp(values - shift)."""
    total, moment = 0.0, 0.0
    for i in range(counts.size):
        total += counts[i] * weights[i]
        moment += counts[i] * (weights[i] * (values[i] - shift))
    if epsilon == 0:
        return log(total) - moment / total
    tail = 0.0
    for i in range(counts.size):
        tail += counts[i] * p_log1p(weights[i] / total, epsilon)
    return -(log(epsilon) + tail)


@njit(nogil=True, cache=True)
def _histogram(
    counts: NDArray[np.int64],
    values: NDArray[np.float64],
    edges: NDArray[np.float64],
    scale: float,
) -> NDArray[np.int64]:
    bins = np.zeros(edges.size - 1, np.int64)
    for i in range(counts.size):
        bins[histogram_index(values[i], edges, scale)] += counts[i]
    return bins


@njit(nogil=True, cache=True)
def _moments(
    counts: NDArray[np.int64], values: NDArray[np.float64], n_finite: int
) -> tuple[float, float, float, int]:
    """Mean, standard deviation, excess kurtosis, and how many are outliers."""
    mean = 0.0
    for i in range(counts.size):
        mean += counts[i] * values[i]
    mean /= n_finite
    square, fourth = 0.0, 0.0
    for i in range(counts.size):
        deviation = (values[i] - mean) ** 2
        square += counts[i] * deviation
        fourth += counts[i] * deviation * deviation
    variance = square / n_finite
    if variance == 0:
        return mean, 0.0, 0.0, 0
    n_outliers = 0
    for i in range(counts.size):
        if (values[i] - mean) ** 2 > OUTLIER_SIGMAS**2 * variance:
            n_outliers += counts[i]
    return mean, np.sqrt(variance), fourth / n_finite / variance**2 - 3, n_outliers

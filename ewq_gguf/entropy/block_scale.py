"""The scale of a block whose weights are small integers times it, and the integers."""

from __future__ import annotations

from math import ceil, frexp, ldexp, nan
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ewq_gguf.entropy.intervals import Floats

Codes = NDArray[np.int8]

#: Index of 0 in an array over the integers -128 to 127.
OFFSET = 128
#: Of a scale in F16: significant bits, the last bit's exponent, the largest number.
_F16_BITS, _F16_LAST, F16_MAX = 11, -24, 65504.0
#: Of MXFP4's scale, half a power of two: the lowest and highest exponent.
_E8M0_LOW, _E8M0_HIGH = -128, 126
#: Of a float64, relative: two quotients of one number differ by less.
_LAST_BITS = 2.0**-50


class Rule(NamedTuple):
    """A type's lattice, as arrays.

    Attributes:
        allowed: (256,): whether the integer i - 128 is.
        largest: (n,): what a block's largest weight may be a multiple of.
        is_power: whether the scale is a power of two, else F16.
        window: by how much a block's integers may differ.
    """

    allowed: NDArray[np.bool_]
    largest: Floats
    is_power: bool
    window: int


@njit(nogil=True, cache=True)
def fit_blocks(
    low: Floats,
    high: Floats,
    rule: Rule,
    scales: Floats,
    integers: Codes,
) -> int:
    """Fit blocks in order until one fails.

    Args:
        low: (n, block), from `intervals`.
        high: likewise.
        rule: lattice of the type.
        scales: (n,), written; 0 of a block of zeros.
        integers: (n, block), written.

    Returns:
        How many were fitted.
    """
    scale = 0.0
    for i in range(low.shape[0]):
        # Groups, channels and whole tensors share a scale: the last one first.
        if scale == 0.0 or not _write(low[i], high[i], rule, scale, integers[i]):
            candidate = _scale(low[i], high[i], rule, integers[i])
            if np.isnan(candidate):
                return i
            if candidate == 0.0:  # all are zero: any scale does
                integers[i] = 0
                continue
            scale = candidate
        scales[i] = scale
    return int(low.shape[0])


@njit(nogil=True, cache=True)
def _write(
    low: Floats,
    high: Floats,
    rule: Rule,
    scale: float,
    integers: Codes,
) -> bool:
    """The block's integers for a scale; whether every product is the weight."""
    least, most, half = OFFSET, -OFFSET, 0.5 / scale
    for i in range(low.size):
        q = np.rint((low[i] + high[i]) * half)
        if not low[i] <= q * scale <= high[i]:
            q = np.ceil(min(low[i] / scale, high[i] / scale))
            if not low[i] <= q * scale <= high[i]:
                return False
        if not (-OFFSET <= q < OFFSET) or not rule.allowed[int(q) + OFFSET]:
            return False
        integers[i] = int(q)
        least, most = min(least, int(q)), max(most, int(q))
    return bool(most - least <= rule.window)


@njit(nogil=True, cache=True)
def _scale(low: Floats, high: Floats, rule: Rule, integers: Codes) -> float:
    """A scale that the block has, with its integers; 0 of zeros, NaN where none is."""
    top, size = 0, -1.0
    for i in range(low.size):
        if not low[i] <= high[i]:
            return nan
        middle = abs(low[i] + high[i])
        if middle > size:
            top, size = i, middle
    if low[top] <= 0 <= high[top]:
        return 0.0
    for k in range(rule.largest.size):
        first, last = _range(low, high, rule, top, rule.largest[k])
        if first > last:
            continue
        if rule.is_power:
            candidate = _power(first, last)
            if not np.isnan(candidate) and _write(low, high, rule, candidate, integers):
                return candidate
            continue
        # A scale was mostly written in F16 or BF16: of all that do, the one of fewest
        # significant bits is most likely the one that was.
        sign = -1.0 if first < 0 else 1.0
        least, most = min(abs(first), abs(last)), max(abs(first), abs(last))
        exponent = frexp(most)[1]
        for bits in range(1, _F16_BITS + 1):
            step = ldexp(1.0, max(exponent - bits, _F16_LAST))
            candidate = ceil(least / step) * step
            while candidate <= most:
                if 0 < candidate <= F16_MAX and _write(
                    low, high, rule, sign * candidate, integers
                ):
                    return sign * candidate
                candidate += step
    return nan


@njit(nogil=True, cache=True)
def _range(
    low: Floats, high: Floats, rule: Rule, top: int, q: float
) -> tuple[float, float]:
    """The scales that weights allow, if the largest is q of them; empty: (1, -1).

    A weight up to half as large has one integer only, whatever scale it is.
    """
    size = abs(low[top] + high[top])
    first, last = _quotients(low[top], high[top], q)
    for i in range(low.size):
        middle = low[i] + high[i]
        if 2 * abs(middle) > size:
            continue
        n = np.rint(middle / (first + last))
        if not -OFFSET <= n < OFFSET or not rule.allowed[int(n) + OFFSET]:
            return 1.0, -1.0
        if n != 0:
            below, above = _quotients(low[i], high[i], n)
            first, last = max(first, below), min(last, above)
        elif not low[i] <= 0 <= high[i]:
            return 1.0, -1.0
        if first - last > abs(first) * _LAST_BITS:
            return 1.0, -1.0
    if last - first <= abs(first) * _LAST_BITS:  # one is left, rounded as quotients are
        bits = abs(first) * _LAST_BITS
        return min(first, last) - bits, max(first, last) + bits
    return first, last


@njit(nogil=True, cache=True)
def _quotients(low: float, high: float, q: float) -> tuple[float, float]:
    """The scales with which q gives a number from low to high."""
    left, right = low / q, high / q
    return min(left, right), max(left, right)


@njit(nogil=True, cache=True)
def _power(first: float, last: float) -> float:
    """A power of two that MXFP4 can write, from `first` to `last`; or NaN."""
    if first <= 0:
        return nan
    mantissa, exponent = frexp(first)
    if mantissa == 0.5:
        exponent -= 1
    candidate = ldexp(1.0, exponent)
    return (
        candidate if candidate <= last and _E8M0_LOW <= exponent <= _E8M0_HIGH else nan
    )

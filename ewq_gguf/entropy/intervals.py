"""The numbers that are rounded to a weight, for each weight of a dtype."""

from __future__ import annotations

from functools import cache
from math import inf

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.entropy.codes import code_values

Floats = NDArray[np.float64]


def intervals(data: NDArray[np.generic], dtype: str) -> tuple[Floats, Floats]:
    """The interval of numbers that are rounded to each weight, ends included.

    Args:
        data: (n,) codes of `BF16` or `F16`, or float32 of `F32`.
        dtype: dtype in the checkpoint.
    """
    if dtype == "F32":
        values = data.astype(np.float64)
        return values, values
    low, high = _bounds(dtype)
    return low[data], high[data]


@cache
def _bounds(dtype: str) -> tuple[Floats, Floats]:
    """By code; ties go to the even code. NaN and infinities are nobody's."""
    values = code_values(dtype)
    codes = np.arange(values.size)
    sign, size = codes & 0x8000, codes & 0x7FFF
    above = values[np.minimum(size + 1, 0x7FFF)]
    below = np.where(size == 0, -values[1], values[np.maximum(size - 1, 0)])
    middle = values[size]
    with np.errstate(invalid="ignore"):
        # Beyond the largest number rounding goes on as if there were a next one.
        above = np.where(np.isfinite(above), above, 2 * middle - below)
        low, high = (middle + below) / 2, (middle + above) / 2
        is_odd = size % 2 == 1
        low = np.where(is_odd, np.nextafter(low, inf), low)
        high = np.where(is_odd, np.nextafter(high, -inf), high)
    finite = np.isfinite(values)
    low, high = np.where(sign, -high, low), np.where(sign, -low, high)
    return np.where(finite, low, inf), np.where(finite, high, -inf)

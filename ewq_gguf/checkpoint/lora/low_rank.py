"""Changes to a weight matrix, W + s B A and DoRA's, with the same bits everywhere.

A BLAS adds the terms of a product in an order of its own, so its last bits differ from
machine to machine, and with them a merged weight now and then. Here both factors are
cut into whole numbers so small that every sum of their products is exact in float64:
no order of additions can change it. The result is rounded to the checkpoint's type
once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

#: Types a merged weight can have.
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
_NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
_FLOAT64_BITS = 53


@dataclass(frozen=True)
class LowRank:
    """An adapter's addition to a matrix: scale * left @ right, and DoRA's magnitudes.

    Attributes:
        left: (rows, rank) float64, finite; rows are the matrix's as it is stored.
        right: (rank, columns) float64, finite.
        scale: The factor of the product.
        magnitude: the norm each row gets (DoRA), (rows,) float64; None leaves it.
    """

    left: FloatArray
    right: FloatArray
    scale: float
    magnitude: FloatArray | None = None

    def apply(self, weights: FloatArray, first_row: int) -> FloatArray:
        """Some rows of the merged matrix; (n, columns) -> (n, columns).

        Args:
            weights: rows of the matrix.
            first_row: the first one's index.
        """
        rows = slice(first_row, first_row + len(weights))
        merged = weights + self.scale * exact_product(self.left[rows], self.right)
        if self.magnitude is None:
            return merged
        factors: FloatArray = self.magnitude[rows] / row_norms(merged)
        return merged * factors[:, None]


@dataclass(frozen=True)
class ReplacedRows:
    """Rows that an adapter trained as they are, such as those of new tokens.

    Attributes:
        indices: The numbers of the rows, (n,) int64.
        values: (n, columns) float64.
    """

    indices: NDArray[np.int64]
    values: FloatArray

    def apply(self, weights: FloatArray, first_row: int) -> FloatArray:
        """Some rows of the matrix, replaced where the adapter has them."""
        inside = (self.indices >= first_row) & (self.indices < first_row + len(weights))
        merged = weights.copy()
        merged[self.indices[inside] - first_row] = self.values[inside]
        return merged


Change = LowRank | ReplacedRows


def exact_product(left: FloatArray, right: FloatArray) -> FloatArray:
    """The product of two matrices; its bits depend on no machine's order of sums.

    Each row of `left` and each column of `right` becomes two whole numbers of b bits
    per entry, relative to its largest magnitude, with rank * 2^2b <= 2^53.

    Args:
        left: (rows, rank), finite.
        right: (rank, columns), finite.

    Returns:
        (rows, columns) float64. The error is at most 4 rank 2^-2b times the largest
        magnitude of the row and that of the column: 2^-42 of it at rank 16.
    """
    rank = left.shape[1]
    n_bits = (_FLOAT64_BITS - (rank - 1).bit_length()) // 2
    left_high, left_low, left_scale = _split(left, 1, n_bits)
    right_high, right_low, right_scale = _split(right, 0, n_bits)
    low = np.hstack([left_high, left_low]) @ np.vstack([right_low, right_high])
    low *= 2.0**-n_bits
    low += left_high @ right_high
    low *= left_scale
    low *= right_scale
    return low


def _split(
    matrix: FloatArray, axis: int, n_bits: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Whole numbers h, l and powers of two s with matrix = (h + l 2^-b) s."""
    largest = np.max(np.abs(matrix), axis=axis, keepdims=True)
    exponent = np.frexp(largest)[1] - n_bits
    scaled = np.ldexp(matrix, -exponent)
    high = np.rint(scaled)
    low = np.rint(np.ldexp(scaled - high, n_bits))
    return high, low, np.ldexp(1.0, exponent)


def row_norms(matrix: FloatArray) -> FloatArray:
    """The Euclidean norm of each row; additions in one fixed order; (n, m) -> (n,)."""
    squares = matrix * matrix
    while squares.shape[1] > 1:
        half = squares.shape[1] // 2
        folded = squares[:, :half] + squares[:, half : 2 * half]
        if squares.shape[1] % 2:
            folded[:, 0] += squares[:, -1]
        squares = folded
    return np.sqrt(squares[:, 0])


def decode(data: NDArray[np.uint8], dtype: str) -> FloatArray:
    """Little-endian floats as float64, exactly; (n bytes,) -> (n weights,)."""
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        if dtype == "BF16":
            single = data.view("<u2").astype(np.uint32) << np.uint32(16)
            return single.view(np.float32).astype(np.float64)
        return data.view(np.dtype(_NUMPY[dtype]).newbyteorder("<")).astype(np.float64)


def encode(values: FloatArray, dtype: str) -> NDArray[Any]:
    """Round once to the nearest value of a type, ties to even; same shape.

    A value that is too large becomes infinite, as in IEEE 754.

    Returns:
        For BF16 the bits as uint16; else floats of the type; little-endian.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "BF16":
            return values.astype(np.dtype(_NUMPY[dtype]).newbyteorder("<"))
        single = _to_8_bits(values).astype(np.float32)
    return (single.view(np.uint32) >> np.uint32(16)).astype("<u2")


def _to_8_bits(values: FloatArray) -> FloatArray:
    """The nearest values with BF16's 8 significant bits and lowest exponent."""
    bits = np.ascontiguousarray(values).view(np.uint64)
    # BF16 keeps 7 of float64's 52 fraction bits.
    below_half = np.uint64((1 << 44) - 1)
    is_odd = (bits >> np.uint64(45)) & np.uint64(1)
    rounded = ((bits + below_half + is_odd) & ~np.uint64((1 << 45) - 1)).view(float)
    is_tiny = np.abs(rounded) < 2.0**-126
    if is_tiny.any():
        tiny = values[is_tiny]
        rounded[is_tiny] = np.copysign(np.rint(tiny * 2.0**133) * 2.0**-133, tiny)
    return rounded

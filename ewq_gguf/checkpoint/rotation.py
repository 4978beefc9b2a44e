"""The change of basis that takes the built-in model off its 4-bit lattice: numpy only.

Every number here is made by IEEE additions, multiplications, divisions and square
roots, one array operation each, and by SHA-256. No sine, no matrix product, no sum
over an axis: their last bits depend on the machine, and the checkpoint's hash must not.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]

_SEED = "ewq-gguf built-in model 1"
# t = tan(angle / 2), just inside the angles 0.15 and 1.41: far from 0 and from a
# quarter turn, where a rotated weight would be a lattice point again.
_T_LOWEST = 0.0752
_T_HIGHEST = 0.8511


@dataclass(frozen=True)
class Rotation:
    """An orthogonal R that turns disjoint pairs of dimensions, each by its own angle.

    On the pair (a, b) it is [[cos, sin], [-sin, cos]].

    Attributes:
        first: the dimension a of each pair, (n / 2,).
        second: the dimension b of each pair, (n / 2,).
        cosine: The cosine of each pair's angle, (n / 2,).
        sine: The sine of each pair's angle, (n / 2,).
    """

    first: IndexArray
    second: IndexArray
    cosine: FloatArray
    sine: FloatArray

    def columns(self, weights: FloatArray) -> FloatArray:
        """The product W R; (rows, n) -> (rows, n)."""
        a, b = weights[:, self.first], weights[:, self.second]
        rotated = np.empty_like(weights)
        rotated[:, self.first] = a * self.cosine - b * self.sine
        rotated[:, self.second] = a * self.sine + b * self.cosine
        return rotated

    def rows(self, weights: FloatArray) -> FloatArray:
        """The product of R transposed and W; (n, columns) -> (n, columns)."""
        cosine, sine = self.cosine[:, None], self.sine[:, None]
        a, b = weights[self.first], weights[self.second]
        rotated = np.empty_like(weights)
        rotated[self.first] = a * cosine - b * sine
        rotated[self.second] = a * sine + b * cosine
        return rotated

    def paired_gain(self, gain: FloatArray) -> FloatArray:
        """Each pair's root mean square, in both places, exact in BF16; (n,) -> (n,)."""
        a, b = gain[self.first], gain[self.second]
        paired = np.empty_like(gain)
        paired[self.first] = paired[self.second] = np.sqrt((a * a + b * b) / 2)
        return from_bfloat16(to_bfloat16(paired))

    def matrix(self) -> FloatArray:
        """R itself, (n, n)."""
        return self.columns(np.eye(2 * self.first.size))


def draw_rotation(size: int) -> Rotation:
    """The fixed rotation of `size` dimensions: the same bits on every machine.

    Dimensions are paired in the order of their hashes. Each angle has cosine
    (1 - t^2) / (1 + t^2) and sine 2 t / (1 + t^2), with t drawn evenly from a
    range that keeps the angle in [0.15, 1.41] rad.

    Args:
        size: the number of dimensions, even.

    Returns:
        The rotation.

    Raises:
        ValueError: `size` is odd.
    """
    if size % 2:
        raise ValueError(f"{size} dimensions cannot be paired")
    order = sorted(range(size), key=lambda index: _digest("pairing", index))
    drawn = [_digest("angle", pair)[:8] for pair in range(size // 2)]
    unit = np.array([int.from_bytes(bits) >> 11 for bits in drawn]) * 2.0**-53
    t = _T_LOWEST + (_T_HIGHEST - _T_LOWEST) * unit
    scale = 1.0 + t * t
    return Rotation(
        first=np.array(order[0::2], dtype=np.int64),
        second=np.array(order[1::2], dtype=np.int64),
        cosine=(1.0 - t * t) / scale,
        sine=2.0 * t / scale,
    )


def to_bfloat16(values: FloatArray) -> NDArray[np.uint16]:
    """Round to the nearest BF16, ties to even; returns its bits, same shape.

    From float64 in one step: going through float32 would round twice.

    Raises:
        ValueError: a value is below BF16's normal range, or not finite in it.
    """
    bits = np.ascontiguousarray(values).view(np.uint64)
    # BF16 keeps 7 of float64's 52 fraction bits.
    below_half = np.uint64((1 << 44) - 1)
    is_odd = (bits >> np.uint64(45)) & np.uint64(1)
    kept = (bits + below_half + is_odd) & ~np.uint64((1 << 45) - 1)
    rounded = kept.view(np.float64)
    magnitude = np.abs(rounded)
    is_normal = (magnitude >= 2.0**-126) & (magnitude < 2.0**128)
    if not np.all(is_normal | (rounded == 0)):
        raise ValueError("a value is outside the normal range of BF16")
    single = rounded.astype(np.float32).view(np.uint32)
    return (single >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> FloatArray:
    """The values of BF16 bits; same shape."""
    single = bits.astype(np.uint32) << np.uint32(16)
    return single.view(np.float32).astype(np.float64)


def _digest(what: str, index: int) -> bytes:
    return hashlib.sha256(f"{_SEED}: {what} {index}".encode()).digest()

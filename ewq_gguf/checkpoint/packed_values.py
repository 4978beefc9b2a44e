"""The values of packed weights, exactly: weight = (q - zero) x scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.checkpoint.packing import Packing
from ewq_gguf.errors import InputError
from ewq_gguf.ggml_types import MXFP4_VALUES

Array = NDArray[Any]
Integers = NDArray[np.int16]
Floats = NDArray[np.float64]

_REMEDY = "use the BF16 or F16 checkpoint it was made from"
_WORD_BITS = 32
#: The order in which AWQ keeps eight columns in the nibbles of a word.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Unpacked:
    """A weight as integers and scales.

    Attributes:
        integers: (rows, columns), or (matrices, rows, columns).
        scales: (rows, groups), likewise; group g is of columns `groups == g`.
        groups: (columns,): the group that each column is in.
        is_transposed: whether each matrix is to be written with rows for columns.
    """

    integers: Array
    scales: Floats
    groups: NDArray[np.int64]
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight as it is written."""
        *first, rows, columns = self.integers.shape
        last = (columns, rows) if self.is_transposed else (rows, columns)
        return (*first, *last)

    def pieces(self, n_weights: int) -> Iterator[Floats]:
        """The weights in float64, some rows or a matrix at a time, in their order."""
        if self.integers.ndim == 3:
            for q, scales in zip(self.integers, self.scales, strict=True):
                values = q * scales[:, self.groups]
                yield values.T if self.is_transposed else values
            return
        step = max(1, n_weights // self.integers.shape[1])
        for begin in range(0, len(self.integers), step):
            rows = slice(begin, begin + step)
            yield self.integers[rows] * self.scales[rows][:, self.groups]

    @property
    def is_in_blocks(self) -> bool:
        """Whether 32 columns beside each other always share a scale."""
        runs = self.groups[: self.groups.size // 32 * 32].reshape(-1, 32)
        return bool((runs == runs[:, :1]).all())


def unpack(packing: Packing, parts: Mapping[str, Array], name: str) -> Unpacked:
    """A weight's integers and scales.

    Args:
        packing: The packing of the checkpoint.
        parts: the arrays by their endings (`ENDINGS`); floats as float64.
        name: The weight's name, for messages.

    Raises:
        InputError: the parts do not fit together, or no ggml type could hold them.
    """
    try:
        if packing.method == "gptq":
            weight = _gptq(packing, parts)
        elif packing.method == "awq":
            weight = _awq(parts)
        elif packing.method == "mxfp4":
            weight = _e2m1(parts["_blocks"], parts["_scales"])
        elif ".weight" in parts:
            weight = _integers(parts)
        elif ".weight_shape" in parts:
            weight = _packed_integers(packing, parts)
        else:
            packed = parts[".weight_packed"]
            blocks = packed.reshape(*packed.shape[:-1], -1, 16)
            weight = _e2m1(blocks, parts[".weight_scale"])
        if not weight.integers.size:
            raise ValueError("no weights")
    except (ValueError, IndexError, KeyError, ZeroDivisionError) as error:
        shapes = ", ".join(f"{end} {part.shape}" for end, part in parts.items())
        raise InputError(
            "scan", name, f"its parts do not fit together: {shapes}", _REMEDY
        ) from error
    if packing.method in ("gptq", "awq") and not weight.is_in_blocks:
        raise InputError(
            "scan",
            name,
            f"{packing.method} has put its columns in another order, in which no ggml "
            "type has their scales",
            _REMEDY,
        )
    return weight


def words(packed: Array, bits: int, axis: int) -> Integers:
    """Unsigned integers from 32-bit words, the lowest bits first, along an axis."""
    if packed.dtype != np.int32:
        raise ValueError("integers are not packed in 32-bit words")
    shifts = np.arange(0, _WORD_BITS - bits + 1, bits, dtype=np.uint32)
    moved = np.moveaxis(packed.view(np.uint32), axis, -1)
    mask = np.uint32((1 << bits) - 1)
    found = ((moved[..., None] >> shifts) & mask).reshape(*moved.shape[:-1], -1)
    return np.moveaxis(found, -1, axis).astype(np.int16)


def _packed_integers(packing: Packing, parts: Mapping[str, Array]) -> Unpacked:
    """compressed-tensors: columns packed, zero points too, along the rows."""
    rows, columns = (int(n) for n in parts[".weight_shape"])
    packed, scales = parts[".weight_packed"], parts[".weight_scale"]
    (bits,) = (n for n in packing.bits if packed.shape[1] == -(-columns // (32 // n)))
    q = words(packed, bits, 1)[:rows, :columns]
    if q.shape != (rows, columns):
        raise ValueError("another number of weights")
    zero = parts.get(".weight_zero_point")
    if zero is None:
        q -= 1 << bits - 1
    elif zero.dtype == np.int32:
        zeros = words(zero, bits, 0)[:rows]
        q -= zeros[:, _groups(columns, zeros.shape[1], parts.get(".weight_g_idx"))]
    else:  # written as they are
        zeros = zero.astype(np.int16) + (1 << bits - 1)
        q -= zeros[:, _groups(columns, zeros.shape[1], parts.get(".weight_g_idx"))]
    return _grouped(q, scales, parts.get(".weight_g_idx"))


def _integers(parts: Mapping[str, Array]) -> Unpacked:
    """compressed-tensors: one byte per weight."""
    q = parts[".weight"].astype(np.int16)
    zero = parts.get(".weight_zero_point")
    if zero is not None:
        zeros = _by_row(zero.astype(np.int16), len(q))
        q -= zeros[:, _groups(q.shape[1], zeros.shape[1], None)]
    return _grouped(q, parts[".weight_scale"], None)


def _e2m1(blocks: Array, exponents: Array) -> Unpacked:
    """MXFP4: (..., groups, 16) bytes, two codes each, the low one first."""
    table = np.array(MXFP4_VALUES, np.int8)
    if blocks.dtype != np.uint8 or exponents.dtype != np.uint8:
        raise ValueError("codes and scales are not bytes")
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1)
    q = table[codes].reshape(*blocks.shape[:-2], -1)
    # ggml's integers are twice the codes' values.
    scales = np.ldexp(1.0, exponents.astype(np.int64) - 128)
    if scales.shape != blocks.shape[:-1] or blocks.shape[-1] != 16:
        raise ValueError("another number of scales")
    if (exponents == 255).any():
        raise ValueError("a scale is NaN")
    groups = np.arange(q.shape[-1]) // 32
    return Unpacked(q, scales, groups, is_transposed=q.ndim == 3)


def _gptq(packing: Packing, parts: Mapping[str, Array]) -> Unpacked:
    """GPTQ: (input, output), the inputs packed; zero points along the outputs."""
    (bits,) = packing.bits
    q = words(parts[".qweight"], bits, 0)
    zeros = words(parts[".qzeros"], bits, 1) + packing.zero_is_less_one
    return _by_input(q, zeros, parts[".scales"], parts.get(".g_idx"))


def _awq(parts: Mapping[str, Array]) -> Unpacked:
    """AWQ: (input, output), eight outputs in a word, in an order of its own."""

    def in_order(packed: Array) -> Integers:
        eights = words(packed, 4, 1).reshape(len(packed), -1, 8)
        return eights[:, :, _AWQ_ORDER].reshape(len(packed), -1)

    q, zeros = in_order(parts[".qweight"]), in_order(parts[".qzeros"])
    return _by_input(q, zeros, parts[".scales"], None)


def _by_input(
    q: Integers, zeros: Integers, scales: Floats, g_idx: Array | None
) -> Unpacked:
    """From (input, output) and (groups, output) to rows of outputs."""
    if zeros.shape != scales.shape or q.shape[1] != scales.shape[1]:
        raise ValueError("another number of outputs or groups")
    groups = _groups(len(q), len(scales), g_idx)
    return Unpacked((q - zeros[groups]).T, scales.T, groups)


def _grouped(q: Integers, scales: Floats, g_idx: Array | None) -> Unpacked:
    """With scales for all, for each row, or for groups of a row."""
    by_row = _by_row(scales, len(q))
    return Unpacked(q, by_row, _groups(q.shape[1], by_row.shape[1], g_idx))


def _by_row(values: Array, n_rows: int) -> Array:
    """(rows, groups) of one number, one per row, or groups of a row."""
    n_groups = values.shape[-1] if values.ndim > 1 else 1
    return np.broadcast_to(values.reshape(-1, n_groups), (n_rows, n_groups))


def _groups(n_columns: int, n_groups: int, g_idx: Array | None) -> NDArray[np.int64]:
    """The group of each column: of equal runs, or as the checkpoint has it."""
    if g_idx is not None and (g_idx >= 0).all():
        found = g_idx.astype(np.int64)
        if found.size != n_columns or found.max(initial=0) >= n_groups:
            raise ValueError("another number of groups")
        return found
    if n_columns % n_groups:
        raise ValueError("groups do not divide the columns")
    return np.arange(n_columns) // (n_columns // n_groups)

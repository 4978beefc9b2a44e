"""Blocks of ggml's types, byte by byte, from scales and integers.

Source: ggml/src/ggml-common.h and the dequantisers of ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.entropy.intervals import Floats
from ewq_gguf.entropy.lattice import Blocks, offsets
from ewq_gguf.ggml_types import IQ4_NL_VALUES, MXFP4_VALUES

Bytes = NDArray[np.uint8]

#: Types whose bytes are written here. llama-quantize itself is exact on the lattices of
#: the ternary ones.
PACKED = ("MXFP4", "Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q8_0")


def pack(name: str, blocks: Blocks) -> Bytes:
    """Blocks as a type's bytes; (n blocks, bytes of one).

    Args:
        name: a type from `PACKED`.
        blocks: fitted to its lattice.
    """
    q = blocks.integers.astype(np.int64)
    if name == "MXFP4":
        return _joined(_e8m0(blocks.scales), _nibbles(_indices(MXFP4_VALUES, q)))
    scales = _f16(blocks.scales)
    if name == "Q8_0":
        return _joined(scales, blocks.integers.view(np.uint8))
    if name == "Q4_1":
        first = offsets(blocks)
        added = _f16(blocks.scales * first)
        return _joined(scales, added, _nibbles(q - first[:, None]))
    if name == "Q5_0":
        return _joined(scales, _fifth_bits(q + 16), _nibbles((q + 16) & 15))
    codes = _indices(IQ4_NL_VALUES, q) if name == "IQ4_NL" else q + 8
    return _joined(scales, _nibbles(codes))


def _joined(*parts: Bytes) -> Bytes:
    return np.concatenate(parts, axis=1)


def _f16(values: Floats) -> Bytes:
    return values.astype("<f2")[:, None].view(np.uint8)


def _e8m0(scales: Floats) -> Bytes:
    """Half of 2^(e - 127) as e; of a block of zeros 0."""
    mantissas, exponents = np.frexp(scales)
    codes = np.where(mantissas, exponents - 1 + 128, 0)
    return codes.astype(np.uint8)[:, None]


def _indices(table: tuple[int, ...], q: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each integer stands in a table."""
    places = np.zeros(256, np.int64)
    for index, value in reversed(list(enumerate(table))):
        places[value] = index  # a negative one counts from the end
    indices: NDArray[np.int64] = places[q]
    return indices


def _nibbles(codes: NDArray[np.int64]) -> Bytes:
    """The first half in the low bits, the second in the high ones."""
    half = codes.shape[1] // 2
    return (codes[:, :half] | codes[:, half:] << 4).astype(np.uint8)


def _fifth_bits(codes: NDArray[np.int64]) -> Bytes:
    """Bit 4 of each of 32 codes as one little-endian word."""
    return np.packbits((codes >> 4 & 1).astype(np.uint8), axis=1, bitorder="little")

"""Matrices that are quantised already: written exactly, and measured.

llama-quantize searches scales of its own, and so moves weights that are on the type's
lattice already. Where it did, the blocks are written again from the scales and
integers that the base's weights are made of; file, type and size stay the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from ewq_gguf.checkpoint.gguf_file import GgufTensor, read_gguf
from ewq_gguf.errors import VerificationError
from ewq_gguf.ggml_types import row_bytes
from ewq_gguf.llamacpp.ggml import Ggml
from ewq_gguf.records import Exactness, Plan

#: Weights that are read, compared and written at a time.
_PIECE = 1 << 20
_STORAGE = {"BF16": np.uint16, "F16": np.uint16, "F32": np.float32}

Reader = Callable[[NDArray[np.uint8], str], NDArray[np.float32]]


@dataclass(frozen=True)
class _Pair:
    """A tensor of the base and of the file that is made of it."""

    base: GgufTensor
    out: GgufTensor


def write_exactly(
    plan: Plan, base: Path, out: Path, lib_dir: Path | None, *, n_threads: int = 1
) -> dict[str, Exactness]:
    """Compare the tensors that a plan calls exact, and mend those that are not.

    Args:
        plan: The file's plan.
        base: the base GGUF.
        out: llama-quantize's file; not at its final path yet.
        lib_dir: holds ggml, which reads blocks; None for gguf-py.
        n_threads: tensors side by side.

    Returns:
        How far each of these tensors is from the base's, by name.

    Raises:
        VerificationError: the file has no such tensor, or ends before it does.
    """
    names = [tensor.name for tensor in plan.tensors if tensor.is_exact]
    if not names:
        return {}
    wanted = {tensor.name: tensor for tensor in read_gguf(base).tensors}
    found = {tensor.name: tensor for tensor in read_gguf(out).tensors}
    pairs = [_Pair(wanted[n], found[n]) for n in names if n in wanted and n in found]
    read = _reader(lib_dir)
    with (
        base.open("rb") as source,
        out.open("r+b") as target,
        ThreadPoolExecutor(n_threads) as pool,
    ):
        files = source.fileno(), target.fileno()
        results = pool.map(lambda pair: _write(pair, *files, read), pairs)
        return {pair.out.name: one for pair, one in zip(pairs, results, strict=True)}


def _reader(lib_dir: Path | None) -> Reader:
    """Blocks as float32, by ggml itself where it is there."""
    if lib_dir is None:
        return lambda data, name: np.asarray(
            dequantize(data, GGMLQuantizationType[name]), np.float32
        ).ravel()
    ggml = Ggml(lib_dir)

    def read(data: NDArray[np.uint8], name: str) -> NDArray[np.float32]:
        n_weights = data.size // row_bytes(name, 256) * 256
        return ggml.dequantize(data[None], name, n_weights).ravel()

    return read


def _write(pair: _Pair, source: int, target: int, read: Reader) -> Exactness:
    # numba: not for files without such tensors
    from ewq_gguf.entropy.blocks import PACKED, pack
    from ewq_gguf.entropy.intervals import intervals
    from ewq_gguf.entropy.lattice import fit

    n_wrong, rounding, error = 0, 0.0, 0.0
    name, dtype = pair.out.ggml_type, pair.base.ggml_type
    for data, blocks, offset in _pieces(pair, source, target):
        low, high = intervals(data, dtype)
        weights = _weights(data, dtype)
        written = read(blocks, name).astype(np.float64)
        is_wrong = ~((low <= written) & (written <= high))
        if is_wrong.any() and name in PACKED and (found := fit(name, low, high)):
            packed = pack(name, found).ravel()
            os.pwrite(target, packed.data, offset)
            written = read(packed, name).astype(np.float64)
            is_wrong = ~((low <= written) & (written <= high))
        n_wrong += int(is_wrong.sum())
        moved = np.abs(written - weights)
        rounding = max(rounding, float(moved[~is_wrong].max(initial=0.0)))
        error = max(error, float(moved[is_wrong].max(initial=0.0)))
    return Exactness(n_wrong=n_wrong, max_error=error, max_rounding=rounding)


def _pieces(
    pair: _Pair, source: int, target: int
) -> Iterator[tuple[NDArray[np.generic], NDArray[np.uint8], int]]:
    """The base's weights, the file's blocks of them, and where these begin."""
    storage = np.dtype(_STORAGE[pair.base.ggml_type])
    n_all = prod(pair.base.shape)
    for begin in range(0, n_all, _PIECE):
        n = min(_PIECE, n_all - begin)
        first = pair.base.offset + begin * storage.itemsize
        data = _read(source, first, n * storage.itemsize, pair.base.name)
        size = row_bytes(pair.out.ggml_type, n)
        offset = pair.out.offset + row_bytes(pair.out.ggml_type, begin)
        yield data.view(storage), _read(target, offset, size, pair.out.name), offset


def _read(file: int, offset: int, size: int, name: str) -> NDArray[np.uint8]:
    data = bytearray()
    while len(data) < size:
        part = os.pread(file, size - len(data), offset + len(data))
        if not part:
            raise VerificationError(
                "quantize", name, "the file ends before it does", "make it again"
            )
        data += part
    return np.frombuffer(data, np.uint8)


def _weights(data: NDArray[np.generic], dtype: str) -> NDArray[np.float64]:
    if dtype == "F32":
        return data.astype(np.float64)
    from ewq_gguf.entropy.codes import code_values

    values: NDArray[np.float64] = code_values(dtype)[data]
    return values

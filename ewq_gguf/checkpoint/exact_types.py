"""The ggml types that hold a tensor of a checkpoint exactly.

Nearly every tensor is told from its first blocks; one that is quantised already is read
to its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.mapping import MappedTensor, Region, map_tensors
from ewq_gguf.checkpoint.reader import RangeReader
from ewq_gguf.checkpoint.regions import parts_of
from ewq_gguf.entropy.lattice import holding
from ewq_gguf.ggml_types import LATTICE_TYPES, block_size, n_dims
from ewq_gguf.records import Layout
from ewq_gguf.tensor_names import is_quantizable

#: Dtypes whose weights can be what is left of blocks; others have scales of their own.
_DTYPES = ("BF16", "F16", "F32")
#: Weights that are tried at a time: whole blocks of every type.
_PIECE = 1 << 15
#: Read at a time: nearly all tensors are left after the first.
_READ_BYTES = 1 << 16


def find_lattices(
    checkpoint: Checkpoint, layout: Layout | None = None, *, n_threads: int = 1
) -> dict[str, tuple[str, ...]]:
    """The types that hold tensors exactly, by name; those that none holds are left out.

    Args:
        checkpoint: opened by `open_checkpoint`, on this machine.
        layout: the converter's, for a family that names alone do not map.
        n_threads: tensors side by side.

    Raises:
        InputError: a file is not what its header says.
    """
    tensors, _ = map_tensors(checkpoint, layout)
    with RangeReader() as reader, ThreadPoolExecutor(n_threads) as pool:
        for shard in checkpoint.shards:
            reader.open(shard)
        found = pool.map(
            lambda tensor: lattice_types(
                tensor, reader, np.empty(_READ_BYTES, np.uint8)
            ),
            tensors,
        )
        return {t.name: types for t, types in zip(tensors, found, strict=True) if types}


def lattice_types(
    tensor: MappedTensor, reader: RangeReader, buffer: NDArray[np.uint8]
) -> tuple[str, ...]:
    """The types that hold every weight of a tensor, small to large.

    Args:
        tensor: A tensor; for one that llama-quantize never quantises there is no type.
        reader: with its files opened.
        buffer: (n,) uint8, reused.

    Raises:
        InputError: a file ends before its tensor does.
    """
    if (
        tensor.dtype not in _DTYPES
        or not is_quantizable(tensor.name, n_dims(tensor.shape))
        or any(region.scales for region in tensor.regions)
    ):
        return ()
    found = tuple(
        name for name in LATTICE_TYPES if tensor.shape[-1] % block_size(name) == 0
    )
    buffer = buffer[:_READ_BYTES]
    for region in tensor.regions:
        for data in _rows(tensor, region, reader, buffer):
            if not found:
                return ()
            found = holding(found, data, tensor.dtype)
    return found


def _rows(
    tensor: MappedTensor,
    region: Region,
    reader: RangeReader,
    buffer: NDArray[np.uint8],
) -> Iterator[NDArray[Any]]:
    """A region's weights, whole rows of the GGUF one after another, each (n,)."""
    pieces = (
        piece
        for part in parts_of(region, reader)
        for piece in part.pieces(reader, buffer)
    )
    if not tensor.is_transposed:
        yield from _cut(pieces, _PIECE)
        return
    # One matrix of a stack at a time: its columns are the rows.
    for data in _cut(pieces, tensor.shape[-1] * region.columns):
        yield np.ascontiguousarray(data.reshape(-1, region.columns).T).ravel()


def _cut(pieces: Iterator[NDArray[Any]], size: int) -> Iterator[NDArray[Any]]:
    """The same weights in pieces of one size; the last may be smaller."""
    kept: list[NDArray[Any]] = []
    n_kept = 0
    for piece in pieces:
        while n_kept + piece.size >= size:
            yield np.concatenate([*kept, piece[: size - n_kept]])
            piece, kept, n_kept = piece[size - n_kept :], [], 0
        if piece.size:
            kept.append(piece.copy())  # its buffer is used again
            n_kept += piece.size
    if kept:
        yield np.concatenate(kept)

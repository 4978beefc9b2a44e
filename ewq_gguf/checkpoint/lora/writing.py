"""The bytes of a weight file with merged weights, some at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.checkpoint.header import DTYPE_BYTES, TensorHeader
from ewq_gguf.checkpoint.lora.config import STAGE
from ewq_gguf.checkpoint.lora.low_rank import Change, FloatArray, decode, encode
from ewq_gguf.checkpoint.lora.steps import Step
from ewq_gguf.checkpoint.lora.targets import Target
from ewq_gguf.checkpoint.reader import BUFFER_BYTES, RangeReader
from ewq_gguf.checkpoint.shards import ShardFile
from ewq_gguf.errors import InputError

_BLOCK_WEIGHTS = 1 << 20


def merged_file(
    shard: ShardFile, targets: Mapping[str, Target], reader: RangeReader
) -> Iterator[bytes]:
    """A weight file with its changed tensors merged and the others as they are.

    Args:
        shard: the file as it is.
        targets: The changes of tensors, by name.
        reader: The reader of weight files.

    Raises:
        InputError: a merged weight is too large for the type, or is no number.
    """
    raw = _header(shard, targets)
    yield len(raw).to_bytes(8, "little") + raw
    reader.open(shard)
    buffer = np.empty(BUFFER_BYTES, np.uint8)
    for tensor in shard.header.tensors:
        pieces: Iterator[NDArray[Any]]
        if target := targets.get(tensor.name):
            pieces = _merged(target, tensor, reader)
        else:
            pieces = reader.chunks(shard, tensor.begin, tensor.end, buffer)
        for piece in pieces:
            yield piece.tobytes()


def _merged(
    target: Target, tensor: TensorHeader, reader: RangeReader
) -> Iterator[NDArray[Any]]:
    """A changed tensor's bytes, some rows at a time.

    Args:
        target: The changes of the tensor.
        tensor: its header in the checkpoint, whose type it keeps.
        reader: The reader of weight files.

    Raises:
        InputError: a merged weight is too large for the type, or is no number.
    """
    reader.open(target.shard)
    n_matrices, n_rows, n_columns = _as_matrices(target.tensor.shape)
    row_bytes = n_columns * DTYPE_BYTES[target.tensor.dtype]
    buffer = np.empty(max(1, _BLOCK_WEIGHTS // n_columns) * row_bytes, np.uint8)
    begin = target.tensor.begin
    for matrix in range(n_matrices):
        changes = [
            _read(step, reader) for step in target.steps if step.matrix == matrix
        ]
        first, end = 0, begin + n_rows * row_bytes
        for chunk in reader.chunks(target.shard, begin, end, buffer):
            weights = decode(chunk, target.tensor.dtype).reshape(-1, n_columns)
            merged = weights
            for change in changes:
                merged = change.apply(merged, first)
            piece = encode(merged, tensor.dtype)
            if not _is_finite(piece) and np.isfinite(weights).all():
                raise InputError(
                    STAGE,
                    tensor.name,
                    f"a merged weight is no number that {tensor.dtype} has",
                    "use an F32 or BF16 checkpoint of the base, or another adapter",
                )
            yield piece
            first += len(weights)
        begin = end


def _read(step: Step, reader: RangeReader) -> Change:
    """A step's change, with the adapter's weights read."""
    shard = step.adapter.file
    reader.open(shard)
    arrays: dict[str, FloatArray] = {}
    for part, header in step.parts.items():
        buffer = np.empty(max(1, header.end - header.begin), np.uint8)
        chunks = [*reader.chunks(shard, header.begin, header.end, buffer)]
        data = chunks[0] if chunks else buffer[:0]
        arrays[part] = decode(data, header.dtype).reshape(header.shape)
    return step.make(arrays)


def _is_finite(piece: NDArray[Any]) -> bool:
    if piece.dtype == np.uint16:  # BF16
        return bool(((piece & np.uint16(0x7F80)) != 0x7F80).all())
    return bool(np.isfinite(piece).all())


def _as_matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A tensor as (matrices, rows, columns)."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return 1, shape[0] if shape else 1, prod(shape[1:])


def _header(shard: ShardFile, targets: Mapping[str, Target]) -> bytes:
    """The header's bytes: the base's own, unless a shape changes."""
    shapes = {
        tensor.name: targets[tensor.name].tensor.shape
        for tensor in shard.header.tensors
        if tensor.name in targets
    }
    if all(shapes.get(t.name, t.shape) == t.shape for t in shard.header.tensors):
        return shard.header.raw
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard.header.tensors:
        shape = shapes.get(tensor.name, tensor.shape)
        end = offset + prod(shape) * DTYPE_BYTES[tensor.dtype]
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8)

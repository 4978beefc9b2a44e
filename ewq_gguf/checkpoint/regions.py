"""The weights of a region, piece by piece, as arrays.

A region is cut into parts at fixed offsets; a part's pieces are what a thread holds at
a time. A box takes whole rows into the buffer and leaves out what is not in it; an FP8
weight with scales becomes code x scale in float64, which is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.checkpoint.fp8 import scale_fits
from ewq_gguf.checkpoint.mapping import Region
from ewq_gguf.checkpoint.reader import RangeReader
from ewq_gguf.entropy.codes import code_values
from ewq_gguf.errors import InputError

#: A part is one thread's piece of work. Below 2^32 codes its counts fit uint32; the
#: size is part of the result of 32-bit sources, so it never depends on the machine.
PART_BYTES = 64 << 20

_STORAGE: Mapping[str, type[np.generic]] = {
    "BF16": np.uint16,
    "F16": np.uint16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": np.uint8,
    "F8_E5M2": np.uint8,
}

Pieces = Iterator[NDArray[Any]]


@dataclass(frozen=True)
class Part:
    """A range of a region's bytes, whole rows where rows matter.

    Attributes:
        region: it is of.
        begin: first byte in the file.
        end: one past the last.
        scales: the FP8 weight's, float64 with as many dimensions; or None.
    """

    region: Region
    begin: int
    end: int
    scales: NDArray[np.float64] | None = field(default=None, repr=False)

    @property
    def n_bytes(self) -> int:
        """How many bytes are read for it."""
        return self.end - self.begin

    def pieces(self, reader: RangeReader, buffer: NDArray[np.uint8]) -> Pieces:
        """Its weights: codes for 16-bit and plain FP8, floats otherwise; each (n,).

        Args:
            reader: with the region's file opened.
            buffer: (n,) uint8, reused.
        """
        tensor = self.region.tensor
        storage = _STORAGE[tensor.dtype]
        if self.region.box is None and self.scales is None:
            for chunk in reader.chunks(self.region.shard, self.begin, self.end, buffer):
                yield chunk.view(storage)
            return
        row_bytes = _row_bytes(self.region)
        if row_bytes > buffer.size:
            buffer = np.empty(row_bytes, np.uint8)
        buffer = buffer[: buffer.size // row_bytes * row_bytes]
        row = (self.begin - tensor.begin) // row_bytes
        for chunk in reader.chunks(self.region.shard, self.begin, self.end, buffer):
            rows = chunk.view(storage).reshape(-1, tensor.shape[-1])
            values = rows if self.scales is None else self._scaled(rows, row)
            yield _boxed(values, row, self.region)
            row += len(rows)

    def _scaled(self, codes: NDArray[Any], row: int) -> NDArray[np.float64]:
        """Codes of whole rows times their scales; (n, columns) in and out."""
        assert self.scales is not None
        assert self.region.scales is not None
        *leading, n_columns = self.region.tensor.shape
        steps = (*[1] * (len(leading) - 1), *(self.region.scales.block_size or (1, 1)))
        indices = (
            *np.unravel_index(np.arange(row, row + len(codes)), leading),
            np.arange(n_columns),
        )
        *rows, columns = (
            index // step if n > 1 else np.zeros_like(index)
            for index, step, n in zip(indices, steps, self.scales.shape, strict=True)
        )
        values = code_values(self.region.tensor.dtype)[codes]
        result: NDArray[np.float64] = values * self.scales[tuple(rows)][:, columns]
        return result


def parts_of(region: Region, reader: RangeReader) -> list[Part]:
    """A region's parts, in file order.

    Raises:
        InputError: an FP8 weight's scales do not fit its shape.
    """
    tensor = region.tensor
    scales = None if region.scales is None else _read_scales(region, reader)
    step, first, last = PART_BYTES, tensor.begin, tensor.end
    if region.box is not None or scales is not None:
        row_bytes = _row_bytes(region)
        step = max(1, step // row_bytes) * row_bytes
        first_row, n_rows = _row_span(region)
        first += first_row * row_bytes
        last = first + n_rows * row_bytes
    return [
        Part(region, begin, min(begin + step, last), scales)
        for begin in range(first, last, step)
    ]


def _row_span(region: Region) -> tuple[int, int]:
    """The first row with something of the region's box, and how many to the last."""
    shape = region.tensor.shape[:-1]
    if region.box is None or not shape:
        return 0, prod(shape)
    ranges = [range(*part) for part in region.box[:-1]]
    first = int(np.ravel_multi_index([r[0] for r in ranges], shape))
    return first, int(np.ravel_multi_index([r[-1] for r in ranges], shape)) - first + 1


def _row_bytes(region: Region) -> int:
    tensor = region.tensor
    return (tensor.end - tensor.begin) // prod(tensor.shape[:-1])


def _boxed(rows: NDArray[Any], first_row: int, region: Region) -> NDArray[Any]:
    """The part of some rows that is in the region's box, (n,) contiguous."""
    if region.box is None:
        return rows.ravel()
    *leading, columns = region.box
    shape = region.tensor.shape[:-1]
    if not shape:  # one row
        return np.ascontiguousarray(rows[0, slice(*columns)])
    indices = np.unravel_index(np.arange(first_row, first_row + len(rows)), shape)
    taken = np.ones(len(rows), bool)
    for index, (start, stop, step) in zip(indices, leading, strict=True):
        taken &= (index >= start) & (index < stop) & ((index - start) % step == 0)
    return np.ascontiguousarray(rows[taken][:, slice(*columns)]).ravel()


def _read_scales(region: Region, reader: RangeReader) -> NDArray[np.float64]:
    """The scales, with as many dimensions as the weight has."""
    assert region.scales is not None
    shard, header = region.scales.shard, region.scales.tensor
    weight = region.tensor.shape
    if not scale_fits(weight, header.shape, region.scales.block_size):
        raise InputError(
            "scan",
            shard.path,
            f"{header.name} of shape {header.shape} does not fit {region.tensor.name} "
            f"of shape {weight}",
            "download the checkpoint again",
        )
    buffer = np.empty(max(1, header.end - header.begin), np.uint8)
    raw = np.concatenate(
        [c.copy() for c in reader.chunks(shard, header.begin, header.end, buffer)]
    ).view(_STORAGE[header.dtype])
    values = raw.astype(np.float64)
    if header.dtype in ("BF16", "F16"):
        values = code_values(header.dtype)[raw]
    missing = len(weight) - len(header.shape)
    return values.reshape(*header.shape, *[1] * missing)

"""Weights that an F16 cannot hold: found before a file with infinities is made."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.header import TensorHeader
from ewq_gguf.checkpoint.reader import RangeReader
from ewq_gguf.checkpoint.shards import ShardFile
from ewq_gguf.errors import InputError

#: The largest F16, and the smallest number that is rounded to infinity instead of it.
F16_MAX = 65504.0
F16_INFINITE = 65520.0

#: Of BF16 codes without their sign: the first that is too large, and infinity's.
_BF16_TOO_LARGE, _BF16_INFINITE = 0x4780, 0x7F80
_WIDER = {"BF16": np.uint16, "F32": np.float32, "F64": np.float64}
_BUFFER_BYTES = 1 << 24


@dataclass(frozen=True)
class Overflow:
    """A tensor with a weight beyond F16.

    Attributes:
        shard: the file it is in.
        tensor: its header.
        index: The index of the first such weight among the tensor's.
        value: The value of that weight.
    """

    shard: ShardFile
    tensor: TensorHeader
    index: int
    value: float


def find_overflows(
    checkpoint: Checkpoint, names: Collection[str]
) -> Iterator[Overflow]:
    """The tensors among some that hold a finite weight beyond F16, in file order.

    Args:
        checkpoint: whose weights are read.
        names: The names of its tensors; those that are F16 already are not read.

    Raises:
        InputError, ResourceError: a file cannot be read.
    """
    buffer = np.empty(_BUFFER_BYTES, np.uint8)
    with RangeReader() as reader:
        for shard, tensor in checkpoint.tensors:
            if tensor.name not in names or tensor.dtype not in _WIDER:
                continue
            reader.open(shard)
            index = 0
            for chunk in reader.chunks(shard, tensor.begin, tensor.end, buffer):
                data = chunk.view(_WIDER[tensor.dtype])
                too_large = _too_large(data)
                if too_large.any():
                    first = int(too_large.argmax())
                    value = _value(data[first], tensor.dtype)
                    yield Overflow(shard, tensor, index + first, value)
                    break
                index += data.size


def _too_large(data: NDArray[Any]) -> NDArray[np.bool_]:
    if data.dtype == np.uint16:
        codes = data & 0x7FFF
        found = (codes >= _BF16_TOO_LARGE) & (codes < _BF16_INFINITE)
    else:
        sizes = np.abs(data)
        found = (sizes >= F16_INFINITE) & (sizes < np.inf)
    result: NDArray[np.bool_] = found
    return result


def _value(weight: Any, dtype: str) -> float:
    if dtype == "BF16":
        return float(np.array(int(weight) << 16, np.uint32).view(np.float32))
    return float(weight)


def overflow_error(
    stage: str, found: Overflow, remedy: str, name: str | None = None
) -> InputError:
    """The error for a weight that would become infinite.

    Args:
        stage: The stage that an error names.
        found: the tensor and its weight.
        remedy: The way to mend it.
        name: The GGUF tensor's name, where it is another one.
    """
    becomes = f" ({name})" if name and name != found.tensor.name else ""
    return InputError(
        stage,
        found.shard.path,
        f"{found.tensor.name}{becomes} holds {found.value:g} at index {found.index}, "
        f"F16 ends at {F16_MAX:g}: it would become infinite",
        remedy,
    )

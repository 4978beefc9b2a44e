"""A packed checkpoint as a plain one, in the cache: every weight exactly.

Written once, tensor by tensor; scan, converter and reference then read what they
read of every other checkpoint. The dtype is the smallest that holds each product of an
integer and a scale.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ewq_gguf import store
from ewq_gguf.checkpoint.folder import Checkpoint, open_folder
from ewq_gguf.checkpoint.fp8 import QUANT_FILE, quantisation_of, without_quantisation
from ewq_gguf.checkpoint.header import DTYPE_BYTES, TensorHeader
from ewq_gguf.checkpoint.packed_tensors import (
    PackedWeight,
    check_sound,
    packed_weights,
)
from ewq_gguf.checkpoint.packed_values import Unpacked, unpack
from ewq_gguf.checkpoint.packing import packing_of
from ewq_gguf.checkpoint.reader import RangeReader
from ewq_gguf.checkpoint.shards import ShardFile
from ewq_gguf.entropy.codes import code_values
from ewq_gguf.errors import InputError, printable

#: Another one writes other bytes: a checkpoint is unpacked again.
_VERSION = 1
_CHUNK_BYTES = 8 << 20
_N_WEIGHTS = 1 << 22
_NUMBERS = {"I32": "<i4", "I64": "<i8", "I8": "i1", "U8": "u1", "F32": "<f4"}


@dataclass(frozen=True)
class _Weight:
    """One packed weight and the open files that it is read from."""

    packed: PackedWeight
    reader: RangeReader

    @property
    def name(self) -> str:
        """Its name when it is unpacked."""
        return self.packed.name

    def read(self) -> Unpacked:
        """Its integers and scales, all of them in memory."""
        arrays = {
            end: _array(*place, self.reader) for end, place in self.packed.parts.items()
        }
        return unpack(self.packed.packing, arrays, self.name)

    @cached_property
    def shape_and_dtypes(self) -> tuple[tuple[int, ...], frozenset[str]]:
        """Its shape, and the dtypes that hold each of its weights."""
        content = self.read()
        return content.shape, frozenset(
            dtype for dtype in ("BF16", "F16") if _holds(dtype, content)
        )


def unpacked(checkpoint: Checkpoint, say: Callable[[str], None] | None) -> Checkpoint:
    """The plain checkpoint that a packed one stands for; any other as it is.

    Args:
        checkpoint: the checkpoint as it was opened.
        say: told when it is written; None for nobody.

    Raises:
        InputError: tensors are missing or are no weights of the model, the weights stay
            on a server, or parts of them do not fit together.
        ResourceError: the cache's disk has too little space.
    """
    packing = packing_of(quantisation_of(checkpoint.folder, checkpoint.config))
    if packing is None:
        return checkpoint
    if any(shard.remote for shard in checkpoint.shards):
        raise InputError(
            "scan",
            checkpoint.folder,
            f"its weights are packed ({packing.method}) and not on this machine",
            "download the checkpoint, or leave --stream away",
        )
    weights, replaced = packed_weights(checkpoint, packing)
    check_sound(checkpoint, packing, weights, replaced)
    identity = checkpoint.identity
    key = store.cache_key(_VERSION, checkpoint.signature)[:32]
    folder = store.cache_dir("unpacked", key) / "model"
    with store.locked(folder, stage="scan", wait=True):
        if not folder.is_dir():
            if say is not None:
                say(f"{identity.name}: unpacks {packing.method} weights, once")
            with store.work_dir(folder, stage="scan") as outer:
                work = store.ensure_dir(outer / "model", "scan")
                _write(checkpoint, weights, replaced, work)
                checkpoint.check_unchanged("scan")
                store.publish_folder(work, folder)
    plain = open_folder(
        folder,
        name=identity.name,
        hub_id=identity.hub_id,
        revision=identity.revision,
    )
    note = (
        f"{printable(checkpoint.folder)}: its {packing.method} weights are read as "
        "integers times scales, exactly"
    )
    return replace(plain, notes=(*checkpoint.notes, *plain.notes, note))


def _write(
    checkpoint: Checkpoint,
    packed: Sequence[PackedWeight],
    replaced: Collection[str],
    folder: Path,
) -> None:
    with RangeReader() as reader:
        for shard in checkpoint.shards:
            reader.open(shard)
        weights = [_Weight(weight, reader) for weight in packed]
        dtype = _common_dtype(weights)
        store.check_free(
            folder,
            sum(prod(w.shape_and_dtypes[0]) for w in weights) * DTYPE_BYTES[dtype]
            + sum(s.header.file_bytes for s in checkpoint.shards),
            "scan",
        )
        files: dict[str, str] = {}
        for shard in checkpoint.shards:
            here = [w for w in weights if w.packed.integers[0] is shard]
            copied = [t for t in shard.header.tensors if t.name not in replaced]
            path = folder / shard.path.name
            if here or copied:
                _write_shard(path, shard, here, copied, dtype, reader)
            files |= dict.fromkeys(
                [*(w.name for w in here), *(t.name for t in copied)], path.name
            )
    if len(checkpoint.shards) > 1:
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, path in checkpoint.small_files.items():
        if name == "config.json":
            config = without_quantisation(checkpoint.config)
            (folder / name).write_text(json.dumps(config, indent=1))
        elif name != QUANT_FILE:
            store.ensure_dir((folder / name).parent, "scan")
            (folder / name).write_bytes(path.read_bytes())


def _common_dtype(weights: Iterable[_Weight]) -> str:
    """The smallest dtype that holds every weight of all tensors."""
    common = frozenset.intersection(*(w.shape_and_dtypes[1] for w in weights))
    return next((dtype for dtype in ("BF16", "F16") if dtype in common), "F32")


def _holds(dtype: str, weight: Unpacked) -> bool:
    """Whether each integer up to the largest times each scale is exact in a dtype."""
    scales = np.unique(weight.scales)
    largest = max(int(weight.integers.max()), -int(weight.integers.min()))
    for q in range(1, largest + 1):
        product = scales * q
        if not (_rounded(product, dtype) == product).all():
            return False
    return True


def _rounded(values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    if dtype == "BF16":  # exact only where the lower half is zero: that is asked
        bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        return bits.view(np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float64)


def _write_shard(
    path: Path,
    shard: ShardFile,
    weights: list[_Weight],
    copied: list[TensorHeader],
    dtype: str,
    reader: RangeReader,
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    tensors = [
        *((w.name, dtype, w.shape_and_dtypes[0]) for w in weights),
        *((t.name, t.dtype, t.shape) for t in copied),
    ]
    for name, of, shape in tensors:
        begin, end = end, end + prod(shape) * DTYPE_BYTES[of]
        header[name] = {
            "dtype": of,
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header).encode()
    buffer = np.empty(_CHUNK_BYTES, np.uint8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for weight in weights:
            for data in _encoded(weight, dtype):
                file.write(data)
        for tensor in copied:
            for chunk in reader.chunks(shard, tensor.begin, tensor.end, buffer):
                file.write(chunk.data)


def _encoded(weight: _Weight, dtype: str) -> Iterator[bytes]:
    """The weight's bytes; in this dtype nothing is rounded."""
    for values in weight.read().pieces(_N_WEIGHTS):
        if dtype == "BF16":
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
            yield (bits >> 16).astype("<u2").tobytes()
        else:
            yield values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


def _array(shard: ShardFile, tensor: TensorHeader, reader: RangeReader) -> NDArray[Any]:
    """A tensor in memory; floats as float64."""
    buffer = np.empty(max(1, tensor.end - tensor.begin), np.uint8)
    data = np.empty(0, np.uint8)
    for chunk in reader.chunks(shard, tensor.begin, tensor.end, buffer):
        data = chunk
    if tensor.dtype in ("BF16", "F16"):
        floats: NDArray[Any] = code_values(tensor.dtype)[data.view("<u2")]
        return floats.reshape(tensor.shape)
    if tensor.dtype not in _NUMBERS:
        raise InputError(
            "scan",
            shard.path,
            f"{tensor.name} is {tensor.dtype}, which no packed weight has",
            "use the BF16 or F16 checkpoint it was made from",
        )
    numbers = data.view(_NUMBERS[tensor.dtype]).reshape(tensor.shape)
    return numbers.astype(np.float64) if tensor.dtype == "F32" else numbers

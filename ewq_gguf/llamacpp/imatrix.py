"""Importance matrices as llama-imatrix writes them: GGUF files of sums and counts.

For a tensor `t` there are `t.in_sum2`, the sums of the squared activations of each
column, and `t.counts`, of how many rows. What llama-quantize would stumble over, in
the middle of a run or by aborting, is refused here.

Source: llama.cpp common/imatrix-loader.cpp and tools/quantize/quantize.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ewq_gguf import store
from ewq_gguf.checkpoint.gguf_file import KV_OFFSET, GgufFile, GgufTensor, read_gguf
from ewq_gguf.errors import InputError, VerificationError
from ewq_gguf.file_memory import read_once
from ewq_gguf.plan.importance import Importance, check_entries, file_keys
from ewq_gguf.plan.sizes import string_kv_bytes
from ewq_gguf.records import Imatrix, Plan

_U32, _STRING, _ARRAY = 4, 8, 9
_MAX_CHUNKS = (1 << 31) - 1
#: Of a dataset's name; llama-quantize cuts the value of a key there.
_MAX_DATASET_BYTES = 127
_REMEDY = (
    "give a GGUF file of llama-imatrix; it also converts an old .dat: `llama-imatrix "
    "-m MODEL.gguf --in-file OLD.dat -o NEW.gguf`"
)


@read_once(4)
def read_imatrix(path: Path) -> Importance:
    """Read, check and hash an importance matrix; of an unchanged file once.

    Raises:
        InputError: it is none, or llama-quantize could not use it.
    """
    try:
        gguf = read_gguf(path)
    except VerificationError as error:
        raise InputError("imatrix", path, error.problem, _REMEDY) from error
    try:
        with path.open("rb") as file:
            n_chunks = _u32(file, path, gguf, "imatrix.chunk_count")
            _u32(file, path, gguf, "imatrix.chunk_size")
            dataset = _dataset(file, path, gguf)
            n_values = _entries(file, path, gguf)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise InputError("imatrix", path, problem, _REMEDY) from error
    text = None if dataset is None else dataset.decode(errors="backslashreplace")
    record = Imatrix(
        file_name=path.name,
        file_sha256=store.sha256_file(path),
        n_entries=len(n_values),
        n_chunks=n_chunks,
        dataset=text,
    )
    return Importance(record, n_values, _kv_bytes(record, dataset or b""))


def importance_values(path: Path) -> dict[str, NDArray[np.float32]]:
    """The mean squared activations of a matrix that `read_imatrix` takes.

    Returns:
        By tensor: (matrices, columns), one matrix but for stacked experts. An
        expert that no token went to has ones, as llama-quantize takes it.
    """
    tensors = {tensor.name: tensor for tensor in read_gguf(path).tensors}
    found = {}
    with path.open("rb") as file:
        for name in [n.removesuffix(".in_sum2") for n in tensors if ".in_sum2" in n]:
            sums = _values(file, tensors[f"{name}.in_sum2"])
            counts = _values(file, tensors[f"{name}.counts"])
            columns = sums.reshape(len(counts), -1)
            seen = counts > 0
            means = np.ones_like(columns)
            means[seen] = columns[seen] / counts[seen, None]
            found[name] = means
    return found


def check_imatrix(plan: Plan, path: Path | None) -> str | None:
    """Refuse any importance matrix but the plan's own.

    Returns:
        A note on tensors that have no entry, or None.

    Raises:
        InputError: it is missing, needless or another one, or lacks an entry that the
            plan needs.
    """
    if path is None:
        if plan.imatrix is not None:
            raise InputError(
                "quantize",
                plan.model.name,
                f"is planned with the importance matrix {plan.imatrix.file_name}",
                "give it: --imatrix FILE",
            )
        return None
    if plan.imatrix is None:
        raise InputError(
            "quantize",
            path,
            "the plan has no importance matrix",
            "plan with it: `ewq plan MODEL --imatrix FILE`",
        )
    importance = read_imatrix(path)
    planned, found = plan.imatrix.file_sha256, importance.record.file_sha256
    if planned != found:
        raise InputError(
            "quantize",
            path,
            f"is not the plan's importance matrix {plan.imatrix.file_name}: its "
            f"SHA-256 is {found[:12]}, planned {planned[:12]}",
            "give that file, or plan again with this one",
        )
    return check_entries(plan.tensors, importance)


def _kv_bytes(record: Imatrix, dataset: bytes) -> int:
    """Bytes of llama-quantize's keys; the name may be cut within a character."""
    n_bytes = 0
    for key, value in file_keys(record).items():
        if isinstance(value, str):
            is_dataset = key.endswith(".dataset")
            n_text = len(dataset) if is_dataset else len(value.encode())
            n_bytes += string_kv_bytes({key: ""}) + n_text
        else:
            n_bytes += 8 + len(key) + 4 + 4
    return n_bytes


def _entries(file: BinaryIO, path: Path, gguf: GgufFile) -> dict[str, int]:
    """How many values each tensor's entry has.

    Raises:
        InputError: there is none, or one is incomplete or has impossible values.
    """
    sums: dict[str, GgufTensor] = {}
    counts: dict[str, GgufTensor] = {}
    for tensor in gguf.tensors:
        name, _, kind = tensor.name.rpartition(".")
        if kind in ("in_sum2", "counts"):
            (sums if kind == "in_sum2" else counts)[name] = tensor
    if not sums:
        raise _bad(path, "has no entry")
    if lone := min(sums.keys() ^ counts.keys(), default=None):
        raise _bad(path, f"has only one of sums and counts for {lone}")
    for name in sums:
        for tensor in (sums[name], counts[name]):
            _check_values(file, path, tensor)
        if prod(sums[name].shape) % prod(counts[name].shape):
            shapes = f"{sums[name].shape} and {counts[name].shape}"
            raise _bad(path, f"has sums and counts of shapes {shapes} for {name}")
    return {name: prod(tensor.shape) for name, tensor in sums.items()}


def _values(file: BinaryIO, tensor: GgufTensor) -> NDArray[np.float32]:
    file.seek(tensor.offset)
    return np.frombuffer(file.read(tensor.size_bytes), "<f4")


def _check_values(file: BinaryIO, path: Path, tensor: GgufTensor) -> None:
    if tensor.ggml_type != "F32":
        raise _bad(path, f"{tensor.name} is {tensor.ggml_type}, not F32")
    values = _values(file, tensor)
    if not (values.min() >= 0 and values.max() < np.inf):  # NaN is neither
        raise _bad(path, f"{tensor.name} holds negative or non-finite values")


def _u32(file: BinaryIO, path: Path, gguf: GgufFile, key: str) -> int:
    raw = _raw_value(file, path, gguf, key)
    kind, value = struct.unpack_from("<II", raw)
    if kind != _U32 or value > _MAX_CHUNKS:
        raise _bad(path, f"{key} is no number from 0 to {_MAX_CHUNKS} of type u32")
    return int(value)


def _dataset(file: BinaryIO, path: Path, gguf: GgufFile) -> bytes | None:
    """The first dataset's name as llama-quantize copies it: a short C string."""
    raw = _raw_value(file, path, gguf, "imatrix.datasets")
    if struct.unpack_from("<II", raw) != (_ARRAY, _STRING):
        return None
    (count,) = struct.unpack_from("<Q", raw, 8)
    if not count:
        return None
    (n_bytes,) = struct.unpack_from("<Q", raw, 16)
    return raw[24 : 24 + n_bytes].partition(b"\0")[0][:_MAX_DATASET_BYTES]


def _raw_value(file: BinaryIO, path: Path, gguf: GgufFile, key: str) -> bytes:
    """The first bytes of a key's value as they stand in the file, its type first."""
    if key not in gguf.kv:
        raise _bad(path, f"is no importance matrix: it lacks {key}")
    sizes: Mapping[str, int] = gguf.kv_sizes
    before = list(sizes).index(key)
    begin = KV_OFFSET + sum(list(sizes.values())[:before]) + 8 + len(key)
    file.seek(begin)
    return file.read(24 + _MAX_DATASET_BYTES)


def _bad(path: Path, problem: str) -> InputError:
    return InputError("imatrix", path, problem, _REMEDY)

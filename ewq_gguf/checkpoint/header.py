"""The safetensors header, read strictly: what passes here is safe to read by range.

Stricter than the library, which must accept what passes: duplicate keys, holes and
overlaps are refused, and every message names the bytes concerned.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ewq_gguf.checkpoint.remote import RemoteFile
from ewq_gguf.errors import InputError
from ewq_gguf.strict_json import parse_json

MAX_HEADER_BYTES = 100_000_000
_MAX_INT = (1 << 63) - 1

#: Bytes per element of every dtype a header may name.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_QUANTISED_DTYPES = ("F4", "F6", "F8_E8M0", "E8M0")

_KNOWN_STARTS = (
    (b"version https://git-lfs", "a Git LFS pointer", "run `git lfs pull`"),
    (b"<", "an HTML or XML page", "download the file again"),
    (b"PK\x03\x04", "a zip archive (a PyTorch pickle?)", "use a safetensors file"),
    (b"\x80\x02", "a Python pickle", "use a safetensors file; pickles can run code"),
    (b"\x80\x04", "a Python pickle", "use a safetensors file; pickles can run code"),
    (b"GGUF", "a GGUF file", "give it as MODEL itself"),
)


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a shard.

    Attributes:
        name: in the checkpoint.
        dtype: as safetensors writes it.
        shape: slowest dimension first.
        begin: first byte in the file.
        end: one past its last byte in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def n_weights(self) -> int:
        """How many elements it has."""
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A shard's header.

    Attributes:
        raw: its JSON bytes.
        tensors: in the order of their bytes.
        file_bytes: size of the whole file.
    """

    raw: bytes
    tensors: tuple[TensorHeader, ...]
    file_bytes: int


def read_header(fd: int, path: Path) -> Header:
    """Read and check the header of an open safetensors file.

    Args:
        fd: open for reading.
        path: for messages.

    Raises:
        InputError: the file is not a sound safetensors file.
    """
    file_bytes = os.fstat(fd).st_size
    return _read_header(
        lambda begin, end: os.pread(fd, end - begin, begin), path, file_bytes
    )


def read_remote_header(file: RemoteFile, path: Path) -> Header:
    """Read and check the header of a safetensors file on a server.

    Raises:
        InputError: the file is not a sound safetensors file.
        NetworkError: the server refused or failed too often.
    """
    return _read_header(file.read, path, file.size_bytes)


def _read_header(
    read: Callable[[int, int], bytes], path: Path, file_bytes: int
) -> Header:
    start = read(0, 64)
    if len(start) < 8:
        raise _bad(path, f"has {file_bytes} bytes, a safetensors file has 8 or more")
    n_header = int.from_bytes(start[:8], "little")
    if n_header > MAX_HEADER_BYTES or 8 + n_header > file_bytes:
        _refuse_known(path, start)
        raise _bad(
            path,
            f"header length {n_header} does not fit its {file_bytes} bytes (at most "
            f"{MAX_HEADER_BYTES}): truncated or not safetensors",
        )
    raw = read(8, 8 + n_header)
    if len(raw) != n_header:
        raise _bad(path, f"header ends after {len(raw)} of {n_header} bytes")
    entries = _parse(raw, path)
    tensors = [_tensor(n, e, path, 8 + n_header) for n, e in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_coverage(tensors, path, 8 + n_header, file_bytes)
    return Header(raw, tuple(tensors), file_bytes)


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise _bad(path, "header does not start with '{' at byte 8")
    try:
        header = parse_json(raw)
    except UnicodeDecodeError as error:
        raise _bad(path, f"header is not UTF-8 at byte {8 + error.start}") from error
    except json.JSONDecodeError as error:
        offset = 8 + len(raw.decode()[: error.pos].encode())
        raise _bad(path, f"header is not JSON at byte {offset}: {error.msg}") from error
    except ValueError as error:
        raise _bad(path, f"header: {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _bad(path, "__metadata__ is not an object of strings")
    return dict(header)


def _tensor(name: str, entry: Any, path: Path, data_begin: int) -> TensorHeader:
    if not name or "\0" in name:
        raise _bad(path, f"tensor name {name!r} is empty or holds NUL")
    if not isinstance(entry, Mapping) or set(entry) != {
        "dtype",
        "shape",
        "data_offsets",
    }:
        raise _bad(path, f"{name}: needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        if isinstance(dtype, str) and dtype.startswith(_QUANTISED_DTYPES):
            raise InputError(
                "scan", path, f"{name}: {dtype} is quantised", "use the BF16 checkpoint"
            )
        known = ", ".join(DTYPE_BYTES)
        raise _bad(path, f"{name}: unknown dtype {dtype!r}; known are {known}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _bad(
            path,
            f"{name}: shape {shape} and data_offsets {offsets} must be whole numbers "
            "from 0 to 2^63-1",
        )
    begin, end = offsets
    needed = _bounded_product([*shape, DTYPE_BYTES[dtype]])
    if needed is None:
        raise _bad(path, f"{name}: shape {shape[:8]} is too large")
    if end - begin != needed:
        raise _bad(
            path,
            f"{name}: data_offsets hold {end - begin} bytes, {dtype} {shape} needs "
            f"{needed}",
        )
    return TensorHeader(name, dtype, tuple(shape), data_begin + begin, data_begin + end)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= _MAX_INT for value in values
    )


def _bounded_product(factors: Sequence[int]) -> int | None:
    """None as soon as it exceeds 2^63-1, even where a later factor is 0."""
    product = 1
    for factor in factors:
        product *= factor
        if product > _MAX_INT:
            return None
    return product


def _check_coverage(
    tensors: list[TensorHeader], path: Path, data_begin: int, file_bytes: int
) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    position, before = data_begin, "the header"
    for tensor in tensors:
        if tensor.begin < position:
            raise _bad(
                path,
                f"{tensor.name} overlaps {before} at bytes {tensor.begin}-{position}",
            )
        if tensor.begin > position:
            raise _bad(
                path, f"bytes {position}-{tensor.begin} belong to no tensor: a hole"
            )
        position, before = tensor.end, tensor.name
    if position > file_bytes:
        raise _bad(
            path, f"has {file_bytes} bytes, its header needs {position}: truncated"
        )
    if position < file_bytes:
        raise _bad(path, f"bytes {position}-{file_bytes} belong to no tensor")


def _refuse_known(path: Path, start: bytes) -> None:
    for prefix, what, remedy in _KNOWN_STARTS:
        if start.lstrip(b"\xef\xbb\xbf").startswith(prefix):
            raise InputError("scan", path, f"is {what}, not safetensors", remedy)


def _bad(path: Path, problem: str) -> InputError:
    return InputError("scan", path, problem, "download the file again")

"""A GGUF header, read strictly: limits first, so that no hostile file can hang us.

The loader of llama.cpp and PyPI's gguf reader trust counts they find; this one checks
each against the bytes that are left.

Source: ggml docs/gguf.md, version 3.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from ewq_gguf import ggml_types
from ewq_gguf.errors import VerificationError, printable
from ewq_gguf.file_memory import read_once

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
    10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
#: Where the key-value pairs begin: after the magic, the version and two counts.
KV_OFFSET = 24
_U32, _STRING, _ARRAY = 4, 8, 9
_MAX_ALIGNMENT = 1 << 20
_MAX_NAME_BYTES = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_KV = 1 << 20
_MAX_DIMS = 4

Scalar = int | float | bool | str


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table.

    Attributes:
        name: in the file.
        shape: slowest dimension first.
        ggml_type: its name, such as `Q4_K`.
        offset: The position of its data in the file, in bytes.
        size_bytes: The size of its data, without padding.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: str
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """A header.

    Attributes:
        kv: scalars and strings by key; an array stands as its length.
        kv_sizes: bytes of each key-value pair, by key.
        tensors: in the order of the table.
        data_offset: where the tensors' data begin.
        file_bytes: The size of the whole file.
    """

    kv: Mapping[str, Scalar]
    kv_sizes: Mapping[str, int]
    tensors: tuple[GgufTensor, ...]
    data_offset: int
    file_bytes: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of all key-value pairs."""
        return sum(self.kv_sizes.values())

    @property
    def alignment(self) -> int:
        """The multiple of bytes that the header and every tensor are padded to."""
        return int(self.kv.get("general.alignment", 32))

    @property
    def architecture(self) -> str:
        """Its `general.architecture`."""
        return str(self.kv.get("general.architecture"))

    @property
    def is_writer(self) -> bool:
        """Whether it writes one token after another, as encoders do not.

        An encoder-decoder is no writer either: it does not go on with a text.
        """
        is_causal = self.kv.get(f"{self.architecture}.attention.causal", True)
        has_encoder = any(tensor.name.startswith("enc.") for tensor in self.tensors)
        return bool(is_causal) and not has_encoder

    @property
    def n_ctx_train(self) -> int | None:
        """The longest context it was made for, in tokens; None where it says none."""
        most = self.kv.get(f"{self.architecture}.context_length")
        return most if isinstance(most, int) and most > 0 else None

    def window(self, n_tokens: int) -> int:
        """So many tokens, or as many as the model was made for if these are fewer."""
        return min(n_tokens, self.n_ctx_train or n_tokens)


@read_once(16)
def read_gguf(path: Path, *, header_only: bool = False) -> GgufFile:
    """Read and check a GGUF file's header; of an unchanged file once.

    Args:
        path: the file.
        header_only: do not require the tensors' data to be there.

    Raises:
        VerificationError: it is not a sound GGUF file; the message has the byte.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise VerificationError(
                "verify", path, "is not a regular file", "check the path"
            )
        with path.open("rb") as file:
            return read_header(file, path, path.stat().st_size, header_only=header_only)
    except OSError as error:
        raise VerificationError(
            "verify", path, f"cannot be read ({error.strerror})", "check the path"
        ) from error


def read_header(
    file: BinaryIO, path: Path, file_bytes: int, *, header_only: bool = False
) -> GgufFile:
    """Read and check the header of an open GGUF file.

    Args:
        file: at its begin.
        path: for messages.
        file_bytes: size of the whole file.
        header_only: do not require the tensors' data to be there.

    Raises:
        VerificationError: it is not a sound GGUF file; the message has the byte.
    """
    return _Reader(file, path, file_bytes, header_only).read()


class _Reader:
    def __init__(
        self, file: BinaryIO, path: Path, file_bytes: int, header_only: bool
    ) -> None:
        self.file, self.path, self.header_only = file, path, header_only
        self.position = 0
        self.size = file_bytes

    def read(self) -> GgufFile:
        magic = self.take(4)
        if magic != b"GGUF":
            raise self.bad(f"starts with {magic!r}, not GGUF")
        version = self.number("<I")
        if version & 0xFFFF == 0 and version:
            raise self.bad("is big-endian, which is not supported")
        if version not in (2, 3):
            raise self.bad(f"is GGUF version {version}, supported are 2 and 3")
        n_tensors, n_kv = self.number("<Q"), self.number("<Q")
        self.check_count("tensors", n_tensors, 24, _MAX_TENSORS)
        self.check_count("key-value pairs", n_kv, 13, _MAX_KV)
        kv: dict[str, Scalar] = {}
        kv_sizes: dict[str, int] = {}
        for _ in range(n_kv):
            begin = self.position
            key = self.string(_MAX_NAME_BYTES)
            if key in kv:
                raise self.bad(f"key {key} appears twice")
            value_type = self.number("<I")
            if key == "general.alignment" and value_type != _U32:
                raise self.bad(
                    f"alignment has value type {value_type}, not {_U32} (u32)"
                )
            kv[key] = self.value(value_type)
            kv_sizes[key] = self.position - begin
        alignment = int(kv.get("general.alignment", 32))
        if not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.bad(f"alignment {alignment} is not a power of two up to 1 MiB")
        table = [self.tensor_info() for _ in range(n_tensors)]
        data_offset = -(-self.position // alignment) * alignment
        tensors = self.place(table, data_offset, alignment)
        return GgufFile(kv, kv_sizes, tensors, data_offset, self.size)

    def tensor_info(self) -> tuple[str, tuple[int, ...], str, int]:
        name = self.string(_MAX_NAME_BYTES)
        n_dims = self.number("<I")
        if not 0 < n_dims <= _MAX_DIMS:
            raise self.bad(f"{name} has {n_dims} dimensions, 1 to {_MAX_DIMS} can be")
        shape = tuple(self.number("<Q") for _ in range(n_dims))[::-1]
        if not all(shape) or prod(shape) >= 1 << 63:
            raise self.bad(f"{name} has an impossible shape {shape}")
        number = self.number("<I")
        ggml_type = ggml_types.type_name(number)
        if ggml_type is None:
            raise self.bad(f"{name} has the unknown type {number}")
        return name, shape, ggml_type, self.number("<Q")

    def place(
        self,
        table: list[tuple[str, tuple[int, ...], str, int]],
        data_offset: int,
        alignment: int,
    ) -> tuple[GgufTensor, ...]:
        """Where each tensor lies: one after the other, as ggml requires it."""
        tensors: dict[str, GgufTensor] = {}
        expected = 0
        for name, shape, ggml_type, offset in table:
            if name in tensors:
                raise self.bad(f"tensor {name} appears twice")
            try:
                size = ggml_types.tensor_bytes(ggml_type, shape)
            except ValueError as error:
                raise self.bad(f"{name}: {error}") from error
            if offset != expected:
                raise self.bad(f"{name} starts at {offset}, {expected} is expected")
            expected += -(-size // alignment) * alignment
            end = data_offset + offset + size
            if end > self.size and not self.header_only:
                raise self.bad(
                    f"{name} ends at byte {end}, the file at {self.size}: truncated"
                )
            tensors[name] = GgufTensor(
                name, shape, ggml_type, data_offset + offset, size
            )
        return tuple(tensors.values())

    def value(self, value_type: int) -> Scalar:
        if value_type == _STRING:
            return self.string(self.size)
        if value_type in _SCALARS:
            return self.number(_SCALARS[value_type])
        if value_type != _ARRAY:
            raise self.bad(f"value type {value_type} is unknown")
        item, count = self.number("<I"), self.number("<Q")
        if item == _STRING:
            self.check_count("array items", count, 8, self.size)
            for _ in range(count):
                self.skip(self.number("<Q"))
        elif item in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[item]))
        else:
            raise self.bad(f"array item type {item} is not supported")
        return count

    def string(self, limit: int) -> str:
        size = self.number("<Q")
        if size > limit:
            raise self.bad(f"a string of {size} bytes is longer than {limit}")
        return self.take(size).decode("utf-8", errors="backslashreplace")

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > self.size - self.position:
            raise self.bad(f"{n_bytes} bytes are needed and the file ends")
        data = self.file.read(n_bytes)
        if len(data) != n_bytes:
            raise self.bad("the file ended while it was read")
        self.position += n_bytes
        return data

    def skip(self, n_bytes: int) -> None:
        if n_bytes > self.size - self.position:
            raise self.bad(f"{n_bytes} bytes are needed and the file ends")
        self.file.seek(n_bytes, 1)
        self.position += n_bytes

    def check_count(self, what: str, count: int, item_bytes: int, limit: int) -> None:
        if count > limit or count * item_bytes > self.size - self.position:
            raise self.bad(f"{count} {what} do not fit its {self.size} bytes")

    def bad(self, problem: str) -> VerificationError:
        return VerificationError(
            "verify",
            self.path,
            f"at byte {self.position}: {printable(problem)}",
            "make the file again",
        )

"""An unquantised GGUF file as a checkpoint: one shard, its tensors keep their names."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import BinaryIO

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.gguf_file import GgufFile, GgufTensor, read_header
from ewq_gguf.checkpoint.header import MAX_HEADER_BYTES, Header, TensorHeader
from ewq_gguf.checkpoint.remote import RemoteFile
from ewq_gguf.checkpoint.shards import ShardFile
from ewq_gguf.errors import InputError, VerificationError
from ewq_gguf.records import ModelIdentity, Shard

#: ggml types whose weights the scanner reads; safetensors calls them the same.
_FLOATS = ("BF16", "F16", "F32", "F64")
_SAFE_NAME = re.compile(r"\w[\w.+-]{0,199}")
_REMOTE_BUFFER_BYTES = 1 << 20


def is_gguf(path: Path) -> bool:
    """Whether a regular file is a GGUF, by its name or its first bytes."""
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def open_gguf(path: Path) -> Checkpoint:
    """Read a GGUF file's header, and no weight.

    Raises:
        InputError: it is not a sound GGUF file, or not a whole unquantised model.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return _open(file, path, path.stat().st_size)


def open_remote_gguf(remote: RemoteFile) -> Checkpoint:
    """Read the header of a GGUF file that stays on its server.

    Raises:
        InputError: it is not a sound GGUF file, or not a whole unquantised model.
        NetworkError: the server refused or failed too often.
    """
    with io.BufferedReader(_RemoteRaw(remote), _REMOTE_BUFFER_BYTES) as file:
        path = Path(remote.url.partition("?")[0].rsplit("/", 1)[1])
        return _open(file, path, remote.size_bytes, remote)


def _open(
    file: BinaryIO, path: Path, file_bytes: int, remote: RemoteFile | None = None
) -> Checkpoint:
    try:
        gguf = read_header(file, path, file_bytes)
    except VerificationError as error:
        raise _bad(path, error.problem) from error
    if gguf.data_offset > MAX_HEADER_BYTES:
        raise _bad(
            path,
            f"its header of {gguf.data_offset} bytes is longer than {MAX_HEADER_BYTES}",
        )
    _check_whole(gguf, path)
    file.seek(0)
    raw = file.read(gguf.data_offset)
    tensors = tuple(_tensor(tensor, path) for tensor in gguf.tensors)
    shard = ShardFile(path, Header(raw, tensors, file_bytes), remote)
    return Checkpoint(path, {}, {}, (shard,), _identity(gguf, shard))


def _check_whole(gguf: GgufFile, path: Path) -> None:
    n_files = gguf.kv.get("split.count", 1)
    if n_files not in (0, 1):  # 0 is what a merged file has
        raise InputError(
            "scan",
            path,
            f"is one of {n_files} files of a split GGUF",
            "join them first: `llama-gguf-split --merge FIRST OUT`",
        )
    if not gguf.tensors:
        raise InputError(
            "scan", path, "holds no tensors, only a vocabulary", "give a whole model"
        )


def _tensor(tensor: GgufTensor, path: Path) -> TensorHeader:
    if tensor.ggml_type not in _FLOATS:
        raise InputError(
            "scan",
            path,
            f"{tensor.name} is {tensor.ggml_type}, not one of {', '.join(_FLOATS)}: "
            "quantised already",
            "use the BF16 or F16 GGUF it was made from",
        )
    end = tensor.offset + tensor.size_bytes
    return TensorHeader(tensor.name, tensor.ggml_type, tensor.shape, tensor.offset, end)


def _identity(gguf: GgufFile, shard: ShardFile) -> ModelIdentity:
    path = shard.path
    architecture = gguf.kv.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise _bad(path, f"general.architecture is {architecture!r}, needed is a name")
    key = f"{architecture}.block_count"
    n_layers = gguf.kv.get(key)
    if type(n_layers) is not int or not 0 < n_layers <= 10_000:
        raise InputError(
            "scan",
            path,
            f"{key} is {n_layers!r}, needed is 1 to 10000",
            "give a language model's GGUF",
        )
    name = gguf.kv.get("general.name")
    is_safe = isinstance(name, str) and _SAFE_NAME.fullmatch(name)
    return ModelIdentity(
        name=str(name) if is_safe else path.stem,
        hub_id=None,
        revision=None,
        hf_architecture=architecture,
        n_layers=n_layers,
        files_sha256={},
        shards=(
            Shard(
                name=path.name,
                size_bytes=shard.header.file_bytes,
                header_sha256=hashlib.sha256(shard.header.raw).hexdigest(),
            ),
        ),
    )


class _RemoteRaw(io.RawIOBase):
    """A remote file as the standard library's kind of file."""

    def __init__(self, remote: RemoteFile) -> None:
        self._remote = remote
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begins = (0, self._position, self._remote.size_bytes)
        self._position = begins[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._position + len(buffer), self._remote.size_bytes)
        data = self._remote.read(self._position, end) if end > self._position else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _bad(path: Path, problem: str) -> InputError:
    return InputError("scan", path, problem, "download or convert it again")

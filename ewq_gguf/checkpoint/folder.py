"""A checkpoint's folder: its config, its small files, its shards' headers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ewq_gguf.checkpoint.files import (
    note_on_modules,
    note_on_repeated_keys,
    small_files_of,
)
from ewq_gguf.checkpoint.fp8 import (
    Fp8,
    fp8_of,
    quantisation_of,
)
from ewq_gguf.checkpoint.header import TensorHeader
from ewq_gguf.checkpoint.model_config import hf_architecture, n_layers_of, read_config
from ewq_gguf.checkpoint.remote import RemoteFile
from ewq_gguf.checkpoint.shards import ShardFile as ShardFile
from ewq_gguf.checkpoint.shards import open_shards
from ewq_gguf.errors import InputError, printable
from ewq_gguf.records import ModelIdentity, Shard
from ewq_gguf.tensor_names import ARCHITECTURES


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers are sound.

    Attributes:
        folder: where it lies; of a GGUF source the file.
        config: config.json.
        small_files: The files that a conversion needs beside the weights, by name.
        shards: the weight files, by name.
        identity: The model's identity, the same wherever it lies.
        fp8: its FP8 weights, or None.
        notes: Oddities that are no errors, each a sentence.
        opened: the signature when the headers were read.
        origin: the MODEL that opens it again, also on another machine.
        adapters: the DIRs or Hub ids of the adapters that are merged into it.
    """

    folder: Path
    config: Mapping[str, Any]
    small_files: Mapping[str, Path]
    shards: tuple[ShardFile, ...]
    identity: ModelIdentity
    fp8: Fp8 | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)
    opened: str = field(default="", compare=False, repr=False)
    origin: str = field(default="", compare=False)
    adapters: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        """Remember the files as they are now."""
        object.__setattr__(self, "opened", self.opened or self.signature)

    def check_unchanged(self, stage: str) -> None:
        """Refuse to go on with files that changed since their headers were read.

        Raises:
            InputError: one has another size, inode or time now.
        """
        if self.signature != self.opened:
            raise InputError(
                stage,
                self.folder,
                "its files changed since they were opened",
                "run again when nothing writes them",
            )

    @property
    def tensors(self) -> list[tuple[ShardFile, TensorHeader]]:
        """Every tensor with its shard, in file order."""
        return [
            (shard, tensor) for shard in self.shards for tensor in shard.header.tensors
        ]

    @property
    def is_mapped_by_name(self) -> bool:
        """Whether names alone say which tensor becomes which, without the converter."""
        return self.identity.is_gguf or (
            self.identity.hf_architecture in ARCHITECTURES and self.fp8 is None
        )

    @property
    def signature(self) -> str:
        """SHA-256 over the identity and each file's size, inode and times.

        It changes when a file on this machine does, which the headers alone need not.
        """
        local = [shard.path for shard in self.shards if shard.remote is None]
        stats = [path.stat() for path in sorted([*self.small_files.values(), *local])]
        remotes = [s.remote for s in self.shards if s.remote is not None]
        text = repr(
            (
                self.identity.fingerprint,
                [(s.st_size, s.st_ino, s.st_mtime_ns) for s in stats],
                [(remote.url, remote.size_bytes, remote.etag) for remote in remotes],
            )
        )
        return hashlib.sha256(text.encode()).hexdigest()


def open_folder(
    folder: Path,
    *,
    name: str,
    hub_id: str | None = None,
    revision: str | None = None,
    only: str | None = None,
    architectures: Collection[str] | None = None,
    remote: Callable[[str], RemoteFile] | None = None,
) -> Checkpoint:
    """Read a folder's config and headers, and no weight.

    Args:
        folder: the checkpoint.
        name: The name of the model.
        hub_id: where it came from.
        revision: and which commit.
        only: the one weight file to take; None takes the index's or the only set.
        architectures: the supported ones; None does not check.
        remote: opens a weight file that stays on its server; None for local ones.

    Raises:
        InputError: it is not a sound checkpoint.
    """
    config = read_config(folder, architectures)
    architecture = hf_architecture(config, folder)
    shards, notes = open_shards(folder, only, remote)
    small_files = small_files_of(folder)
    identity = ModelIdentity(
        name=name,
        hub_id=hub_id,
        revision=revision,
        hf_architecture=architecture,
        n_layers=n_layers_of(config, folder),
        files_sha256={
            file: hashlib.sha256(path.read_bytes()).hexdigest()
            for file, path in small_files.items()
        },
        shards=tuple(
            Shard(
                name=shard.path.name,
                size_bytes=shard.header.file_bytes,
                header_sha256=hashlib.sha256(shard.header.raw).hexdigest(),
            )
            for shard in shards
        ),
    )
    tensors = [(shard, tensor) for shard in shards for tensor in shard.header.tensors]
    fp8 = fp8_of(tensors, quantisation_of(folder, config))
    notes += _notes_on_code(folder, config) + _notes_on_keys(small_files)
    notes += note_on_modules(folder)
    return Checkpoint(folder, config, small_files, shards, identity, fp8, notes)


def _notes_on_code(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    if "auto_map" not in config:
        return ()
    path = printable(folder / "config.json")
    return (f"{path}: its auto_map names code of the repository, which never runs",)


def _notes_on_keys(small_files: Mapping[str, Path]) -> tuple[str, ...]:
    """Notes on the files that people edit; tools write the tokenizer's own."""
    edited = [path for name, path in small_files.items() if "config.json" in name]
    return tuple(note for note in map(note_on_repeated_keys, edited) if note)

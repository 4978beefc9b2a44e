"""A checkpoint's folder: its config, its small files, its shards' headers."""

from __future__ import annotations

import difflib
import hashlib
import re
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ewq_gguf.checkpoint.files import (
    no_checkpoint,
    note_on_repeated_keys,
    read_json_object,
)
from ewq_gguf.checkpoint.fp8 import (
    Fp8,
    fp8_of,
    is_fp8,
    method_name,
    quantisation_of,
)
from ewq_gguf.checkpoint.header import TensorHeader
from ewq_gguf.checkpoint.packing import packing_of
from ewq_gguf.checkpoint.remote import RemoteFile
from ewq_gguf.checkpoint.shards import ShardFile as ShardFile
from ewq_gguf.checkpoint.shards import open_shards
from ewq_gguf.checkpoint.small_files import note_on_modules, small_files_of
from ewq_gguf.errors import InputError, printable
from ewq_gguf.records import ModelIdentity, Shard
from ewq_gguf.tensor_names import ARCHITECTURES

ADAPTER_CONFIG = "adapter_config.json"
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_CLASSIFIER = re.compile(
    r"For(Sequence|Token|MultiLabel)Classification$|ForQuestionAnswering$|RewardModel$"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers are sound.

    Attributes:
        folder: where it lies; of a GGUF source the file.
        config: config.json.
        small_files: what a conversion needs beside the weights, by name.
        shards: the weight files, by name.
        identity: what it is, wherever it lies.
        fp8: its FP8 weights, or None.
        notes: what is odd about it but no error.
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
        name: of the model.
        hub_id: where it came from.
        revision: and which commit.
        only: the one weight file to take; None takes the index's or the only set.
        architectures: the supported ones; None does not check.
        remote: opens a weight file that stays on its server; None for local ones.

    Raises:
        InputError: it is not a sound checkpoint.
    """
    config = read_config(folder, architectures)
    architecture = _hf_architecture(config, folder)
    shards, notes = open_shards(folder, only, remote)
    small_files = small_files_of(folder)
    identity = ModelIdentity(
        name=name,
        hub_id=hub_id,
        revision=revision,
        hf_architecture=architecture,
        n_layers=_n_layers(config, folder),
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
    """Of the files that people edit; the tokenizer's own are written by tools."""
    edited = [path for name, path in small_files.items() if "config.json" in name]
    return tuple(note for note in map(note_on_repeated_keys, edited) if note)


def read_config(
    folder: Path, architectures: Collection[str] | None = None
) -> dict[str, Any]:
    """config.json, refused where no weights would make its checkpoint usable.

    Args:
        folder: it is in.
        architectures: the supported ones; None does not check.

    Raises:
        InputError: it is missing, not a JSON object, or names a quantised checkpoint
            or an architecture that is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        _refuse_without_config(folder)
    config = read_json_object(folder, "config.json")
    quantised = quantisation_of(folder, config)
    if quantised and not (is_fp8(quantised) or packing_of(quantised)):
        raise InputError(
            "scan",
            path,
            f"the weights are quantised already ({method_name(quantised)})",
            "use the BF16 or F16 checkpoint it was made from",
        )
    _check_architecture(_hf_architecture(config, folder), path, architectures, config)
    return config


def _check_architecture(
    architecture: str,
    path: Path,
    supported: Collection[str] | None,
    config: Mapping[str, Any],
) -> None:
    # A model for images or sounds may name its text model's architecture apart.
    text = config.get("text_config")
    named = text.get("architectures") if isinstance(text, dict) else None
    first = named[0] if isinstance(named, list) and named else None
    names = {architecture, *([first] if isinstance(first, str) else ())}
    if supported is None or not names.isdisjoint(supported):
        return
    if match := _CLASSIFIER.search(architecture):
        of_this_kind = sorted(name for name in supported if name.endswith(match[0]))
        raise InputError(
            "scan",
            path,
            f"{architecture} is a classifier, such as a reranker or a reward model: "
            f"llama.cpp's converter has no place for its head; it takes "
            f"{', '.join(of_this_kind) or 'none of this kind'}",
            "give a checkpoint of those; Qwen3's rerankers are taken as they were "
            "published, as Qwen3ForCausalLM",
        )
    near = difflib.get_close_matches(architecture, sorted(supported), 3, 0.0)
    raise InputError(
        "scan",
        path,
        f"architecture {architecture} is not supported",
        f"the nearest supported ones are {', '.join(near)}",
    )


def _refuse_without_config(folder: Path) -> None:
    if (folder / ADAPTER_CONFIG).is_file():
        raise adapter_error(folder, read_json_object(folder, ADAPTER_CONFIG))
    raise no_checkpoint(folder, "has no config.json")


def adapter_error(
    folder: Path, adapter: Mapping[str, Any], example: str = ""
) -> InputError:
    """What to say of a folder with an adapter and no model.

    Args:
        folder: the adapter.
        adapter: its adapter_config.json, or an empty one.
        example: of its tensors, in brackets.
    """
    base = adapter.get("base_model_name_or_path")
    peft_type = adapter.get("peft_type") or "LORA"
    what = "a LoRA adapter" if peft_type == "LORA" else f"an adapter ({peft_type})"
    command = shlex.join(["ewq", "gguf", str(base or "BASE"), "--adapter", str(folder)])
    return InputError(
        "scan",
        folder,
        f"is {what} of {base or 'a model that it does not name'}, and no model"
        f"{example}",
        f"give the model and the adapter: `{command}`"
        if peft_type == "LORA"
        else "merge it with PEFT's merge_and_unload, and give the merged folder",
    )


def _hf_architecture(config: Mapping[str, Any], folder: Path) -> str:
    architectures = config.get("architectures")
    if (
        not isinstance(architectures, list)
        or not architectures
        or not isinstance(architectures[0], str)
    ):
        raise InputError(
            "scan",
            folder / "config.json",
            f"architectures is {architectures!r}, needed is a list of one name",
            "download config.json again",
        )
    return architectures[0]


def longest_context(config: Mapping[str, Any]) -> int | None:
    """The longest context a model was made for, in tokens; None where it says none."""
    sources = (config.get("text_config"), config)
    found = (
        source[key]
        for source in sources
        if isinstance(source, dict)
        for key in ("max_position_embeddings", "n_positions", "max_seq_len")
        if key in source
    )
    return next((n for n in found if type(n) is int and n > 0), None)


def _n_layers(config: Mapping[str, Any], folder: Path) -> int:
    sources = (config, config.get("text_config"))
    n_layers = next(
        (
            source[key]
            for source in sources
            if isinstance(source, dict)
            for key in _LAYER_KEYS
            if key in source
        ),
        None,
    )
    if type(n_layers) is not int or not 0 < n_layers <= 10_000:
        raise InputError(
            "scan",
            folder / "config.json",
            f"num_hidden_layers is {n_layers!r}, needed is 1 to 10000",
            "download config.json again",
        )
    return n_layers

"""A checkpoint's folder: its config, its small files, its shards' headers.

Nothing outside the folder is opened, whatever the index or a link says, except the
blobs of the Hub's own cache; only regular files are.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ewq_gguf.checkpoint.header import (
    Header,
    TensorHeader,
    loads_strict,
    read_header,
    read_remote_header,
)
from ewq_gguf.checkpoint.remote import RemoteFile
from ewq_gguf.errors import InputError
from ewq_gguf.records import ModelIdentity, Shard
from ewq_gguf.tensor_names import ARCHITECTURES

_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_INDEX = "model.safetensors.index.json"
_SMALL_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".md"})
_MAX_SMALL_BYTES = 64 << 20
_SHARD_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class ShardFile:
    """One weight file of a checkpoint.

    Attributes:
        path: where it lies; of a remote file only its name.
        header: its header.
        remote: the file on a server, or None.
    """

    path: Path
    header: Header
    remote: RemoteFile | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers are sound.

    Attributes:
        folder: where it lies; of a GGUF source the file.
        config: config.json.
        small_files: what a conversion needs beside the weights, by name.
        shards: the weight files, by name.
        identity: what it is, wherever it lies.
        opened: the signature when the headers were read.
        origin: the MODEL that opens it again, also on another machine.
    """

    folder: Path
    config: Mapping[str, Any]
    small_files: Mapping[str, Path]
    shards: tuple[ShardFile, ...]
    identity: ModelIdentity
    opened: str = field(default="", compare=False, repr=False)
    origin: str = field(default="", compare=False)

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
            self.identity.hf_architecture in ARCHITECTURES
            and not self.config.get("quantization_config")
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
    names, weight_map = _shard_names(folder, only, is_local=remote is None)
    shards = tuple(_open_shard(folder, shard, remote) for shard in sorted(names))
    _check_tensors(folder, shards, weight_map)
    small_files = _small_files(folder)
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
    return Checkpoint(folder, config, small_files, shards, identity)


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
    config = _read_json_object(folder, "config.json")
    quantised = config.get("quantization_config")
    if quantised and not _is_fp8(quantised):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise InputError(
            "scan",
            path,
            f"the weights are quantised already ({method or 'quantization_config'})",
            "use the BF16 or F16 checkpoint it was made from",
        )
    _check_architecture(_hf_architecture(config, folder), path, architectures)
    return config


def _check_architecture(
    architecture: str, path: Path, supported: Collection[str] | None
) -> None:
    if supported is not None and architecture not in supported:
        near = difflib.get_close_matches(architecture, sorted(supported), 3, 0.0)
        raise InputError(
            "scan",
            path,
            f"architecture {architecture} is not supported",
            f"the nearest supported ones are {', '.join(near)}",
        )


def _is_fp8(quantised: object) -> bool:
    """FP8 weights are codes times scales: read as they are, exactly."""
    return isinstance(quantised, dict) and quantised.get("quant_method") == "fp8"


def _refuse_without_config(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        adapter = _read_json_object(folder, "adapter_config.json")
        base = adapter.get("base_model_name_or_path")
        raise InputError(
            "scan",
            folder,
            f"holds only an adapter of {base}",
            "merge it into its base model first",
        )
    raise InputError(
        "scan",
        folder,
        "has no config.json",
        "give the folder of a Hugging Face checkpoint",
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


def _shard_names(
    folder: Path, only: str | None, *, is_local: bool
) -> tuple[list[str], dict[str, str] | None]:
    """The weight files: the index's, else `model*`, else the only one."""
    if only:
        return [only], None
    if (folder / _INDEX).is_file():
        weight_map = _weight_map(folder)
        names = sorted(set(weight_map.values()))
        if is_local:
            _check_present(folder, names, weight_map)
        return names, weight_map
    if not is_local:
        return ["model.safetensors"], None
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        _refuse_without_weights(folder)
    names = [name for name in files if name.startswith("model")] or files
    if "model.safetensors" in names:
        return ["model.safetensors"], None
    _check_numbered(folder, names)
    return names, None


def _refuse_without_weights(folder: Path) -> None:
    pickles = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")
    )
    found = f"; it holds pickles ({pickles[0]})" if pickles else ""
    raise InputError(
        "scan",
        folder,
        f"has no *.safetensors{found}",
        "use a safetensors checkpoint; https://huggingface.co/spaces/safetensors/"
        "convert makes one"
        if pickles
        else "give the folder of a Hugging Face checkpoint",
    )


def _check_numbered(folder: Path, names: list[str]) -> None:
    """Without an index, names like model-00001-of-00003 must be a whole set."""
    if len(names) == 1 and not _SHARD_NAME.fullmatch(names[0]):
        return
    matches = [_SHARD_NAME.fullmatch(name) for name in names]
    sets = {(m[1], m[3]) for m in matches if m}
    if None in matches or len(sets) != 1:
        raise InputError(
            "scan",
            folder,
            f"holds several weight files without an index: {', '.join(names[:4])}",
            f"add {_INDEX}, or give one file as MODEL",
        )
    stem, count = sets.pop()
    wanted = [f"{stem}-{i:05}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
    missing = sorted(set(wanted) - set(names))
    if missing:
        raise InputError(
            "scan",
            folder,
            f"{len(missing)} of {len(wanted)} shards are missing: "
            f"{', '.join(missing[:4])}",
            "download them",
        )


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = _read_json_object(folder, _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(value, str) for value in weight_map.values()
    ):
        raise InputError(
            "scan",
            folder / _INDEX,
            "weight_map is not an object of file names",
            "download the index again",
        )
    for tensor, name in weight_map.items():
        if not re.fullmatch(r"[\w.+-]+\.safetensors", name) or name.startswith("."):
            raise InputError(
                "scan",
                folder / _INDEX,
                f"{tensor} points outside the folder or at no .safetensors: {name}",
                "do not use this checkpoint",
            )
    if not weight_map:
        raise InputError(
            "scan", folder / _INDEX, "weight_map is empty", "download it again"
        )
    return weight_map


def _check_present(
    folder: Path, names: Iterable[str], weight_map: Mapping[str, str]
) -> None:
    if missing := [name for name in names if not (folder / name).exists()]:
        tensors = [t for t, name in weight_map.items() if name in missing]
        raise InputError(
            "scan",
            folder,
            f"the index names missing shards: {', '.join(missing[:4])} with "
            f"{len(tensors)} tensors ({tensors[0]}, ...)",
            "download them",
        )


def _open_shard(
    folder: Path, name: str, remote: Callable[[str], RemoteFile] | None
) -> ShardFile:
    path = folder / name
    if remote is not None:
        file = remote(name)
        return ShardFile(Path(name), read_remote_header(file, Path(name)), file)
    _check_regular(folder, path)
    fd = os.open(path, os.O_RDONLY)
    try:
        return ShardFile(path, read_header(fd, path))
    finally:
        os.close(fd)


def _check_regular(folder: Path, path: Path) -> None:
    """A regular file inside the folder, or a blob of the Hub's cache."""
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise InputError(
            "scan", path, f"cannot be read ({error})", "check the folder"
        ) from error
    root = folder.resolve()
    blobs = root.parent.parent / "blobs"
    if not real.is_relative_to(root) and not (
        root.parent.name == "snapshots" and real.is_relative_to(blobs)
    ):
        raise InputError(
            "scan",
            path,
            f"is a link that leaves the folder, to {real}",
            "copy the file into the folder",
        )
    if not stat.S_ISREG(mode):
        raise InputError("scan", path, "is not a regular file", "replace it")


def _check_tensors(
    folder: Path, shards: tuple[ShardFile, ...], weight_map: Mapping[str, str] | None
) -> None:
    found: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.header.tensors:
            if tensor.name in found:
                raise InputError(
                    "scan",
                    folder,
                    f"{tensor.name} is in {found[tensor.name]} and {shard.path.name}",
                    "remove one",
                )
            found[tensor.name] = shard.path.name
    if weight_map is not None and found != dict(weight_map):
        absent = sorted(set(weight_map.items()) - set(found.items()))
        extra = sorted(set(found.items()) - set(weight_map.items()))
        raise InputError(
            "scan",
            folder / _INDEX,
            f"does not fit its shards: only in the index {_few(absent)}, only in the "
            f"shards {_few(extra)}",
            "download the checkpoint again",
        )


def _few(pairs: list[tuple[str, str]]) -> str:
    if not pairs:
        return "nothing"
    shown = ", ".join(f"{tensor} ({name})" for tensor, name in pairs[:3])
    return shown if len(pairs) <= 3 else f"{shown} and {len(pairs) - 3} more"


def _small_files(folder: Path) -> dict[str, Path]:
    """Config, tokenizer and card; no code, so that none can run in a conversion."""
    files = {}
    for path in sorted(folder.iterdir()):
        if (
            path.suffix in _SMALL_SUFFIXES
            and not path.name.endswith(".index.json")
            and path.is_file()
            and path.stat().st_size <= _MAX_SMALL_BYTES
        ):
            _check_regular(folder, path)
            files[path.name] = path
    return files


def _read_json_object(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    _check_regular(folder, path)
    if path.stat().st_size > _MAX_SMALL_BYTES:
        raise InputError(
            "scan",
            path,
            f"{path.stat().st_size:,} bytes are more than {_MAX_SMALL_BYTES:,}",
            "download it again",
        )
    try:
        values = loads_strict(path.read_bytes())
    except json.JSONDecodeError as error:
        raise InputError(
            "scan",
            path,
            f"is not JSON at line {error.lineno}: {error.msg}",
            "download it again",
        ) from error
    except ValueError as error:
        raise InputError("scan", path, f"{error}", "download it again") from error
    if not isinstance(values, dict):
        raise InputError("scan", path, "is not a JSON object", "download it again")
    return values

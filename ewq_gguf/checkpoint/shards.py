"""The weight files of a checkpoint, and whether they are as its index says."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ewq_gguf.checkpoint.files import (
    check_regular,
    no_checkpoint,
    read_json_object,
)
from ewq_gguf.checkpoint.header import Header, read_header, read_remote_header
from ewq_gguf.checkpoint.remote import RemoteFile
from ewq_gguf.errors import InputError, printable

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_DEEPSPEED = re.compile(r"global_step\d+|(mp_rank|zero_pp_rank|bf16_zero).*\.pt")
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
class _Choice:
    """The weight files that are taken, and the index's content if there is one.

    Attributes:
        names: The names of the files.
        weight_map: the file of each tensor.
        total_size: bytes of all tensors, as the index has it.
        has_other_index: whether there is an index, of other files.
    """

    names: list[str]
    weight_map: Mapping[str, str] | None = None
    total_size: object = None
    has_other_index: bool = False


def open_shards(
    folder: Path, only: str | None, remote: Callable[[str], RemoteFile] | None
) -> tuple[tuple[ShardFile, ...], tuple[str, ...]]:
    """Choose a checkpoint's weight files and read their headers.

    Args:
        folder: the checkpoint.
        only: the one file to take; None takes the index's or the only set.
        remote: opens a file that stays on its server; None for local ones.

    Returns:
        The files, and notes on what is odd: other weight files that are left, a wrong
        total in the index.

    Raises:
        InputError: a file is missing or not sound, or they do not fit together.
    """
    choice = _choice(folder, only, is_local=remote is None)
    shards = tuple(_open_shard(folder, name, remote) for name in sorted(choice.names))
    _check_tensors(folder, shards, choice.weight_map)
    notes = (
        None if only or remote else _note_on_others(folder, choice),
        _note_on_total(folder, choice, shards),
    )
    return shards, tuple(printable(note, 1000) for note in notes if note)


def _choice(folder: Path, only: str | None, *, is_local: bool) -> _Choice:
    """The weight files as transformers takes them, else `model*`, else the only one.

    A whole file comes before an index that does not name it: who saves a model again in
    one file may leave the index and the shards of before.
    """
    if only:
        return _Choice([only])
    if (folder / _INDEX).is_file():
        choice = _choice_of_index(folder)
        is_stale = _WHOLE not in choice.names and (folder / _WHOLE).is_file()
        if is_local and is_stale:
            return _Choice([_WHOLE], has_other_index=True)
        if is_local:
            _check_present(folder, choice)
        return choice
    if not is_local:
        return _Choice([_WHOLE])
    files = _weight_files(folder)
    if not files:
        _refuse_without_weights(folder)
    names = [name for name in files if name.startswith("model")] or files
    if _WHOLE in names:
        return _Choice([_WHOLE])
    _check_numbered(folder, names)
    return _Choice(names)


def _choice_of_index(folder: Path) -> _Choice:
    index = read_json_object(folder, _INDEX)
    weight_map = _weight_map(folder, index)
    names = sorted(set(weight_map.values()))
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return _Choice(names, weight_map, total)


def _weight_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _note_on_others(folder: Path, choice: _Choice) -> str | None:
    """Other weight files in the folder may be another copy of the model."""
    others = sorted(set(_weight_files(folder)) - set(choice.names))
    if choice.has_other_index:
        others.insert(0, f"{_INDEX} (of other files)")
    if not others:
        return None
    taken = "the index's files" if choice.weight_map else ", ".join(choice.names[:4])
    return f"{folder}: reads {taken}, and leaves {_first(others)}"


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(names[:4])}{more}"


def _note_on_total(
    folder: Path, choice: _Choice, shards: tuple[ShardFile, ...]
) -> str | None:
    """A wrong total is only a number: published checkpoints have some."""
    found = sum(t.end - t.begin for shard in shards for t in shard.header.tensors)
    if choice.total_size is None or choice.total_size == found:
        return None
    stated = printable(repr(choice.total_size), 60)
    return f"{folder / _INDEX}: total_size is {stated}, its tensors have {found} bytes"


def _refuse_without_weights(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if any(name.endswith(".distcp") for name in names):
        found = "shards of a training run (FSDP)"
        remedy = "join them with `accelerate merge-weights`"
    elif any(_DEEPSPEED.fullmatch(name) for name in names):
        found = "a training run's states (DeepSpeed)"
        remedy = "join them with the zero_to_fp32.py that lies beside them"
    elif pickles:
        found = f"pickles ({pickles[0]})"
        remedy = (
            "use a safetensors checkpoint; https://huggingface.co/spaces/safetensors/"
            "convert makes one"
        )
    else:
        raise no_checkpoint(folder, "has no *.safetensors")
    problem = f"has no *.safetensors; it holds {found}"
    raise InputError("scan", folder, problem, remedy)


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
    expected = [
        f"{stem}-{i:05}-of-{count}.safetensors" for i in range(1, int(count) + 1)
    ]
    missing = sorted(set(expected) - set(names))
    if missing:
        raise InputError(
            "scan",
            folder,
            f"{len(missing)} of {len(expected)} shards are missing: "
            f"{', '.join(missing[:4])}",
            "download them",
        )


def _weight_map(folder: Path, index: Mapping[str, Any]) -> dict[str, str]:
    weight_map = index.get("weight_map")
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


def _check_present(folder: Path, choice: _Choice) -> None:
    missing = [name for name in choice.names if not (folder / name).exists()]
    if missing:
        assert choice.weight_map is not None
        tensors = [t for t, name in choice.weight_map.items() if name in missing]
        others = sorted(set(_weight_files(folder)) - set(choice.names))
        instead = f"; beside it are {_first(others)}" if others else ""
        raise InputError(
            "scan",
            folder,
            f"the index names missing shards: {', '.join(missing[:4])} with "
            f"{len(tensors)} tensors ({tensors[0]}, ...){instead}",
            "download them, or remove the index if it is of another set"
            if others
            else "download them",
        )


def _open_shard(
    folder: Path, name: str, remote: Callable[[str], RemoteFile] | None
) -> ShardFile:
    path = folder / name
    if remote is not None:
        file = remote(name)
        return ShardFile(Path(name), read_remote_header(file, Path(name)), file)
    check_regular(folder, path)
    fd = os.open(path, os.O_RDONLY)
    try:
        return ShardFile(path, read_header(fd, path))
    finally:
        os.close(fd)


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

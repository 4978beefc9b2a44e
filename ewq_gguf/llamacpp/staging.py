"""The converter's view of a checkpoint: links under fixed names, without code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ewq_gguf.checkpoint.files import MORE_TEMPLATES
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.fp8 import (
    QUANT_FILE,
    is_fp8,
    quantisation_of,
    without_quantisation,
)
from ewq_gguf.checkpoint.other_tensors import buffers_of
from ewq_gguf.checkpoint.shards import ShardFile
from ewq_gguf.llamacpp.left_out_child import VARIABLE as LEFT_OUT
from ewq_gguf.records import Source
from ewq_gguf.strict_json import parse_json
from ewq_gguf.tensor_names import is_dropped


def left_out_env(checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """The variable that names the checkpoint's buffers to the converter, if any."""
    found = [t for t in buffers_of(checkpoint) if not is_dropped(t.name)]
    if not found:
        return {}
    path = folder / "left_out.json"
    path.write_text(json.dumps([(tensor.name, tensor.dtype) for tensor in found]))
    return {LEFT_OUT: str(path)}


def stage_checkpoint(checkpoint: Checkpoint, folder: Path) -> Path:
    """Make the converter's view of a checkpoint: links under fixed names.

    JSON files that name code to run (`auto_map`) are copied without it, and config.json
    with what the converter understands of the FP8 weights' scales. A chat template that
    was chosen stands alone.
    """
    staged = folder / (checkpoint.identity.name or "model")
    staged.mkdir()
    told = quantisation_of(checkpoint.folder, checkpoint.config)
    in_fp8 = checkpoint.fp8 is not None or is_fp8(told)
    has_template = "chat_template" in checkpoint.identity.chosen
    for name, path in checkpoint.small_files.items():
        (staged / name).parent.mkdir(exist_ok=True)
        if in_fp8 and name == QUANT_FILE:
            continue  # config.json says it
        if has_template and name.startswith(f"{MORE_TEMPLATES}/"):
            continue
        changed = None
        if path.suffix == ".json":
            changed = _changed(checkpoint, name, path, is_fp8=in_fp8)
        if changed is None:
            (staged / name).symlink_to(path.resolve())
        else:
            (staged / name).write_text(json.dumps(changed), encoding="utf-8")
    for name, shard in _staged_shards(checkpoint).items():
        if shard.remote is None:
            (staged / name).symlink_to(shard.path.resolve())
        else:
            _write_hollow(staged / name, shard)
    return staged


def _write_hollow(path: Path, shard: ShardFile) -> None:
    """A file with a remote shard's header and a hole for its data."""
    with path.open("wb") as file:
        file.write(len(shard.header.raw).to_bytes(8, "little") + shard.header.raw)
        file.truncate(shard.header.file_bytes)


def _staged_shards(checkpoint: Checkpoint) -> dict[str, ShardFile]:
    """The shards under the names the converter looks for."""
    count = len(checkpoint.shards)
    if count == 1:
        return {"model.safetensors": checkpoint.shards[0]}
    return {
        f"model-{i:05}-of-{count:05}.safetensors": shard
        for i, shard in enumerate(checkpoint.shards, 1)
    }


def read_sources(checkpoint: Checkpoint, path: Path) -> dict[str, tuple[Source, ...]]:
    """The sources that header_child wrote, with the checkpoint's own names."""
    names = {
        (file, tensor.begin): tensor.name
        for file, shard in _staged_shards(checkpoint).items()
        for tensor in shard.header.tensors
    }
    return {
        entry["name"]: tuple(
            Source(
                hf_name=names[source["file"], source["offset"]],
                box=source["box"] and tuple(tuple(part) for part in source["box"]),
            )
            for source in entry["sources"]
        )
        for entry in json.loads(path.read_text())
    }


def _changed(
    checkpoint: Checkpoint, name: str, path: Path, *, is_fp8: bool
) -> dict[str, Any] | None:
    """A JSON file's values as the converter gets them, None where it gets the file."""
    hidden = ["auto_map"]
    if "chat_template" in checkpoint.identity.chosen:
        hidden.append("chat_template")
    text = path.read_bytes()
    if name != "config.json" and not any(f'"{key}"'.encode() in text for key in hidden):
        return None
    try:
        values = parse_json(text, [])
    except ValueError:
        return None  # the converter reports it, with its own words
    if not isinstance(values, dict):
        return None
    changed = {key: value for key, value in values.items() if key not in hidden}
    if name == "config.json" and is_fp8:
        changed = without_quantisation(changed)
        if checkpoint.fp8 is not None:
            changed["quantization_config"] = checkpoint.fp8.converter_config
    return None if changed == values else changed

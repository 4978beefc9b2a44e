"""A checkpoint's config.json: its architecture, its layers, its context."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ewq_gguf.checkpoint.files import (
    no_checkpoint,
    read_json_object,
)
from ewq_gguf.checkpoint.fp8 import (
    is_fp8,
    method_name,
    quantisation_of,
)
from ewq_gguf.checkpoint.packing import packing_of
from ewq_gguf.checkpoint.shards import ShardFile as ShardFile
from ewq_gguf.errors import InputError

ADAPTER_CONFIG = "adapter_config.json"
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_CLASSIFIER = re.compile(
    r"For(Sequence|Token|MultiLabel)Classification$|ForQuestionAnswering$|RewardModel$"
)


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
    _check_architecture(hf_architecture(config, folder), path, architectures, config)
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
        same_task = sorted(name for name in supported if name.endswith(match[0]))
        raise InputError(
            "scan",
            path,
            f"{architecture} is a classifier, such as a reranker or a reward model: "
            f"llama.cpp's converter has no place for its head; it takes "
            f"{', '.join(same_task) or 'none of this kind'}",
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
    """The error for a folder with an adapter and no model.

    Args:
        folder: the adapter.
        adapter: its adapter_config.json, or an empty one.
        example: The name of a tensor in it, in brackets.
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


def hf_architecture(config: Mapping[str, Any], folder: Path) -> str:
    """The first name in `architectures`.

    Raises:
        InputError: there is none.
    """
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


def n_layers_of(config: Mapping[str, Any], folder: Path) -> int:
    """The number of the language model's layers.

    Raises:
        InputError: it is not stated, or not 1 to 10000.
    """
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

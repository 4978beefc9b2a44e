"""The tokenizer and the chat template that lie beside an adapter.

The base's tokenizer stays where it can: training often leaves settings in a tokenizer
(an EOS after every text, padding) that a finished model must not have. An adapter with
tokens of its own needs its tokenizer, and one trained on a chat template needs that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ewq_gguf.checkpoint.files import read_json_object
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.lora.adapter import Adapter
from ewq_gguf.errors import printable

_CONFIG, _TOKENIZER, _TEMPLATE = (
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.jinja",
)


def tokenizer_changes(
    base: Checkpoint,
    adapter: Adapter,
    *,
    is_resized: bool,
    say: Callable[[str], None],
) -> dict[str, bytes]:
    """Small files of the merged model that are not the base's.

    Args:
        base: the checkpoint.
        adapter: with or without tokenizer files in its folder.
        is_resized: whether the embedding has other rows than the base's.
        say: told what is taken.

    Returns:
        The files' bytes by name.

    Raises:
        InputError: a tokenizer file is no sound JSON.
    """
    name, files = adapter.identity.name, adapter.tokenizer_files
    new = sorted(_tokens(files) - _tokens(base.small_files))
    if new:
        shown = ", ".join(printable(token, 30) for token in new[:4])
        say(f"{name} has {len(new)} tokens of its own ({shown}): takes its tokenizer")
        return _whole_tokenizer(files)
    if is_resized:
        say(
            f"{name} changes the number of rows of the embedding and names no new token"
        )
    template = _chat_template(files)
    if template is None or template == _chat_template(base.small_files):
        return {}
    say(f"{name} has another chat template than the base: takes it")
    config = {**_json(base.small_files, _CONFIG), "chat_template": template}
    changes = {_CONFIG: json.dumps(config, indent=2).encode()}
    if _TEMPLATE in base.small_files:
        changes[_TEMPLATE] = template.encode()
    return changes


def _whole_tokenizer(files: Mapping[str, Path]) -> dict[str, bytes]:
    """All tokenizer files; where tokenizer_config.json lists no tokens, with a list.

    A sentencepiece model knows no added tokens, and newer versions of transformers list
    them in tokenizer.json only.
    """
    changes = {name: path.read_bytes() for name, path in files.items()}
    config = _json(files, _CONFIG)
    added = _json(files, _TOKENIZER).get("added_tokens")
    if added and not config.get("added_tokens_decoder"):
        config["added_tokens_decoder"] = {str(token["id"]): token for token in added}
        changes[_CONFIG] = json.dumps(config, indent=2).encode()
    return changes


def _tokens(files: Mapping[str, Path]) -> set[str]:
    """Tokens that were added to a tokenizer's vocabulary, and its special ones."""
    config = _json(files, _CONFIG)
    listed = [*_json(files, _TOKENIZER).get("added_tokens", [])]
    listed += config.get("added_tokens_decoder", {}).values()
    special = {**config, **_json(files, "special_tokens_map.json")}
    listed += [value for key, value in special.items() if key.endswith("_token")]
    names = [value["content"] if isinstance(value, dict) else value for value in listed]
    return {name for name in names if isinstance(name, str)} | set(
        _json(files, "added_tokens.json")
    )


def _chat_template(files: Mapping[str, Path]) -> str | None:
    """The one chat template of a tokenizer; None for none and for several."""
    template = _json(files, _CONFIG).get("chat_template")
    if template is None and _TEMPLATE in files:
        template = files[_TEMPLATE].read_text(encoding="utf-8")
    if template is None:
        template = _json(files, "chat_template.json").get("chat_template")
    return template if isinstance(template, str) else None


def _json(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    return read_json_object(files[name].parent, name) if name in files else {}

"""Heads that draft further tokens (MTP, NextN): which tensors of a checkpoint they are.

Some families write them under `mtp.`, others as layers behind the last one that
config.json counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.header import TensorHeader

_NAMED = re.compile(r"(^|\.)mtp(\.|_)")
_LAYER = re.compile(r"^(?:model\.|language_model\.)*layers\.(\d+)\.")
_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


def head_tensors(checkpoint: Checkpoint) -> list[TensorHeader]:
    """The checkpoint's tensors that belong to heads for further tokens."""
    n_layers = checkpoint.identity.n_layers
    behind = n_promised(checkpoint.config) > 0
    return [
        tensor
        for _, tensor in checkpoint.tensors
        if _NAMED.search(tensor.name)
        or (
            behind
            and (match := _LAYER.match(tensor.name))
            and int(match[1]) >= n_layers
        )
    ]


def n_promised(config: Mapping[str, Any]) -> int:
    """How many heads config.json says there are."""
    for source in (config, config.get("text_config")):
        if isinstance(source, dict):
            for key in _COUNTS:
                if isinstance(count := source.get(key), int) and count > 0:
                    return count
    return 0

"""Tensors of a checkpoint that are not the text model's weights, by their names.

Buffers, such as masks, positions and tables of angles, which PyTorch saves beside a
module's weights and no GGUF holds; parts for images or sounds; heads that draft further
tokens (MTP, NextN), which some families write under `mtp.` and others as layers behind
the last one that config.json counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.header import TensorHeader
from ewq_gguf.errors import printable
from ewq_gguf.tensor_names import is_dropped

FLOATS = frozenset({"BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"})
_NAMES = re.compile(
    r"(.*\.)?(inv_freq|original_inv_freq|masked_bias|position_ids|token_type_ids"
    r"|(cos|sin)_cached)"
)
#: Names of masks; a bias of that name has one dimension.
_MASK = re.compile(r".*\bat(tn|tention)\.(bias|mask|causal_mask)")
#: Integers of these names are a quantised model's codes, or tables that a GGUF holds.
_CODES_OR_TABLES = re.compile(
    r".*(weight|packed|qweight|qzeros|g_idx|_shape|_blocks|_scales|tid2eid|d2t|t2d)"
)
_SHOWN = 3


def is_buffer(tensor: TensorHeader) -> bool:
    """Whether a tensor is none of the model's weights, by its name, dtype and shape."""
    if _NAMES.fullmatch(tensor.name) or is_dropped(tensor.name):
        return True
    if _MASK.fullmatch(tensor.name) and tensor.shape[:2] == (1, 1):
        return True
    return tensor.dtype not in FLOATS and not _CODES_OR_TABLES.fullmatch(tensor.name)


def buffers_of(checkpoint: Checkpoint) -> list[TensorHeader]:
    """A checkpoint's buffers, in file order; of a GGUF none."""
    if checkpoint.identity.is_gguf:
        return []
    return [tensor for _, tensor in checkpoint.tensors if is_buffer(tensor)]


def note_on_buffers(checkpoint: Checkpoint) -> str | None:
    """A note on the tensors that are left out because they are no weights, or None."""
    found = buffers_of(checkpoint)
    if not found:
        return None
    shown = ", ".join(f"{tensor.name} {tensor.dtype}" for tensor in found[:_SHOWN])
    more = ", ..." if len(found) > _SHOWN else ""
    n_bytes = sum(tensor.end - tensor.begin for tensor in found)
    return printable(
        f"{checkpoint.folder}: leaves out {len(found)} tensors of {n_bytes:,} bytes "
        f"that are no weights: {shown}{more}",
        1000,
    )


#: Parts of a checkpoint's tensor names that are for images or sounds.
_MEDIA = re.compile(
    r"(^|\.)(vision|visual|vit|image|img|audio|speech|whisper|siglip|sam_model|vpm|apm"
    r"|resampler|connector|multi_?modal_projector|mm_projector|mlp_AR|mlp1"
    r"|aligner|perceiver)",
    re.IGNORECASE,
)
_AUDIO = re.compile(r"audio|speech|whisper|apm", re.IGNORECASE)


def is_media(tensor: TensorHeader) -> bool:
    """Whether a tensor is for images or sounds."""
    return _MEDIA.search(tensor.name) is not None


def is_audio(tensor: TensorHeader) -> bool:
    """Whether a tensor for images or sounds is for sounds."""
    return _AUDIO.search(tensor.name) is not None


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

"""Tensors of a checkpoint that are no weights: masks, positions, tables of angles.

PyTorch saves a module's buffers beside its weights. No GGUF holds them.
"""

from __future__ import annotations

import re

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
    """What of a checkpoint is left out because it is no weights, or None."""
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

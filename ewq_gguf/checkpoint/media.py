"""Which tensors of a checkpoint are for images or sounds, by their names."""

from __future__ import annotations

import re

from ewq_gguf.checkpoint.header import TensorHeader

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

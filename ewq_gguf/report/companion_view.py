"""Files beside a text model, for people."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ewq_gguf.checkpoint.header import TensorHeader
from ewq_gguf.checkpoint.other_tensors import is_audio
from ewq_gguf.records import Companion
from ewq_gguf.size_text import size_text


def companion_line(path: Path, found: Companion) -> str:
    """A file beside the model: what is in it, and what was checked."""
    what = " and ".join(found.media) or "heads for further tokens"
    line = (
        f"{path}: {what}, {found.n_sources} tensors of the checkpoint, "
        f"{size_text(found.source_bytes)} -> {size_text(found.file_bytes)}; "
        f"{found.n_equal} of its {found.n_tensors} tensors hold the checkpoint's values"
    )
    if found.computed:
        line += f", {len(found.computed)} computed ones are finite"
    if found.embedded is not None:
        line += f"; llama.cpp made {found.embedded} finite embeddings of a test input"
    else:
        line += "; llama.cpp loads it" if found.is_loaded else "; not loaded"
    return line


def described(tensors: Collection[TensorHeader]) -> str:
    """Such as `28 tensors for images (1.2 MB)`."""
    n_bytes = sum(tensor.end - tensor.begin for tensor in tensors)
    sounds = sum(1 for tensor in tensors if is_audio(tensor))
    kinds = [
        *(["images"] if sounds < len(tensors) else []),
        *(["sounds"] if sounds else []),
    ]
    return (
        f"{len(tensors)} tensors for {' and '.join(kinds)} ({size_text(n_bytes)} in "
        "the checkpoint)"
    )

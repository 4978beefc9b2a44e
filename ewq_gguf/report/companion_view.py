"""Lines about files beside a text model, such as multimodal projectors."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ewq_gguf.checkpoint.header import TensorHeader
from ewq_gguf.checkpoint.other_tensors import is_audio
from ewq_gguf.records import Companion
from ewq_gguf.size_text import size_text


def companion_line(path: Path, companion: Companion) -> str:
    """A file beside the model: its contents, and the checks that it passed."""
    contents = " and ".join(companion.media) or "heads for further tokens"
    line = (
        f"{path}: {contents}, {companion.n_sources} tensors of the checkpoint, "
        f"{size_text(companion.source_bytes)} -> {size_text(companion.file_bytes)}; "
        f"{companion.n_equal} of its {companion.n_tensors} tensors hold the "
        "checkpoint's values"
    )
    if companion.computed:
        line += f", {len(companion.computed)} computed ones are finite"
    if companion.embedded is not None:
        line += (
            f"; llama.cpp made {companion.embedded} finite embeddings of a test input"
        )
    else:
        line += "; llama.cpp loads it" if companion.is_loaded else "; not loaded"
    return line


def described(tensors: Collection[TensorHeader]) -> str:
    """Tensors by use, such as `28 tensors for images (1.2 MB)`."""
    n_bytes = sum(tensor.end - tensor.begin for tensor in tensors)
    sounds = sum(1 for tensor in tensors if is_audio(tensor))
    media = [
        *(["images"] if sounds < len(tensors) else []),
        *(["sounds"] if sounds else []),
    ]
    return (
        f"{len(tensors)} tensors for {' and '.join(media)} ({size_text(n_bytes)} in "
        "the checkpoint)"
    )

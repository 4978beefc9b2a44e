"""Companion: a GGUF that goes beside the text model's, and what was found in it."""

from __future__ import annotations

from typing import Literal

from ewq_gguf.records.base import Record


class Companion(Record):
    """A verified file beside the text model.

    Attributes:
        content: `mmproj` (images and sounds become embeddings) or `mtp` (heads that
            draft further tokens).
        media: `vision`, `audio`, or both; empty for heads.
        file_sha256: hash of the whole file.
        file_bytes: its size.
        n_sources: tensors of the checkpoint that are in it.
        source_bytes: their size in the checkpoint.
        n_tensors: tensors in the file.
        n_equal: those whose values were compared with the checkpoint's and are equal,
            as far as their type holds them.
        computed: those whose values the converter computes; they were found finite.
        is_loaded: whether llama.cpp loaded it.
        embedded: how many embeddings it made of a test image or sound, all finite.
        answer: the text model's answer to them.
    """

    schema_name: Literal["ewq.companion"] = "ewq.companion"
    schema_version: Literal[1] = 1

    content: Literal["mmproj", "mtp"]
    media: tuple[str, ...]
    file_sha256: str
    file_bytes: int
    n_sources: int
    source_bytes: int
    n_tensors: int
    n_equal: int
    computed: tuple[str, ...]
    is_loaded: bool = False
    embedded: int | None = None
    answer: str | None = None

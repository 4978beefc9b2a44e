"""Reference: description of a base model's reference file, beside its tensors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ewq_gguf.records.base import Part, Record
from ewq_gguf.records.result import BenchedFile, BenchSetup, Engine


class HeadShape(Part):
    """Operations on the product of output matrix and hidden state in llama.cpp.

    Attributes:
        scale: factor of the logits; 1 for none.
        softcap: they become softcap * tanh(logits / softcap); None for no cap.
    """

    scale: float
    softcap: Annotated[float, Field(gt=0)] | None


class ReferenceText(Part):
    """A text that the base has read; its tensors are `text.N.*`.

    Attributes:
        name: as it was given.
        sha256: hash of the file.
        n_windows: stored.
        n_tokens: in them.
        n_scored: tokens of these that are scored.
        first: index of the first scored token in each window.
    """

    name: str
    sha256: str
    n_windows: int
    n_tokens: int
    n_scored: int
    first: Annotated[int, Field(ge=1)]


class Reference(Record):
    """A base model's answers to texts, without the model.

    Attributes:
        model: the base.
        tokenizer_sha256: hash of the keys `tokenizer.ggml.*` in its file.
        engine: library that computed.
        setup: how it was loaded.
        n_ctx: tokens of a window, or the longest document.
        n_chunks: windows or documents asked of each text; None for all.
        is_lines: each line is a document and every token of it is scored.
        head: how logits come from the output matrix.
        max_error_nats: the most by which a log-probability may differ from the
            engine's; every batch was checked.
        texts: in the order given.
    """

    schema_name: Literal["ewq.reference"] = "ewq.reference"
    schema_version: Literal[1] = 1

    model: BenchedFile
    tokenizer_sha256: str
    engine: Engine
    setup: BenchSetup
    n_ctx: int
    n_chunks: int | None
    is_lines: bool
    head: HeadShape
    max_error_nats: float
    texts: tuple[ReferenceText, ...]

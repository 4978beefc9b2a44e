"""Pieces that children have finished, a line of a journal each."""

from __future__ import annotations

from typing import Any

from ewq_gguf.records.base import Part
from ewq_gguf.records.generation import Answer
from ewq_gguf.records.result import Engine
from ewq_gguf.records.scores import ItemScore, MmluOutcome
from ewq_gguf.records.texts import TextResult


class ChunkPart(Part):
    """A child's finished batch of windows or documents, token by token.

    Attributes:
        name: number of the text, and of the batch in it: `0/12`.
        lengths: scored tokens of each window or document.
        nll_nats: -ln p of each token.
        base_nll_nats: the base's, of each token; empty without one.
        kld_nats: divergence at each token; empty likewise.
        is_same_top: whether both find the same token likeliest; likewise.
    """

    name: str
    lengths: tuple[int, ...]
    nll_nats: tuple[float, ...]
    base_nll_nats: tuple[float, ...] = ()
    kld_nats: tuple[float, ...] = ()
    is_same_top: tuple[bool, ...] = ()


class RunPart(Part):
    """A child process that came to its end.

    Attributes:
        name: the task's name.
        engine: library that computed.
        fields: fields of Result, as JSON.
    """

    name: str
    engine: Engine
    fields: dict[str, Any]


class ItemPart(Part):
    """A question of a task that was answered.

    Attributes:
        name: id of the question.
        item: its scores.
    """

    name: str
    item: ItemScore


class MmluPart(Part):
    """A question that was answered.

    Attributes:
        name: its id.
        outcome: the answer.
    """

    name: str
    outcome: MmluOutcome


class AnswerPart(Part):
    """A prompt that was answered.

    Attributes:
        name: its id.
        answer: to it.
    """

    name: str
    answer: Answer


class StudyPart(Part):
    """A file that a study has measured.

    Attributes:
        name: SHA-256 over its tensors' types.
        engine: library that computed.
        quality: perplexity and divergence from the base.
    """

    name: str
    engine: Engine
    quality: TextResult

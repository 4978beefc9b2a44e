"""ARC-Challenge: school science, as lm-evaluation-harness's task `arc_challenge`.

The prompt is `Question: ...`, a new line and `Answer:`, without examples; each choice
follows after a space, and the likeliest is taken: `acc` by the log-likelihood of its
tokens, `acc_norm` by that over the choice's characters. A model whose texts begin with
BOS gets it, as in llama.cpp; the harness's own backends leave it out for some models.

Source: Clark et al., arXiv:1803.05457; lm-evaluation-harness 0.4.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ewq_gguf.bench.engines.forward import prompt_tokens
from ewq_gguf.bench.engines.scorer import STAGE, Model
from ewq_gguf.bench.questions.choices import (
    DEFAULT_LIMIT,
    ChoiceQuestion,
    ChoiceTask,
)
from ewq_gguf.bench.questions.continuations import Continuations, Likelihoods
from ewq_gguf.bench.questions.datafile import read_rows
from ewq_gguf.bench.task import TaskOption
from ewq_gguf.checkpoint.hub_data import data_file
from ewq_gguf.records.scores import RowFault

_LABELS = "ABCDE"
_HUB = ("allenai/ai2_arc", "ARC-Challenge/test-00000-of-00001.parquet")


class Task(ChoiceTask):
    """Questions with three to five choices, most with four."""

    name = "arc"
    names = ("arc",)
    title = "ARC-Challenge, 0 shots"
    measures = ("acc", "acc_norm")
    options = (
        TaskOption(
            "--arc",
            "ARC's questions: the authors' JSONL, the Hub's parquet, or CSV with the "
            "columns question, A to E and answerKey; `hub` fetches ARC-Challenge.",
            metavar="FILE|hub",
        ),
        TaskOption(
            "--arc-limit",
            "Questions of ARC; 0 is all 1 172.",
            default=DEFAULT_LIMIT,
            minimum=0,
        ),
    )
    remedy = "name ARC's questions with --arc FILE or --arc hub"

    def hub_file(self) -> Path:
        """The test part of ARC-Challenge."""
        return data_file(*_HUB, STAGE, instead="name a file with --arc FILE")

    def read(self, path: Path) -> Iterator[ChoiceQuestion | RowFault]:
        """The rows of a file."""
        for n, row in enumerate(read_rows(path), 1):
            yield _question(n, row) or RowFault(
                file=path.name,
                row=n,
                problem="has no question, fewer than two choices, or no right one",
                is_left_out=True,
            )

    def tokenize(self, model: Model, question: ChoiceQuestion) -> Continuations:
        """The tokens after those of the prompt alone are scored."""
        return Continuations(
            question.id,
            tuple(
                prompt_tokens(model, f"{question.prompt} {choice}")
                for choice in question.choices
            ),
            n_given=len(prompt_tokens(model, question.prompt)),
        )

    def chosen(
        self, question: ChoiceQuestion, scored: Likelihoods
    ) -> Mapping[str, int]:
        """The likeliest choice, and the likeliest per character."""
        n_chars = np.array([len(choice) for choice in question.choices])
        return {
            "acc": int(scored.nats.argmax()),
            "acc_norm": int((scored.nats / n_chars).argmax()),
        }


def _question(n: int, row: Mapping[str, Any]) -> ChoiceQuestion | None:
    """A row of the Hub's data set, of the authors' JSONL or of a CSV file."""
    text, choices = row.get("question"), row.get("choices")
    if isinstance(text, dict):
        text, choices = row["question"].get("stem"), row["question"].get("choices")
    if isinstance(choices, dict):
        labels, texts = choices.get("label") or [], choices.get("text") or []
    elif isinstance(choices, list):
        labels = [one.get("label") for one in choices]
        texts = [one.get("text") for one in choices]
    else:
        labels = [label for label in _LABELS if row.get(label)]
        texts = [row[label] for label in labels]
    key = row.get("answerKey")
    if not isinstance(text, str) or not text.strip() or key not in labels:
        return None
    if len(texts) != len(labels) or len(texts) < 2:
        return None
    if not all(isinstance(choice, str) and choice.strip() for choice in texts):
        return None
    prompt = f"Question: {text}\nAnswer:"
    return ChoiceQuestion(n, prompt, tuple(texts), labels.index(key))

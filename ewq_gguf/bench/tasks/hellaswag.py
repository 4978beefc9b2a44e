"""HellaSwag: the best of four endings of a text, as `llama-perplexity` scores them.

Text and ending are joined by a space. The tokens that all four have in common are
given, all others are scored; the ending with the highest mean log-likelihood of a token
is taken (`acc_norm`). `acc`, by the sum, is not what llama-perplexity prints.

Source: Zellers et al., arXiv:1905.07830; llama.cpp tools/perplexity, hellaswag_score.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ewq_gguf.bench.engines.forward import prompt_tokens
from ewq_gguf.bench.engines.scorer import STAGE, IntArray, Model
from ewq_gguf.bench.questions.choices import (
    DEFAULT_LIMIT,
    ChoiceQuestion,
    ChoiceTask,
)
from ewq_gguf.bench.questions.continuations import Continuations, Likelihoods
from ewq_gguf.bench.questions.datafile import read_rows, read_text
from ewq_gguf.bench.questions.tokens import n_shared_tokens
from ewq_gguf.bench.task import TaskOption
from ewq_gguf.checkpoint.hub_data import data_file
from ewq_gguf.errors import InputError
from ewq_gguf.records.scores import RowFault

_HUB = ("Rowan/hellaswag", "data/validation-00000-of-00001.parquet")
#: Lines of a question in llama-perplexity's format: text, index, four endings.
_N_LINES = 6


class Task(ChoiceTask):
    """Four endings, one of them the true one."""

    name = "hellaswag"
    names = ("hellaswag",)
    title = "HellaSwag, 0 shots"
    measures = ("acc_norm", "acc")
    options = (
        TaskOption(
            "--hellaswag",
            "HellaSwag's questions: a text file for llama-perplexity, with six lines "
            "for each; the authors' JSONL, or the Hub's parquet, which `hub` fetches.",
            metavar="FILE|hub",
        ),
        TaskOption(
            "--hellaswag-limit",
            "Questions of HellaSwag; 0 is all 10 042.",
            default=DEFAULT_LIMIT,
            minimum=0,
        ),
    )
    remedy = "name HellaSwag's questions with --hellaswag FILE or --hellaswag hub"

    def hub_file(self) -> Path:
        """The validation part, which has the answers."""
        return data_file(*_HUB, STAGE, instead="name a file with --hellaswag FILE")

    def read(self, path: Path) -> Iterator[ChoiceQuestion | RowFault]:
        """The rows of a file, or the groups of six lines of a text."""
        is_rows = path.suffix in (".parquet", ".jsonl", ".json", ".csv")
        for n, row in enumerate((_rows if is_rows else _groups)(path), 1):
            text, endings, label = row
            if text.strip() and len(endings) == 4 and all(endings) and label in "0123":
                yield ChoiceQuestion(n, text, endings, int(label))
            else:
                problem = "has no text, no four endings, or no index 0 to 3"
                yield RowFault(file=path.name, row=n, problem=problem, is_left_out=True)

    def tokenize(self, model: Model, question: ChoiceQuestion) -> Continuations:
        """The tokens that all endings share are given, words of the endings too."""
        end = np.array([model.eos] if model.add_eos else [], np.int32)
        tokens: tuple[IntArray, ...] = tuple(
            np.concatenate([prompt_tokens(model, f"{question.prompt} {choice}"), end])
            for choice in question.choices
        )
        n_given = max(n_shared_tokens([some.tolist() for some in tokens]), 1)
        return Continuations(question.id, tokens, n_given)

    def chosen(
        self, question: ChoiceQuestion, scored: Likelihoods
    ) -> Mapping[str, int]:
        """The likeliest ending per token, and the likeliest."""
        return {
            "acc_norm": int((scored.nats / scored.n_scored).argmax()),
            "acc": int(scored.nats.argmax()),
        }


def _groups(path: Path) -> Iterator[tuple[str, tuple[str, ...], str]]:
    lines = read_text(path).removesuffix("\n").split("\n")
    if len(lines) % _N_LINES:
        problem = f"has {len(lines)} lines, not six for each question"
        raise InputError(STAGE, path, problem, "give text, index and four endings")
    for begin in range(0, len(lines), _N_LINES):
        text, label, *endings = lines[begin : begin + _N_LINES]
        yield text, tuple(endings), label.strip() or "-"


def _rows(path: Path) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """The data set's rows, as lm-evaluation-harness prepares them."""
    for row in read_rows(path):
        endings = row.get("endings")
        if endings is None:
            endings = [row.get(f"ending{i}") for i in range(4)]
        text = str(row.get("ctx") or "")
        if row.get("ctx_a"):
            text = f"{row['ctx_a']} {str(row.get('ctx_b') or '').capitalize()}"
        if row.get("activity_label"):
            text = f"{row['activity_label']}: {text}"
        label = str(row.get("label", "")).strip() or "-"
        yield _clean(text), tuple(_clean(str(one or "")) for one in endings), label


def _clean(text: str) -> str:
    """A text without WikiHow's marks (lm-evaluation-harness, hellaswag/utils.py)."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

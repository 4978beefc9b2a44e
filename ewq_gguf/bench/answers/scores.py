"""Generated answers: BLEU and ROUGE beside references, and beside the base model's.

The libraries the literature uses compute the scores, and their versions and settings
are kept with them. An empty answer or reference scores 0 and is counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from pydantic import ValidationError

from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.questions.datafile import read_parquet, read_text
from ewq_gguf.bench.questions.tokens import common_prefix
from ewq_gguf.bench.statistics import Floats, bootstrap_interval
from ewq_gguf.errors import InputError, ToolError
from ewq_gguf.records.base import Part
from ewq_gguf.records.generation import (
    Answer,
    Fidelity,
    GenerationScores,
    TextOutcome,
    TextScores,
)
from ewq_gguf.records.scores import TooLong

#: Our names of rouge-score's measures.
_ROUGES = {
    "rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL",
    "rouge_lsum": "rougeLsum",
}  # fmt: skip
#: sacrebleu's default; each costs a BLEU.
_N_RESAMPLES = 1000
_REMEDY = 'give one {"prompt": ..., "reference": ...} per line'
_LIBRARIES = ("rouge_score", "sacrebleu")
#: What a bill of BillSum is given with.
_SUMMARIZE = "Summarize this bill in one or two sentences.\n\n"


class _Line(Part):
    """A line of a prompts' file."""

    prompt: str
    reference: str | None = None


@dataclass(frozen=True)
class GenerationPrompt:
    """A prompt with its reference, as its file has them.

    Attributes:
        id: `line 3` of its file, or `row 3`.
        text: the user's words.
        reference: a good answer; None where the file has none.
    """

    id: str
    text: str
    reference: str | None


def check_libraries() -> None:
    """Refuse before hours of answers what could not be scored after them.

    Raises:
        ToolError: sacrebleu or rouge-score is missing.
    """
    for name in _LIBRARIES:
        if find_spec(name) is None:
            remedy = "pip install 'ewq-gguf[eval]'"
            raise ToolError(STAGE, name, "is not installed", remedy)


def load_prompts(path: Path, limit: int | None = None) -> tuple[GenerationPrompt, ...]:
    """The first `limit` prompts of a JSONL file, or of BillSum's parquet file.

    Raises:
        InputError: the file cannot be read or is not text, a line is not such an
            object, a prompt is empty, or some lines have a reference and some do not.
        ToolError: pyarrow is missing for a parquet file.
    """
    is_bills = path.suffix == ".parquet"
    prompts = tuple(islice((_bills if is_bills else _lines)(path), limit))
    if not prompts:
        raise InputError(STAGE, path, "has no prompt", _REMEDY)
    for prompt in prompts:
        if not prompt.text.strip():
            raise InputError(STAGE, path, f"{prompt.id}: the prompt is empty", _REMEDY)
        if (prompt.reference is None) != (prompts[0].reference is None):
            problem = f"{prompts[0].id} and {prompt.id}: only one has a reference"
            raise InputError(STAGE, path, problem, "give all of them one, or none")
    return prompts


def _lines(path: Path) -> Iterator[GenerationPrompt]:
    for n, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            parsed = _Line.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}: " for part in first["loc"])
            problem = f"line {n}: {where}{first['msg']}"
            raise InputError(STAGE, path, problem, _REMEDY) from error
        yield GenerationPrompt(f"line {n}", parsed.prompt, parsed.reference)


def _bills(path: Path) -> Iterator[GenerationPrompt]:
    """Bills of the US Congress, and the summaries of the library of Congress."""
    for n, row in enumerate(read_parquet(path, ("text", "summary")), 1):
        for name, value in row.items():
            if not isinstance(value, str) or not value.strip():
                problem = f"row {n}: has no {name}"
                raise InputError(STAGE, path, problem, "download it again")
        yield GenerationPrompt(f"row {n}", _SUMMARIZE + row["text"], row["summary"])


def prompts_hash(prompts: Sequence[GenerationPrompt]) -> str:
    """SHA-256 of all prompts and references; equal where models can be compared."""
    # With their ids, by which answers are kept and paired.
    told = json.dumps([(one.id, one.text, one.reference) for one in prompts])
    return hashlib.sha256(told.encode()).hexdigest()


def generation_scores(
    prompts: Sequence[GenerationPrompt],
    texts: Sequence[str],
    answers: Sequence[Answer],
    *,
    skipped: Sequence[TooLong] = (),
    base: Sequence[Answer] | None = None,
    has_chat_template: bool = False,
) -> GenerationScores:
    """All numbers of a run.

    Args:
        prompts: all of the file.
        texts: the same as the model got them.
        answers: in the prompts' order, without the skipped.
        skipped: prompts that were too long.
        base: the base model's answers to the same texts; None without a base.
        has_chat_template: whether the texts come from one.

    Raises:
        InputError: there is no answer, or none that the base model gave too.
        ToolError: sacrebleu or rouge-score is missing.
    """
    if not answers:
        n_ctx = max((one.n_ctx for one in skipped), default=0)
        problem = f"all {len(skipped)} are longer than the context of {n_ctx} tokens"
        raise InputError(STAGE, "prompts", problem, "give shorter ones")
    references = {prompt.id: prompt.reference for prompt in prompts}
    pairs = [(answer, references[answer.id]) for answer in answers]
    scored = [(a.id, a.text, ref) for a, ref in pairs if ref is not None]
    return GenerationScores(
        prompts_sha256=hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        n_prompts=len(prompts),
        has_chat_template=has_chat_template,
        answers=tuple(answers),
        too_long=tuple(skipped),
        references=text_scores(scored) if scored else None,
        fidelity=None if base is None else fidelity(answers, base),
    )


def fidelity(answers: Sequence[Answer], base: Sequence[Answer]) -> Fidelity:
    """How far a model's answers are the base model's; needs no references.

    Raises:
        InputError: they share no prompt.
        ToolError: sacrebleu or rouge-score is missing.
    """
    by_id = {answer.id: answer for answer in base}
    pairs = [(answer, by_id[answer.id]) for answer in answers if answer.id in by_id]
    if not pairs:
        problem = "the base model answered none of the prompts"
        raise InputError(STAGE, "prompts", problem, "run both on the same file")
    prefixes = [common_prefix(ours.tokens, theirs.tokens) for ours, theirs in pairs]
    longest = [max(len(ours.tokens), len(theirs.tokens)) for ours, theirs in pairs]
    shares = [
        n / length if length else 1.0
        for n, length in zip(prefixes, longest, strict=True)
    ]
    return Fidelity(
        scores=text_scores([(a.id, a.text, b.text) for a, b in pairs]),
        n_identical=sum(ours.tokens == theirs.tokens for ours, theirs in pairs),
        common_prefix_tokens=tuple(prefixes),
        common_prefix_mean=fmean(prefixes),
        common_prefix_share=fmean(shares),
        common_prefix_share_stderr=_stderr(shares),
    )


def text_scores(pairs: Sequence[tuple[str, str, str]]) -> TextScores:
    """BLEU of all answers together, mean ROUGE of each.

    BLEU is sacrebleu's default; ROUGE is rouge-score's without stemming, lines taken
    as sentences for Lsum.

    Args:
        pairs: id, answer and reference; at least one.

    Raises:
        ToolError: sacrebleu or rouge-score is missing.
    """
    check_libraries()
    from rouge_score import tokenize
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU()
    counts = np.array([_bleu_counts(bleu, text, ref) for _, text, ref in pairs])
    total = _bleu_of(counts.sum(axis=0, keepdims=True))
    low, high = bootstrap_interval(counts, _bleu_of, _N_RESAMPLES)
    scorer = RougeScorer(list(_ROUGES.values()), use_stemmer=False)
    outcomes = []
    for id_, text, reference in pairs:
        found = scorer.score(reference, text)
        rouges = {ours: found[theirs].fmeasure for ours, theirs in _ROUGES.items()}
        outcomes.append(TextOutcome(id=id_, **rouges))
    return TextScores(
        n=len(pairs),
        n_empty_answers=sum(not text.strip() for _, text, _ in pairs),
        n_empty_references=sum(not reference.strip() for _, _, reference in pairs),
        n_wordless=sum(
            not all(tokenize.tokenize(text, None) for text in texts)
            for _, *texts in pairs
        ),
        bleu=float(total[0]),
        bleu_low=low,
        bleu_high=high,
        bleu_signature=str(bleu.get_signature()),
        rouge_signature=f"rouge-score {version('rouge-score')}|stemmer:no|F1",
        outcomes=tuple(outcomes),
        **_means(outcomes),
    )


def _bleu_counts(bleu: Any, text: str, reference: str) -> list[float]:
    """Counts that an answer adds: n-grams found and there, 1 to 4; lengths of both."""
    found = bleu.corpus_score([text], [[reference]])
    return [*found.counts, *found.totals, found.sys_len, found.ref_len]


def _bleu_of(sums: Floats) -> Floats:
    """(m, 10) counts of m collections of answers -> (m,) BLEU, 0 to 100."""
    from sacrebleu.metrics.bleu import BLEU

    scores = [
        BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score
        for row in sums.tolist()
    ]
    return np.array(scores, np.float64)


def _means(outcomes: Sequence[TextOutcome]) -> dict[str, Any]:
    """Means and standard errors of all ROUGEs, by the names of TextScores."""
    fields: dict[str, float | None] = {}
    for name in _ROUGES:
        values = [float(getattr(outcome, name)) for outcome in outcomes]
        fields[name] = fmean(values)
        fields[f"{name}_stderr"] = _stderr(values)
    return fields


def _stderr(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for one value."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else None

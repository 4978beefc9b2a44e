"""Results of one model's files as estimates, and as pairs on the same pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import exp, sqrt
from statistics import stdev
from typing import Any

import numpy as np

from ewq_gguf.bench.questions.mmlu_scores import compare_mmlu
from ewq_gguf.bench.statistics import (
    Z95,
    Floats,
    bootstrap_interval,
    composite_score,
    paired_bootstrap,
    paired_t,
)
from ewq_gguf.experiments.comparison_record import (
    ComparedFile,
    ComparedPair,
    Estimate,
)
from ewq_gguf.records import Chunk, Result
from ewq_gguf.records.scores import MmluScores, PairedMean, PairedTest, TaskScores


def estimates(result: Result) -> dict[str, Any]:
    """The numbers of a row with their intervals, by the fields of ComparedFile.

    Windows and questions are taken as independent of each other, tokens of one window
    are not. What was not measured is left out.
    """
    fields: dict[str, Any] = {}
    chunks = _chunks(result)
    if chunks and result.ppl is not None:
        low, high = _ratio([(chunk.nll_nats, chunk.n_tokens) for chunk in chunks])
        fields["ppl"] = Estimate(
            value=result.ppl,
            low=None if low is None else exp(low),
            high=None if high is None else exp(high),
        )
    if result.kld_mean_nats is not None:
        low, high = _ratio([(chunk.kld_nats, chunk.n_tokens) for chunk in chunks])
        value = result.kld_mean_nats
        fields["kld_mean_nats"] = Estimate(value=value, low=low, high=high)
    if result.top1_agreement is not None:
        low, high = _ratio([(chunk.n_same_top, chunk.n_tokens) for chunk in chunks])
        value = result.top1_agreement
        fields["top1_agreement"] = Estimate(value=value, low=low, high=high)
    if result.mmlu is not None:
        fields |= _mmlu_estimates(result.mmlu)
    if (answers := result.generation) is not None:
        same = answers.fidelity.scores if answers.fidelity else None
        for name, rouge in (("rouge_l", answers.references), ("fidelity", same)):
            if rouge is not None:
                fields[name] = _around(rouge.rouge_l, rouge.rouge_l_stderr)
    if result.scores:
        fields["scores"] = {
            f"{task} {name}": Estimate(value=m.value, low=m.low, high=m.high)
            for task, scores in result.scores.items()
            for name, m in scores.measures.items()
        }
    return fields


def _around(value: float, stderr: float | None) -> Estimate:
    """A value and its normal 95 % interval."""
    half = None if stderr is None else Z95 * stderr
    return Estimate(
        value=value,
        low=None if half is None else value - half,
        high=None if half is None else value + half,
    )


def compare_pair(first: ComparedFile, second: ComparedFile) -> ComparedPair:
    """Two rows on the same questions and windows, whichever were measured.

    Raises:
        InputError: they share no question.
    """
    ours, theirs = first.result, second.result
    accuracy = composite = letters = subjects = nll = kld = None
    if ours.mmlu and theirs.mmlu:
        accuracy = compare_mmlu(ours.mmlu.outcomes, theirs.mmlu.outcomes)
        composite = _paired(_composites(ours.mmlu), _composites(theirs.mmlu))
        letters = _paired(_letter_nats(ours.mmlu), _letter_nats(theirs.mmlu))
        subjects = _paired_subjects(ours.mmlu, theirs.mmlu)
    pairs = list(zip(_chunks(ours), _chunks(theirs), strict=True))
    if pairs:
        n_tokens = [chunk.n_tokens for chunk, _ in pairs]
        nll = paired_bootstrap(
            [a.nll_nats / a.n_tokens for a, _ in pairs],
            [b.nll_nats / b.n_tokens for _, b in pairs],
            n_tokens,
        )
        if ours.kld_mean_nats is not None and theirs.kld_mean_nats is not None:
            kld = paired_bootstrap(
                [(a.kld_nats or 0.0) / a.n_tokens for a, _ in pairs],
                [(b.kld_nats or 0.0) / b.n_tokens for _, b in pairs],
                n_tokens,
            )
    return ComparedPair(
        first=first.name,
        second=second.name,
        accuracy=accuracy,
        composite_score=composite,
        mmlu_nats=letters,
        subjects=subjects,
        nll_nats=nll,
        kld_nats=kld,
        scores={
            f"{task} {name}": _paired(
                _item_values(scores, name), _item_values(theirs.scores[task], name)
            )
            for task, scores in ours.scores.items()
            if task in theirs.scores
            for name in scores.measures
        },
    )


def pairs_of(rows: Sequence[ComparedFile]) -> tuple[ComparedPair, ...]:
    """Each plan beside every other row; two plans once."""
    plans = [row for row in rows if row.kind == "plan"]
    others = [row for row in rows if row.kind != "plan"]
    return (
        *(compare_pair(plan, other) for plan in plans for other in others),
        *(compare_pair(first, second) for first, second in combinations(plans, 2)),
    )


def _mmlu_estimates(mmlu: MmluScores) -> dict[str, Estimate]:
    perplexity, nll = mmlu.mmlu_perplexity, mmlu.nll_mean_nats
    error = mmlu.mmlu_perplexity_stderr
    half = None if error is None else Z95 * error / perplexity
    per_question = list(_composites(mmlu).values())
    n = len(per_question)
    return {
        "accuracy": Estimate(
            value=mmlu.accuracy, low=mmlu.accuracy_low, high=mmlu.accuracy_high
        ),
        "mmlu_perplexity": Estimate(
            value=perplexity,
            low=None if half is None else exp(nll - half),
            high=None if half is None else exp(nll + half),
        ),
        "composite_score": _around(
            composite_score(perplexity, mmlu.accuracy),
            stdev(per_question) / sqrt(n) if n > 1 else None,
        ),
    }


def _composites(mmlu: MmluScores) -> dict[str, float]:
    """Each question's part in the composite score, which is their mean, by id."""
    return {
        outcome.id: outcome.nll_nats - (outcome.chosen == outcome.answer)
        for outcome in mmlu.outcomes
    }


def _letter_nats(mmlu: MmluScores) -> dict[str, float]:
    """-ln p of the right letter of each question, by id."""
    return {outcome.id: outcome.nll_nats for outcome in mmlu.outcomes}


def _item_values(scores: TaskScores, measure: str) -> dict[str, float]:
    """Each question's part in a measure, which is their mean, by id."""
    return {item.id: item.values[measure] for item in scores.items}


def _paired(first: Mapping[str, float], second: Mapping[str, float]) -> PairedMean:
    """Over the questions that both were asked."""
    shared = [key for key in first if key in second]
    return paired_bootstrap(
        [first[key] for key in shared], [second[key] for key in shared]
    )


def _paired_subjects(first: MmluScores, second: MmluScores) -> PairedTest | None:
    ours, theirs = (
        {s.subject: s.nll_mean_nats - s.accuracy for s in mmlu.subjects}
        for mmlu in (first, second)
    )
    shared = [subject for subject in ours if subject in theirs]
    return paired_t([ours[s] for s in shared], [theirs[s] for s in shared])


def _chunks(result: Result) -> list[Chunk]:
    return [chunk for text in result.texts for chunk in text.chunks]


def _ratio(
    sums: Sequence[tuple[float | None, int]],
) -> tuple[float, float] | tuple[None, None]:
    """The interval of the first sums over the second, windows resampled."""
    items: Floats = np.array([[a or 0.0, n] for a, n in sums], np.float64)
    return bootstrap_interval(items, lambda drawn: drawn[:, 0] / drawn[:, 1])

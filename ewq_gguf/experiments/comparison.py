"""Results of one model's files as estimates, and as pairs on the same pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import exp, log, sqrt
from statistics import stdev

import numpy as np

from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.questions.mmlu_scores import compare_mmlu
from ewq_gguf.bench.statistics import (
    Z95,
    Floats,
    bootstrap_interval,
    composite_score,
    paired_bootstrap,
    paired_t,
)
from ewq_gguf.errors import UsageError
from ewq_gguf.experiments.comparison_record import (
    ComparedFile,
    ComparedPair,
    Comparison,
    Estimate,
    PairAcrossModels,
    PairedTest,
)
from ewq_gguf.records import Chunk, Result
from ewq_gguf.records.scores import MmluScores, PairedMean

#: Told of each compared file, None where it was not measured.
_MEASURES: dict[str, Callable[[ComparedFile], float | None]] = {
    "composite score": lambda row: _value(row.composite_score),
    "accuracy": lambda row: _value(row.accuracy),
    "ln perplexity": lambda row: log(row.ppl.value) if row.ppl else None,
    "KLD": lambda row: row.result.kld_mean_nats,  # the base has none from itself
}


def estimates(result: Result) -> dict[str, Estimate]:
    """The numbers of a row with their intervals, by the fields of ComparedFile.

    Windows and questions are taken as independent of each other, tokens of one window
    are not. What was not measured is left out.
    """
    found = {}
    chunks = _chunks(result)
    if chunks and result.ppl is not None:
        low, high = _ratio([(chunk.nll_nats, chunk.n_tokens) for chunk in chunks])
        found["ppl"] = Estimate(
            value=result.ppl,
            low=None if low is None else exp(low),
            high=None if high is None else exp(high),
        )
    for name, value, sums in (
        (
            "kld_mean_nats",
            result.kld_mean_nats,
            [(chunk.kld_nats, chunk.n_tokens) for chunk in chunks],
        ),
        (
            "top1_agreement",
            result.top1_agreement,
            [(chunk.n_same_top, chunk.n_tokens) for chunk in chunks],
        ),
    ):
        if value is not None:
            low, high = _ratio(sums)
            found[name] = Estimate(value=value, low=low, high=high)
    if result.mmlu is not None:
        found |= _mmlu_estimates(result.mmlu)
    if (answers := result.generation) is not None:
        same = answers.fidelity.scores if answers.fidelity else None
        for name, scores in (("rouge_l", answers.references), ("fidelity", same)):
            if scores is not None:
                found[name] = _around(scores.rouge_l, scores.rouge_l_stderr)
    return found


def _around(value: float, stderr: float | None) -> Estimate:
    """A mean over answers, taken as independent."""
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
    )


def pairs_of(rows: Sequence[ComparedFile]) -> tuple[ComparedPair, ...]:
    """Each plan beside every other row; two plans once."""
    plans = [row for row in rows if row.kind == "plan"]
    others = [row for row in rows if row.kind != "plan"]
    return (
        *(compare_pair(plan, other) for plan in plans for other in others),
        *(compare_pair(first, second) for first, second in combinations(plans, 2)),
    )


def across_models(comparisons: Sequence[Comparison]) -> tuple[PairAcrossModels, ...]:
    """Every two versions that a model has both of, over the models.

    Source: arXiv:2503.04704v2 section 6.3, table 13.

    Args:
        comparisons: of different models.

    Raises:
        UsageError: two are of one model, which would count twice.
    """
    names = [comparison.model.name for comparison in comparisons]
    if len({c.model.fingerprint for c in comparisons}) < len(names):
        raise UsageError(
            STAGE,
            "compare show",
            f"two comparisons are of one model, among {', '.join(names)}",
            "give one comparison for each model",
        )
    asked = {_conditions(comparison) for comparison in comparisons}
    if len(asked) > 1:
        raise UsageError(
            STAGE,
            "compare show",
            "the comparisons were not measured alike: their texts, windows or "
            "questions differ",
            "measure all models with the same options",
        )
    versions = list(dict.fromkeys(row.name for c in comparisons for row in c.rows))
    rows = {
        (i, row.name): row
        for i, comparison in enumerate(comparisons)
        for row in comparison.rows
    }
    return tuple(
        found
        for measure, value_of in _MEASURES.items()
        for first, second in combinations(versions, 2)
        if (found := _across(measure, value_of, first, second, names, rows))
    )


def _conditions(comparison: Comparison) -> tuple[object, ...]:
    """What all models have to be asked alike."""
    asked = comparison.rows[0].result.parameters
    texts = tuple(text.sha256 for text in asked.texts)
    return texts, asked.n_ctx, asked.n_chunks, asked.is_lines, asked.mmlu_sha256


def test_of(first: Sequence[float], second: Sequence[float]) -> PairedTest | None:
    """`paired_t` as records keep it."""
    test = paired_t(first, second)
    if test is None:
        return None
    return PairedTest(
        n=test.n, mean=test.mean, t=test.t, p=test.p, cohens_d=test.cohens_d
    )


def _across(
    measure: str,
    value_of: Callable[[ComparedFile], float | None],
    first: str,
    second: str,
    names: Sequence[str],
    rows: dict[tuple[int, str], ComparedFile],
) -> PairAcrossModels | None:
    models, ours, theirs = [], [], []
    for i, name in enumerate(names):
        if (i, first) in rows and (i, second) in rows:
            a, b = value_of(rows[i, first]), value_of(rows[i, second])
            if a is not None and b is not None:
                models.append(name)
                ours.append(a)
                theirs.append(b)
    if not models:
        return None
    return PairAcrossModels.model_validate(
        {
            "measure": measure,
            "first": first,
            "second": second,
            "models": tuple(models),
            "test": test_of(ours, theirs),
        }
    )


def _mmlu_estimates(mmlu: MmluScores) -> dict[str, Estimate]:
    perplexity, nll = mmlu.mmlu_perplexity, mmlu.nll_mean_nats
    error = mmlu.mmlu_perplexity_stderr
    half = None if error is None else Z95 * error / perplexity
    per_question = list(_composites(mmlu).values())
    n = len(per_question)
    score = composite_score(perplexity, mmlu.accuracy)
    wide = Z95 * stdev(per_question) / sqrt(n) if n > 1 else None
    return {
        "accuracy": Estimate(
            value=mmlu.accuracy, low=mmlu.accuracy_low, high=mmlu.accuracy_high
        ),
        "mmlu_perplexity": Estimate(
            value=perplexity,
            low=None if half is None else exp(nll - half),
            high=None if half is None else exp(nll + half),
        ),
        "composite_score": Estimate(
            value=score,
            low=None if wide is None else score - wide,
            high=None if wide is None else score + wide,
        ),
    }


def _composites(mmlu: MmluScores) -> dict[str, float]:
    """What each question adds to the composite score, which is their mean, by id."""
    return {
        outcome.id: outcome.nll_nats - (outcome.chosen == outcome.answer)
        for outcome in mmlu.outcomes
    }


def _letter_nats(mmlu: MmluScores) -> dict[str, float]:
    """-ln p of the right letter of each question, by id."""
    return {outcome.id: outcome.nll_nats for outcome in mmlu.outcomes}


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
    return test_of([ours[s] for s in shared], [theirs[s] for s in shared])


def _chunks(result: Result) -> list[Chunk]:
    return [chunk for text in result.texts for chunk in text.chunks]


def _ratio(
    sums: Sequence[tuple[float | None, int]],
) -> tuple[float, float] | tuple[None, None]:
    """The interval of the first sums over the second, windows resampled."""
    items: Floats = np.array([[a or 0.0, n] for a, n in sums], np.float64)
    return bootstrap_interval(items, lambda drawn: drawn[:, 0] / drawn[:, 1])


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value

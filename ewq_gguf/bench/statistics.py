"""Is one model better than another, or is it chance?

Two models are asked the same questions and read the same text: paired, their difference
is far more certain than two separate intervals suggest. Everything random is seeded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import atanh, log, sqrt, tanh
from statistics import fmean, pvariance, stdev

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ewq_gguf.records import TextResult
from ewq_gguf.records.scores import (
    PairedAccuracy,
    PairedMean,
    PairedTest,
    RankCorrelation,
)

Floats = NDArray[np.float64]

#: Half of a 95 % interval, in standard errors of a normal distribution.
Z95 = 1.959963984540054

#: Below it a difference is called distinguishable: that of a 95 % interval.
ALPHA = 0.05
N_RESAMPLES = 10_000
SEED = 0
#: Numbers held at once: 32 MiB.
_MAX_DRAWS = 1 << 22


def wilson(n_right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927).

    It takes items as independent. Where they are not, such as neighbouring layers or
    questions about one text, the truth is wider.

    Args:
        n_right: items that count.
        n: all items; at least 1.
    """
    from scipy.stats import binomtest

    interval = binomtest(n_right, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def composite_score(
    perplexity: float,
    accuracy: float,
    perplexity_weight: float = 1.0,
    accuracy_weight: float = 1.0,
) -> float:
    """The paper's one number for a model on MMLU; lower is better.

    w_p ln(perplexity) - w_a accuracy, both weights 1 in the paper.

    Source: arXiv:2503.04704v2 section 6.3.1, its formula as table 13 implies it.
    """
    return perplexity_weight * log(perplexity) - accuracy_weight * accuracy


def paired_t(first: Sequence[float], second: Sequence[float]) -> PairedTest | None:
    """Student's paired test and Cohen's d, as the paper's table 13 has them.

    Args:
        first: one value per pair, such as composite scores of models.
        second: as many.

    Returns:
        None where there is nothing to test: fewer than two pairs, or differences that
        are all equal.
    """
    from scipy.stats import ttest_rel

    differences = [a - b for a, b in zip(first, second, strict=True)]
    # Equal differences of floats may differ in their last digits.
    noise = 1e-14 * max((abs(value) for value in (*first, *second)), default=0.0)
    if len(differences) < 2 or stdev(differences) <= noise:
        return None
    test = ttest_rel(first, second)
    mean = fmean(differences)
    return PairedTest(
        n=len(differences),
        mean=mean,
        t=float(test.statistic),
        p=float(test.pvalue),
        cohens_d=mean / sqrt((pvariance(first) + pvariance(second)) / 2),
    )


def mcnemar(
    first: Sequence[bool], second: Sequence[bool], n_unpaired: int = 0
) -> PairedAccuracy:
    """The exact test of two models' right answers to the same questions.

    Only questions that one of them got right count: under no difference each is as
    likely to be the one's as the other's. The interval is Agresti and Min's, which
    adds half a question to each of the four cells.

    Args:
        first: whether right, per question; at least one.
        second: the same questions.
        n_unpaired: questions that only one was asked, for the record.

    Source: McNemar 1947; Agresti and Min, Statistics in Medicine 24 (2005).
    """
    from scipy.stats import binomtest

    pairs = list(zip(first, second, strict=True))
    n = len(pairs)
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    n_split = only_first + only_second
    b, c, m = only_first + 0.5, only_second + 0.5, n + 2
    middle = (b - c) / m
    half = Z95 * sqrt(b + c - (b - c) ** 2 / m) / m
    return PairedAccuracy(
        n=n,
        n_unpaired=n_unpaired,
        n_only_first=only_first,
        n_only_second=only_second,
        difference=(only_first - only_second) / n,
        difference_low=max(middle - half, -1.0),
        difference_high=min(middle + half, 1.0),
        p=float(binomtest(only_first, n_split).pvalue) if n_split else 1.0,
    )


def paired_bootstrap(
    first: ArrayLike, second: ArrayLike, weights: ArrayLike | None = None
) -> PairedMean:
    """How sure the difference of two models' means over the same pieces is.

    Pieces are drawn with replacement. Fewer than about 20 give too narrow an interval,
    and neighbouring chunks of one text are taken as independent. For perplexities give
    mean negative log-likelihoods: exp of the difference is the perplexities' ratio.

    Args:
        first: (n,), such as mean KLD per chunk.
        second: (n,), of the same chunks.
        weights: (n,), such as tokens per chunk; equal ones where None.
    """
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    weight = np.ones_like(difference) if weights is None else np.asarray(weights)
    sums = np.stack([weight * difference, weight], axis=1, dtype=np.float64)
    low, high = bootstrap_interval(sums, lambda drawn: drawn[:, 0] / drawn[:, 1])
    return PairedMean(
        n=len(difference),
        difference=float(sums[:, 0].sum() / sums[:, 1].sum()),
        difference_low=low,
        difference_high=high,
    )


def bootstrap_interval(
    items: Floats,
    statistic: Callable[[Floats], Floats],
    n_resamples: int = N_RESAMPLES,
) -> tuple[float, float] | tuple[None, None]:
    """95 % percentile interval of a statistic of sums over items, seeded.

    Args:
        items: (n, k), what each item adds to k sums.
        statistic: (m, k) sums of m resamples -> (m,) values.
        n_resamples: how many.

    Returns:
        None twice for fewer than two items: one says nothing about chance.
    """
    n = len(items)
    if n < 2:
        return None, None
    rng = np.random.default_rng(SEED)
    values = []
    for start in range(0, n_resamples, block := max(_MAX_DRAWS // items.size, 1)):
        size = (min(block, n_resamples - start), n)
        values.append(statistic(items[rng.integers(n, size=size)].sum(axis=1)))
    low, high = np.quantile(np.concatenate(values), (0.025, 0.975))
    return float(low), float(high)


def spearman(first: ArrayLike, second: ArrayLike) -> RankCorrelation:
    """Correlation of ranks, equal values sharing their mean rank.

    Source: Bonett and Wright, Psychometrika 65 (2000), for the interval.
    """
    from scipy.stats import spearmanr

    values = [np.asarray(v, np.float64) for v in (first, second)]
    n = len(values[0])
    if n < 2 or not all(map(np.ptp, values)):
        return RankCorrelation(n=n, rho=None, low=None, high=None, p=None)
    test = spearmanr(*values)
    # A perfect order may come out a rounding error away from 1.
    rho = round(float(test.statistic), 14)
    low = high = None
    if n > 3:
        half = Z95 * sqrt((1 + rho**2 / 2) / (n - 3))
        # atanh of a perfect correlation is infinite: its interval has no width.
        low, high = (
            tanh(atanh(rho) + shift) if abs(rho) < 1 else rho for shift in (-half, half)
        )
    p = None if n < 3 else 0.0 if abs(rho) == 1 else float(test.pvalue)
    return RankCorrelation(n=n, rho=rho, low=low, high=high, p=p)


def accuracy_sentence(first: str, second: str, test: PairedAccuracy) -> str:
    """A sentence that McNemar's test allows.

    Args:
        first: its name.
        second: its name.
        test: result for both.
    """
    counts = (
        f"of {test.n} questions {first} alone answers {test.n_only_first} right and "
        f"{second} alone {test.n_only_second} (difference "
        f"{_points(test.difference)}, 95 % {_points(test.difference_low)} to "
        f"{_points(test.difference_high)} points, p = {test.p:.2g})"
    )
    if test.p >= ALPHA:
        return f"{first} and {second} cannot be told apart by accuracy: {counts}."
    better, worse = (first, second) if test.difference > 0 else (second, first)
    return f"{better} is more accurate than {worse}: {counts}."


def mean_sentence(name: str, first: str, second: str, test: PairedMean) -> str:
    """A sentence about a measure that the bootstrap allows.

    Args:
        name: the measure, such as `KLD`.
        first: a model's name.
        second: another's.
        test: result for both.
    """
    if test.difference_low is None or test.difference_high is None:
        return f"{first} and {second} cannot be compared by {name}: one piece of text."
    numbers = (
        f"difference {test.difference:+.4g}, 95 % {test.difference_low:+.4g} to "
        f"{test.difference_high:+.4g}, {test.n} pieces"
    )
    if test.difference_low <= 0 <= test.difference_high:
        return f"{first} and {second} cannot be told apart by {name} ({numbers})."
    side = "higher" if test.difference > 0 else "lower"
    return f"{first} has a {side} {name} than {second} ({numbers})."


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def kld_difference(first: TextResult, second: TextResult) -> PairedMean:
    """The first's mean divergence minus the second's, over the same windows."""
    pairs = list(zip(first.chunks, second.chunks, strict=True))
    sums = [(a.kld_nats or 0.0, b.kld_nats or 0.0, a.n_tokens) for a, b in pairs]
    return paired_bootstrap(
        [a / n for a, _, n in sums],
        [b / n for _, b, n in sums],
        [n for _, _, n in sums],
    )

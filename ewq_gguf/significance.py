"""What chance alone explains: the arithmetic that plans and benchmarks share.

Plain floats in, plain floats out; no library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import atan, cos, log, pi, sin, sqrt
from statistics import fmean, pvariance, stdev

#: Half of a 95 % interval, in standard errors of a normal distribution.
Z95 = 1.959963984540054


@dataclass(frozen=True)
class PairedT:
    """Student's test of paired values.

    Attributes:
        n: pairs.
        mean: of first minus second.
        t: with n - 1 degrees of freedom.
        p: two-sided.
        cohens_d: mean over the pooled population standard deviation of both.
    """

    n: int
    mean: float
    t: float
    p: float
    cohens_d: float


def wilson(n_right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927).

    It takes items as independent. Where they are not, such as neighbouring layers or
    questions about one text, the truth is wider.

    Args:
        n_right: of them.
        n: at least 1.
    """
    share, z2 = n_right / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return centre - half, centre + half


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


def paired_t(first: Sequence[float], second: Sequence[float]) -> PairedT | None:
    """Student's paired test and Cohen's d, as the paper's table 13 has them.

    Args:
        first: one value per pair, such as composite scores of models.
        second: as many.

    Returns:
        None where there is nothing to test: fewer than two pairs, or differences that
        are all equal.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    n = len(differences)
    # Equal differences of floats may differ in their last digits.
    noise = 1e-14 * max((abs(value) for value in (*first, *second)), default=0.0)
    if n < 2 or stdev(differences) <= noise:
        return None
    mean = fmean(differences)
    t = mean / (stdev(differences) / sqrt(n))
    return PairedT(
        n=n,
        mean=mean,
        t=t,
        p=t_test_p(t, n - 1),
        cohens_d=mean / sqrt((pvariance(first) + pvariance(second)) / 2),
    )


def t_test_p(t: float, n_free: int) -> float:
    """Two-sided p of Student's t with `n_free` >= 1 degrees of freedom.

    Source: Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even).
    """
    angle = atan(abs(t) / sqrt(n_free))
    is_odd = n_free % 2
    term = total = (cos(angle) if n_free > 1 else 0.0) if is_odd else 1.0
    for k in range(2 if is_odd else 1, n_free - 2, 2):
        term *= cos(angle) ** 2 * k / (k + 1)
        total += term
    inside = 2 / pi * (angle + sin(angle) * total) if is_odd else sin(angle) * total
    # Rounding may put a tiny p below zero.
    return max(1 - inside, 0.0)

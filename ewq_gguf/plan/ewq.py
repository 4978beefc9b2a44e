"""The paper's decision: which layer gets which precision of the ladder.

    H <  T         -> lowest of the ladder       T = mu - X sigma
    T <= H < mu    -> middle
    H >= mu        -> highest

Source: arXiv:2503.04704 section 3.3. A ladder of two decides at mu alone, the paper's
"8bit mixed".
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, sqrt

from ewq_gguf.records.plan import Thresholds


def thresholds(entropies: Sequence[float], factor: float) -> Thresholds:
    """Mean, population standard deviation and mu - factor sigma.

    Args:
        entropies: at least one, of the layers, unweighted.
        factor: X.
    """
    # Equal entropies must be at their mean, not a rounding error below it.
    mean = min(max(fsum(entropies) / len(entropies), min(entropies)), max(entropies))
    variance = fsum((entropy - mean) ** 2 for entropy in entropies) / len(entropies)
    std = sqrt(variance)
    return Thresholds(mean=mean, std=std, low=mean - factor * std)


def decide(entropy: float, limits: Thresholds, ladder: Sequence[str]) -> str:
    """The precision of a layer; `ladder` has two or three, low to high."""
    if entropy >= limits.mean:
        return ladder[-1]
    if len(ladder) == 3 and entropy < limits.low:
        return ladder[0]
    return ladder[-2]

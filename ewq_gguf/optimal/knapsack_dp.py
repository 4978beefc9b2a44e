"""Dynamic programming for a knapsack whose bound leaves few options: all are tried."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Selections of the first items that are kept side by side, at most.
_MAX_STATES = 400


def try_all(
    allowed: NDArray[np.bool_],
    excess: NDArray[np.float64],
    usages: Sequence[NDArray[np.float64]],
    limits: Sequence[float],
    prices: NDArray[np.float64],
    gap: float,
) -> list[NDArray[np.int64]] | None:
    """Find the best selection, if one is better than the bound and a gap.

    Selections of the first items stay where no other one undercuts them in use and
    cost: they are few where many items have one size, as in layers.

    Args:
        allowed: (n, k) options that a better selection may have, one at least.
        excess: (n, k) what an option adds to the bound.
        usages: (n, k) for each limited quantity.
        limits: The most that all items together may use of each quantity.
        prices: (m,) what each unit that is not used adds to the bound.
        gap: The most that a better selection may add to the bound.

    Returns:
        (n,) options of the best selection, none where no selection is better; None
        where there are too many to try.
    """
    usage, limit = np.array(usages), np.array(limits)[:, None]
    least = np.where(allowed, usage, np.inf).min(axis=2)
    most = np.where(allowed, usage, -np.inf).max(axis=2)
    order = np.argsort(least[0] - most[0], kind="stable")  # the largest span first
    used, added = np.zeros((len(usage), 1)), np.zeros(1)
    steps = []
    for place, item in enumerate(order):
        choices, rest = np.flatnonzero(allowed[item]), order[place + 1 :]
        more = usage[:, item][:, None, choices]
        used = (used[:, :, None] + more).reshape(len(usage), -1)
        added = (added[:, None] + excess[item, choices]).ravel()
        unused = limit - used - most[:, rest].sum(axis=1, keepdims=True)
        fits = used + least[:, rest].sum(axis=1, keepdims=True) <= limit
        is_better = added + prices @ np.maximum(unused, 0.0) < gap
        kept = np.flatnonzero(is_better & fits.all(axis=0))
        if len(kept) > _MAX_STATES:
            return None
        values = np.vstack([used[:, kept], (added - prices @ used)[kept]])
        by_use = np.lexsort(values[::-1])
        kept, values = kept[by_use], values[:, by_use]
        undercuts = (values[:, :, None] <= values[:, None, :]).all(axis=0)
        kept = kept[~np.triu(undercuts, 1).any(axis=0)]
        used, added = used[:, kept], added[kept]
        steps.append((item, choices, kept))
    if not len(added):
        return []
    state = int((added - prices @ used).argmin())
    options = np.empty(len(order), np.int64)
    for item, choices, kept in reversed(steps):
        state, choice = divmod(int(kept[state]), len(choices))
        options[item] = choices[choice]
    return [options]

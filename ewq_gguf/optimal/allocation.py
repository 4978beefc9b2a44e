"""One option for each item, so that the costs are least and the bytes within a limit.

The multiple-choice knapsack. A price per byte (a Lagrange multiplier) gives the best
selection of its own size and a bound that no selection can beat; single moves and
exchanges of two then use the bytes it leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: Halvings of the price: a double has no more digits.
_N_HALVINGS = 64
#: Exchanges at most; each lowers the cost, the last ones hardly.
_MAX_EXCHANGES = 400
#: Pairs of moves whose bound promises most; the first is nearly always the best.
_MAX_TRIED = 16


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Attributes:
        options: (n,), of each item.
        cost: of all.
        n_bytes: of all.
        bound: a cost that no selection within the limit goes below.
    """

    options: Integers
    cost: float
    n_bytes: int
    bound: float


def select(costs: Floats, n_bytes: Integers, limit: int) -> Selection | None:
    """Choose an option for each item.

    Args:
        costs: (n, k), 0 or more; infinite where an item lacks the option.
        n_bytes: (n, k).
        limit: of the bytes together.

    Returns:
        None where even the smallest options exceed the limit.
    """
    n_bytes = n_bytes.astype(np.int64)
    smallest = np.where(np.isfinite(costs), n_bytes, np.iinfo(np.int64).max)
    if smallest.min(axis=1).sum() > limit:
        return None
    options, bound = _by_price(costs, n_bytes, limit)
    options = _exchanged(costs, n_bytes, limit, options)
    rows = np.arange(len(costs))
    cost = float(costs[rows, options].sum())
    return Selection(options, cost, int(n_bytes[rows, options].sum()), min(bound, cost))


def _by_price(costs: Floats, n_bytes: Integers, limit: int) -> tuple[Integers, float]:
    """The selection of the lowest price that keeps the limit, and its bound."""
    rows = np.arange(len(costs))
    finite = costs[np.isfinite(costs)]
    # From here on a byte saved is worth more than any error.
    low, high = 0.0, float(finite.max() - finite.min()) + 1.0
    best, bound = _at(costs, n_bytes, high, limit)
    while n_bytes[rows, best].sum() > limit:
        high *= 16
        best, bound = _at(costs, n_bytes, high, limit)
    for _ in range(_N_HALVINGS):
        price = (low + high) / 2
        options, found = _at(costs, n_bytes, price, limit)
        bound = max(bound, found)
        if n_bytes[rows, options].sum() > limit:
            low = price
        else:
            high, best = price, options
    return best, bound


def _at(
    costs: Floats, n_bytes: Integers, price: float, limit: int
) -> tuple[Integers, float]:
    """The best options where each byte costs so much; and the bound this proves."""
    priced = costs + price * n_bytes
    options = priced.argmin(axis=1)
    return options, float(priced.min(axis=1).sum() - price * limit)


def _exchanged(
    costs: Floats, n_bytes: Integers, limit: int, options: Integers
) -> Integers:
    """Better by single moves and by pairs of them, until none is left."""
    n_items, n_options = costs.shape
    rows = np.arange(n_items)
    options = options.copy()
    item = np.repeat(rows, n_options)
    for _ in range(_MAX_EXCHANGES):
        room = limit - int(n_bytes[rows, options].sum())
        gain = (costs - costs[rows, options][:, None]).ravel()
        need = (n_bytes - n_bytes[rows, options][:, None]).ravel()
        move = _best_pair(gain, need, item, room)
        if move is None:
            break
        for index in move:
            options[item[index]] = index % n_options
    return options


def _best_pair(
    gain: Floats, need: Integers, item: Integers, room: int
) -> tuple[int, ...] | None:
    """The move, or the two moves of different items, that lower the cost most.

    Args:
        gain: (m,) change of the cost.
        need: (m,) change of the bytes.
        item: (m,) that moves.
        room: bytes that are left.
    """
    best = 0.0
    found: tuple[int, ...] | None = None
    fits = need <= room
    if fits.any():
        single = int(np.where(fits, gain, np.inf).argmin())
        if gain[single] < best:
            best, found = float(gain[single]), (single,)
    # For each move that lowers the cost: the cheapest one that frees what it lacks.
    ups = np.flatnonzero(gain < 0)
    order = np.argsort(need, kind="stable")
    cheapest = np.minimum.accumulate(gain[order])
    where = np.searchsorted(need[order], room - need[ups], side="right") - 1
    able = where >= 0
    ups, where = ups[able], where[able]
    if not len(ups):
        return found
    totals = gain[ups] + cheapest[where]
    for i in np.argsort(totals)[:_MAX_TRIED]:
        if totals[i] >= best:
            break
        partners = order[: where[i] + 1]
        others = partners[item[partners] != item[ups[i]]]
        if not len(others):
            continue
        partner = int(others[gain[others].argmin()])
        total = float(gain[ups[i]] + gain[partner])
        if total < best:
            best, found = total, (int(ups[i]), partner)
    return found

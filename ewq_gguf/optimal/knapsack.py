"""The multiple-choice knapsack: one option for each item, least cost within limits.

Lagrange multipliers price what is limited and prove a cost that no selection goes
below; moves of one item or of two then fill what is left of the limits, and dynamic
programming over what the bound leaves finds the best. Where one large item decides,
branch and bound tries its smaller and its larger options apart, until the selection is
proven to cost at most a tolerance more than the optimum.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.optimal.knapsack_dp import try_all

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]
#: Options of each item, and their share in a mixture.
Parts = list[tuple[float, Integers]]

#: A selection may cost this share more than the optimum.
TOLERANCE = 1e-3
#: Subproblems that are split at most: the bound is what was proven by then.
_MAX_NODES = 100
#: Multipliers are exact enough where better ones raise the bound by a smaller share.
_BOUND_TOLERANCE = 1e-5
_MAX_PRICES = 100
#: Moves whose pairs are tried: those that cost least at the prices.
_MAX_MOVES = 150
#: Moves, or pairs of them, that improve one selection.
_MAX_STEPS = 30


@dataclass(frozen=True)
class Selection:
    """An option for each item.

    Attributes:
        options: (n,) option of each item.
        cost: Sum of the options' costs.
        lower_bound: Proven: no selection within the limits costs less.
    """

    options: Integers
    cost: float
    lower_bound: float


def solve_knapsack(
    costs: Floats,
    usages: Sequence[NDArray[np.generic]],
    limits: Sequence[float],
    *,
    tolerance: float = TOLERANCE,
) -> Selection | None:
    """Choose an option for each item, at a cost within the tolerance of the optimum.

    Args:
        costs: (n, k), 0 or more; infinite where an item lacks the option.
        usages: (n, k), 0 or more, for each limited quantity: bytes, seconds.
        limits: The most that all items together may use of each quantity.
        tolerance: Share of the optimum.

    Returns:
        None where no options keep the limits.
    """
    order = np.argsort(usages[0], axis=1, kind="stable")
    search = _BranchAndBound(
        np.take_along_axis(costs, order, 1),
        [np.take_along_axis(usage.astype(np.float64), order, 1) for usage in usages],
        limits,
        tolerance,
    )
    search.run()
    if search.best is None:
        return None
    options = np.take_along_axis(order, search.best[:, None], 1)[:, 0]
    return Selection(options, search.best_cost, search.lower_bound)


class _BranchAndBound:
    """Subproblems, the one of the lowest bound first; options go from small to large.

    Attributes:
        best: Options of the cheapest selection so far.
        best_cost: Cost of it.
        lower_bound: Proven: no selection within the limits costs less.
    """

    def __init__(
        self,
        costs: Floats,
        usages: Sequence[Floats],
        limits: Sequence[float],
        tolerance: float,
    ) -> None:
        self._costs, self._usages, self._limits = costs, usages, limits
        self._tolerance = tolerance
        self._rows = np.arange(len(costs))
        highest = np.where(np.isfinite(costs), costs, 0.0).max(axis=1).sum()
        # The least excess that a double can tell is worse than any cost.
        self._penalties = [1e15 * (highest or 1.0) / (limit or 1.0) for limit in limits]
        self.best: Integers | None = None
        self.best_cost = np.inf
        self.lower_bound = -np.inf

    @property
    def _cutoff(self) -> float:
        """Subproblems of this bound and higher ones need no search."""
        return self.best_cost / (1 + self._tolerance)

    def run(self) -> None:
        """Search until the best selection is proven to be within the tolerance."""
        open_nodes: list[tuple[float, int, Mask, Parts]] = []
        subproblems = [np.isfinite(self._costs)]
        numbers = count()
        for _ in range(_MAX_NODES):
            for half in subproblems:
                if node := self._bound(half):
                    heapq.heappush(open_nodes, (node[0], next(numbers), *node[1:]))
            lowest = open_nodes[0][0] if open_nodes else np.inf
            self.lower_bound = max(self.lower_bound, min(lowest, self._cutoff))
            if lowest >= self._cutoff:
                break
            _, _, allowed, parts = heapq.heappop(open_nodes)
            subproblems = self._split(allowed, parts)

    def _bound(self, allowed: Mask) -> tuple[float, Mask, Parts] | None:
        """Bound a subproblem and look for a selection in it.

        Returns:
            The bound, the options that a better selection may have, and the
            mixture that has the bound; None where no selection can be better.
        """
        if not allowed.any(axis=1).all():
            return None
        relaxed = self._relax(np.where(allowed, self._costs, np.inf), len(self._limits))
        if relaxed is None:
            return None
        prices, parts = relaxed
        priced = np.where(allowed, self._costs, np.inf)
        for price, usage in zip(prices, self._usages, strict=True):
            priced += price * usage
        # What an option adds to the bound.
        excess = priced - priced.min(axis=1, keepdims=True)
        bound = float(priced.min(axis=1).sum() - np.dot(prices, self._limits))
        if self.lower_bound < 0:  # the first subproblem is the whole problem
            self.lower_bound = max(bound, 0.0)
        if bound >= self._cutoff:
            return None
        self._improve(excess, parts[0][1])
        allowed = allowed & (bound + excess < self._cutoff)
        if not allowed.any(axis=1).all():
            return None
        gap = self._cutoff - bound
        tried = try_all(
            allowed, excess, self._usages, self._limits, np.array(prices), gap
        )
        if tried is None:
            return bound, allowed, parts
        for options in tried:
            self._keep(options)
        return None

    def _relax(
        self, costs: Floats, n_limits: int
    ) -> tuple[tuple[float, ...], Parts] | None:
        """The cheapest mixture of options that keeps the first limits, and its prices.

        The price of the last one is found between a mixture that exceeds it and
        one that keeps it: where these two cost the same, until no other costs less.
        """
        if not n_limits:
            return (), [(1.0, costs.argmin(axis=1))]
        usage, limit = self._usages[n_limits - 1], self._limits[n_limits - 1]

        def totals(parts: Parts) -> tuple[float, float]:
            return (
                sum(share * costs[self._rows, part].sum() for share, part in parts),
                sum(share * usage[self._rows, part].sum() for share, part in parts),
            )

        cheap = self._relax(costs, n_limits - 1)
        if cheap is None:
            return None
        low, low_totals = cheap[1], totals(cheap[1])
        if low_totals[1] <= limit:
            return (*cheap[0], 0.0), low
        small = self._relax(np.where(np.isfinite(costs), usage, np.inf), n_limits - 1)
        assert small is not None  # as above
        high, high_totals = small[1], totals(small[1])
        if high_totals[1] > limit:
            return None
        for _ in range(_MAX_PRICES):
            price = max(high_totals[0] - low_totals[0], 0.0)
            price /= low_totals[1] - high_totals[1]
            priced = self._relax(costs + price * usage, n_limits - 1)
            assert priced is not None
            prices, parts = priced
            found = totals(parts)
            bound = found[0] + price * (found[1] - limit)
            gain = low_totals[0] + price * (low_totals[1] - limit) - bound
            if gain <= _BOUND_TOLERANCE * bound:
                break
            if found[1] > limit:
                low, low_totals = parts, found
            else:
                high, high_totals = parts, found
        share = (limit - high_totals[1]) / (low_totals[1] - high_totals[1])
        return (*prices, price), [
            *((part_share * (1 - share), part) for part_share, part in high),
            *((part_share * share, part) for part_share, part in low),
        ]

    def _split(self, allowed: Mask, parts: Parts) -> list[Mask]:
        """Two subproblems, neither of which has the mixture.

        The item whose mixed options differ most in cost has the smaller ones in one and
        the larger ones in the other.
        """
        mixed = np.stack([options for _, options in parts])
        costs = self._costs[self._rows, mixed]
        spread = np.where(np.ptp(mixed, axis=0) > 0, np.ptp(costs, axis=0), -1.0)
        item = int(spread.argmax())
        if spread[item] < 0:  # nothing is mixed: it was the best selection
            return []
        cut = (int(mixed[:, item].min()) + int(mixed[:, item].max()) + 1) // 2
        smaller, larger = allowed.copy(), allowed.copy()
        smaller[item, cut:] = larger[item, :cut] = False
        return [smaller, larger]

    def _improve(self, excess: Floats, options: Integers) -> None:
        """Improve a selection by moves and pairs of them; keep it if it is the best.

        Args:
            excess: (n, k) what an option adds to the bound.
            options: (n,) to begin with; they may exceed the limits.
        """
        rows, options = self._rows, options.copy()
        n_options = excess.shape[1]
        for _ in range(_MAX_STEPS):
            added = excess - excess[rows, options][:, None]
            added[rows, options] = np.inf
            n_moves = min(_MAX_MOVES, added.size)
            moves = np.argpartition(added, n_moves - 1, axis=None)[:n_moves]
            moves = moves[np.isfinite(added.ravel()[moves])]
            items, new = moves // n_options, moves % n_options
            # A move is alone in the column of the pair that changes nothing.
            change = self._costs[items, new] - self._costs[items, options[items]]
            gains = np.add.outer(change, np.append(change, 0.0))
            for usage, limit, penalty in zip(
                self._usages, self._limits, self._penalties, strict=True
            ):
                over = float(usage[rows, options].sum()) - limit
                more = usage[items, new] - usage[items, options[items]]
                both = np.add.outer(more, np.append(more, 0.0))
                gains += penalty * (np.maximum(over + both, 0) - max(over, 0))
            gains[:, :-1][items[:, None] == items] = np.inf
            if not gains.size or gains.min() >= 0:
                break
            pair = np.unravel_index(gains.argmin(), gains.shape)
            chosen = [int(i) for i in pair if i < len(moves)]
            options[items[chosen]] = new[chosen]
        self._keep(options)

    def _keep(self, options: Integers) -> None:
        """Keep a selection if it is within the limits and the best so far."""
        cost = float(self._costs[self._rows, options].sum())
        if cost < self.best_cost and all(
            usage[self._rows, options].sum() <= limit
            for usage, limit in zip(self._usages, self._limits, strict=True)
        ):
            self.best, self.best_cost = options, cost

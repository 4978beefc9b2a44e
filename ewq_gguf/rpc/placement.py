"""Layers on machines: contiguous runs, the fewest hops, then the least time per token.

The first machine is the main one: the program runs there, its CPU holds the input
embedding and the first run of layers, which may be empty. The others are llama.cpp RPC
workers, used in whatever order is best; the last one used also holds the output head.

Source: arXiv:2503.04704 section 3.4; bytes are counted finer, see rpc.layer_bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.errors import UsageError
from ewq_gguf.records.placement import Machine, Placement
from ewq_gguf.records.plan import PlanTensor
from ewq_gguf.rpc.layer_bytes import LayerBytes, Positions, first_starts

#: llama.cpp's own limit on RPC servers.
MOST_MACHINES = 16

#: A stage: its machine, its first part, and the part behind its last.
_Run = tuple[int, int, int]


def place(
    tensors: Sequence[PlanTensor], machines: Sequence[Machine], n_ctx: int
) -> Placement | None:
    """The best placement of a plan's tensors, or None where there is none.

    Fewest stages first. Among those the least time to read the weights once, if every
    machine's speed is known; else earlier machines are filled first.

    Args:
        tensors: the plan's tensors.
        machines: the main machine, then the workers.
        n_ctx: tokens of context that must fit beside the weights.

    Raises:
        UsageError: there is no machine, or there are more than llama.cpp takes.
        InputError: the model has no layers.
    """
    load = LayerBytes.of(tensors, n_ctx)
    speeds = [machine.bytes_per_second for machine in machines]
    is_timed = all(speeds)
    rates = np.array([1 / s if s and is_timed else 0.0 for s in speeds])
    path = _Search(load, machines, rates).best_path()
    if path is None:
        return None
    stages = tuple(load.stage(machines[k].name, p, q, k == 0) for k, p, q in path)
    seconds = sum(float(rates[k]) * load.weights_between(p, q) for k, p, q in path)
    return Placement(
        machines=tuple(machines),
        n_ctx=n_ctx,
        hops=len(stages) - 1,
        seconds_per_token=seconds if is_timed else None,
        stages=stages,
    )


def can_place(
    tensors: Sequence[PlanTensor], machines: Sequence[Machine], n_ctx: int
) -> bool:
    """Whether there is a placement at all; faster than `place`.

    Raises:
        UsageError, InputError: as of `place`.
    """
    search = _Search(LayerBytes.of(tensors, n_ctx), machines, np.zeros(len(machines)))
    return search.reach()[0] is not None


class _Search:
    """Dynamic programming over sets of workers and positions in the row of parts.

    Workers are equal if they are equally fast and can hold the same runs of parts. A
    set is how many it has of each group of equal workers, numbered in mixed radix.
    """

    def __init__(
        self, load: LayerBytes, machines: Sequence[Machine], rates: NDArray[np.float64]
    ) -> None:
        """Group the workers that are equal, and sort their sets by size.

        Args:
            load: bytes of the model's parts.
            machines: the main machine, then the workers.
            rates: seconds per byte of each machine.

        Raises:
            UsageError: there is no machine, or there are more than llama.cpp takes.
        """
        if not 1 <= len(machines) <= MOST_MACHINES:
            raise UsageError(
                "plan",
                "--machine",
                f"is given {len(machines)} times",
                f"name 1 to {MOST_MACHINES} machines",
            )
        main, *starts = (
            first_starts(load, m, is_main=i == 0) for i, m in enumerate(machines)
        )
        equal: dict[tuple[float, bytes], list[int]] = defaultdict(list)
        for k, starts_of_worker in enumerate(starts, start=1):
            equal[rates[k], starts_of_worker.tobytes()].append(k)
        self._groups = list(equal.values())
        self._starts = [starts[members[0] - 1] for members in self._groups]
        self._costs = [rates[members[0]] * load.weights for members in self._groups]
        self._main_stops = main == 0  # it holds the first parts, or none
        self._main_costs = rates[0] * load.weights
        self._last = len(load.weights) - 1
        sizes = [len(members) + 1 for members in self._groups]
        self._strides = [prod(sizes[i + 1 :]) for i in range(len(sizes))]
        self._counts = np.indices(sizes).reshape(len(sizes), prod(sizes))
        n_workers = self._counts.sum(axis=0)
        self._sets = [np.flatnonzero(n_workers == n) for n in range(len(machines))]

    def _having(self, sets: Positions) -> Iterator[tuple[int, Positions, Positions]]:
        """(group, sets that have a worker of it, the same sets without that worker)."""
        for group, stride in enumerate(self._strides):
            having = sets[self._counts[group, sets] > 0]
            yield group, having, having - stride

    def reach(self) -> tuple[int | None, Positions]:
        """(how many workers it takes, or None if all are too few; how far sets reach).

        The number of parts, of all but the last, that the main machine and a set can
        hold: a stage that starts later may end later.
        """
        last, main = self._last, self._main_stops
        reach = np.full(self._counts.shape[1], np.sum(main[:last]) - 1)
        if main[last] or not main[0]:
            return (0 if main[last] else None), reach
        parts = np.arange(last)
        ends = [np.searchsorted(s[:last], parts, "right") - 1 for s in self._starts]
        for n, sets in enumerate(self._sets[1:], start=1):
            for group, having, less in self._having(sets):
                if (self._starts[group][last] <= reach[less]).any():
                    return n, reach
                reach[having] = np.maximum(reach[having], ends[group][reach[less]])
        return None, reach

    def _needs(self, n_workers: int) -> Positions:
        """The least that sets must reach for so many workers to hold everything."""
        needs = np.full(self._counts.shape[1], self._last)
        for n in range(n_workers, 0, -1):
            for group, having, less in self._having(self._sets[n]):
                first = self._starts[group][needs[having]]
                needs[less] = np.minimum(needs[less], first)
        return needs

    def best_path(self) -> list[_Run] | None:
        """(machine, start, stop) of every stage, or None.

        times[q, set] is the least time in which the main machine and these workers
        compute the first q parts, infinite if they cannot hold them. A stage of a
        worker from p to q adds (W[q] - W[p]) r.
        """
        fewest, reach = self.reach()
        if fewest is None:
            return None
        reach[self._sets[fewest]] = self._last
        needs = self._needs(fewest)
        times = np.full((self._last + 1, len(reach)), np.inf)
        times[:, 0] = np.where(self._main_stops, self._main_costs, np.inf)
        for sets in self._sets[1 : fewest + 1]:
            sets = sets[needs[sets] <= reach[sets]]
            first, stop = needs[sets].min(), reach[sets].max() + 1
            for group, having, less in self._having(sets):
                costs, starts = self._costs[group], self._starts[group]
                low = min(starts[first], first)
                before = times[low:stop, less] - costs[low:stop, None]
                for q in range(first, stop):
                    if starts[q] < q:
                        took = before[starts[q] - low : q - low].min(axis=0)
                        times[q, having] = np.minimum(times[q, having], took + costs[q])
        sets = self._sets[fewest][::-1]  # of equals, those of earlier machines
        return self._stages(times, sets[np.argmin(times[self._last, sets])])

    def _stages(self, times: NDArray[np.float64], workers: int) -> list[_Run]:
        """The way back from the last part; of equals, fuller stages come first."""
        stages = []
        q = self._last
        while workers:
            _, p, k, workers = min(
                (
                    times[p, workers - stride] - costs[p] + costs[q],
                    -p,
                    -members[count - 1],
                    workers - stride,
                )
                for members, starts, costs, stride, count in zip(
                    self._groups,
                    self._starts,
                    self._costs,
                    self._strides,
                    self._counts[:, workers],
                    strict=True,
                )
                if count
                for p in range(starts[q], q)
            )
            stages.append((-k, -p, q))
            q = -p
        return [(0, 0, q), *reversed(stages)]

"""Layers on machines: contiguous runs, the fewest hops, then the least time per token.

The first machine is the main one: the program runs there, its CPU holds the input
embedding and the first run of layers, which may be empty. The others are llama.cpp RPC
workers, used in whatever order is best; the last one used also holds the output head.

Source: arXiv:2503.04704 section 3.4, where a machine holds R = min(memory, disk) bytes
of weights. Finer here: the KV cache and the compute buffer count against the memory and
not against the disk, and tied embeddings count twice where llama.cpp stores them twice
(src/llama-model.cpp, TENSOR_DUPLICATED).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.records.placement import Machine, Placement, Stage
from ewq_gguf.records.plan import PlanTensor
from ewq_gguf.rpc.memory import compute_bytes, kv_bytes

#: llama.cpp's own limit on RPC servers.
MOST_MACHINES = 16

# Where llama.cpp puts the tensors outside the layers (src/llama-arch.cpp,
# LLM_TENSOR_INFOS): with the input, with the first layer, on every device; all others
# with the output.
_INPUT = ("token_embd", "position_embd", "token_types", "per_layer_token_embd")
_FIRST_LAYER = ("token_embd_norm", "per_layer_model_proj", "per_layer_proj_norm")
_EVERYWHERE = ("rope_freqs", "rope_factors_long", "rope_factors_short")

_Positions = NDArray[np.intp]
#: Machine, first unit, and the one behind the last.
_Run = tuple[int, int, int]


def place(
    tensors: Sequence[PlanTensor], machines: Sequence[Machine], n_ctx: int
) -> Placement | None:
    """The best placement of a plan's tensors, or None where there is none.

    Fewest stages first. Among those the least time to read the weights once, if every
    machine's speed is known; else earlier machines are filled first.

    Args:
        tensors: of the plan.
        machines: the first is the main one.
        n_ctx: tokens of context to leave room for.

    Raises:
        UsageError: there is no machine, or there are more than llama.cpp takes.
        InputError: the model has no layers.
    """
    load = _Load.of(tensors, n_ctx)
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
    """Whether there is a placement at all: `place` without its search for the best.

    Raises:
        UsageError, InputError: as of `place`.
    """
    search = _Search(_Load.of(tensors, n_ctx), machines, np.zeros(len(machines)))
    return search.reach()[0] is not None


@dataclass(frozen=True)
class _Load:
    """A model as a row of units: its layers, then its output head.

    Attributes:
        weights: bytes of the units before each position, (n_layers + 2,); a tied
            embedding counts as output.
        kv: bytes of their KV cache, the same way.
        input_bytes: of what only the main machine holds.
        tied_bytes: of the embedding, if it is the output too: on one machine it is
            stored once.
        copied_bytes: of what every machine has a copy of.
        body_compute: bytes of a compute buffer without logits.
        head_compute: and with them.
    """

    weights: NDArray[np.int64]
    kv: NDArray[np.int64]
    input_bytes: int
    tied_bytes: int
    copied_bytes: int
    body_compute: int
    head_compute: int

    @classmethod
    def of(cls, tensors: Sequence[PlanTensor], n_ctx: int) -> _Load:
        """Sort every tensor's bytes to where llama.cpp puts it.

        Raises:
            InputError: there are no layers.
        """
        caches = kv_bytes(tensors, n_ctx)
        if not caches:
            raise InputError(
                "plan", None, "the model has no layers", "llama.cpp cannot split it"
            )
        n_layers = max(caches) + 1
        units = np.zeros(n_layers + 1, np.int64)
        input_bytes = copied_bytes = 0
        for tensor in tensors:
            place_of = tensor.name.split(".")[0]
            if tensor.layer_idx is not None:
                units[tensor.layer_idx] += tensor.size_bytes
            elif place_of in _INPUT:
                input_bytes += tensor.size_bytes
            elif place_of in _FIRST_LAYER:
                units[0] += tensor.size_bytes
            elif place_of in _EVERYWHERE:
                copied_bytes += tensor.size_bytes
            else:
                units[-1] += tensor.size_bytes
        sizes = {tensor.name: tensor.size_bytes for tensor in tensors}
        tied = 0 if "output.weight" in sizes else sizes.get("token_embd.weight", 0)
        units[-1] += tied
        kv = [caches.get(layer, 0) for layer in range(n_layers)]
        return cls(
            weights=np.concatenate([[0], np.cumsum(units)]),
            kv=np.concatenate([[0], np.cumsum([*kv, 0])]),
            input_bytes=input_bytes,
            tied_bytes=tied,
            copied_bytes=copied_bytes,
            body_compute=compute_bytes(tensors, n_ctx, has_output=False),
            head_compute=compute_bytes(tensors, n_ctx),
        )

    def weights_between(self, start: int, stop: int) -> int:
        """Bytes of the weights of the units from `start` up to `stop`."""
        return int(self.weights[stop] - self.weights[start])

    def extra_bytes(self, stop: int, *, is_main: bool) -> int:
        """Bytes of weights that a stage holds beside its units."""
        if not is_main:
            return self.copied_bytes
        is_whole = stop == len(self.weights) - 1
        return (
            self.copied_bytes + self.input_bytes - (self.tied_bytes if is_whole else 0)
        )

    def compute(self, stop: int) -> int:
        """Bytes of the compute buffer of a stage that ends at `stop`."""
        is_last = stop == len(self.weights) - 1
        return self.head_compute if is_last else self.body_compute

    def stage(self, machine: str, start: int, stop: int, is_main: bool) -> Stage:
        """The stage of the units from `start` up to `stop`."""
        n_layers = len(self.weights) - 2
        end = min(stop, n_layers)
        extra = self.extra_bytes(stop, is_main=is_main)
        return Stage(
            machine=machine,
            first_layer=start if start < end else None,
            last_layer=end - 1 if start < end else None,
            weight_bytes=self.weights_between(start, stop) + extra,
            kv_bytes=int(self.kv[stop] - self.kv[start]),
            compute_bytes=self.compute(stop),
            has_output=stop > n_layers,
        )


def _lows(load: _Load, machine: Machine, *, is_main: bool) -> _Positions:
    """For every stop the first unit at which a stage of this machine may start.

    A stage that cannot be is given a start behind its stop.
    """
    n_positions = len(load.weights)
    stops = (0, n_positions - 1)  # of a body, and with the head
    extras = [load.extra_bytes(stop, is_main=is_main) for stop in stops]
    rooms = [
        machine.memory_bytes - extra - load.compute(stop)
        for stop, extra in zip(stops, extras, strict=True)
    ]
    lows = _first_units(load.weights + load.kv, *rooms)
    if machine.disk_bytes is not None:
        rooms = [machine.disk_bytes - extra for extra in extras]
        lows = np.maximum(lows, _first_units(load.weights, *rooms))
    return lows


def _first_units(sums: NDArray[np.int64], body_room: int, last_room: int) -> _Positions:
    """The first units from which all up to each stop have room."""
    most = int(sums[-1])  # a user's room may be beyond 64 bits
    rooms = np.full(len(sums), min(body_room, most))
    rooms[-1] = min(last_room, most)
    firsts: _Positions = np.searchsorted(sums, np.maximum(sums - rooms, 0))
    return firsts


class _Search:
    """Dynamic programming over sets of workers and positions in the row of units.

    Workers are of one kind if they are equally fast and have room for the same runs.
    A set is how many it has of each kind, numbered in mixed radix.
    """

    def __init__(
        self, load: _Load, machines: Sequence[Machine], rates: NDArray[np.float64]
    ) -> None:
        """Sort the workers into kinds, and their sets by size.

        Args:
            load: the model.
            machines: the first is the main one.
            rates: seconds per byte of each.

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
        main, *lows = (_lows(load, m, is_main=i == 0) for i, m in enumerate(machines))
        kinds: dict[tuple[float, bytes], list[int]] = defaultdict(list)
        for k, low in enumerate(lows, start=1):
            kinds[rates[k], low.tobytes()].append(k)
        self._kinds = list(kinds.values())
        self._lows = [lows[members[0] - 1] for members in self._kinds]
        self._costs = [rates[members[0]] * load.weights for members in self._kinds]
        self._main_stops = main == 0  # it holds the first units, or none
        self._main_costs = rates[0] * load.weights
        self._last = len(load.weights) - 1
        sizes = [len(members) + 1 for members in self._kinds]
        self._strides = [prod(sizes[i + 1 :]) for i in range(len(sizes))]
        self._counts = np.indices(sizes).reshape(len(sizes), prod(sizes))
        n_workers = self._counts.sum(axis=0)
        self._sets = [np.flatnonzero(n_workers == n) for n in range(len(machines))]

    def _having(self, sets: _Positions) -> Iterator[tuple[int, _Positions, _Positions]]:
        """(kind, those sets that have it, the same with one of it less)."""
        for kind, stride in enumerate(self._strides):
            having = sets[self._counts[kind, sets] > 0]
            yield kind, having, having - stride

    def reach(self) -> tuple[int | None, _Positions]:
        """(how many workers it takes, or None if all are too few; how far sets reach).

        That is how many units, of all but the last, the main machine and a set can
        hold: a stage that starts later may end later.
        """
        last, main = self._last, self._main_stops
        reach = np.full(self._counts.shape[1], np.sum(main[:last]) - 1)
        if main[last] or not main[0]:
            return (0 if main[last] else None), reach
        units = np.arange(last)
        ends = [np.searchsorted(low[:last], units, "right") - 1 for low in self._lows]
        for n, sets in enumerate(self._sets[1:], start=1):
            for kind, having, less in self._having(sets):
                if (self._lows[kind][last] <= reach[less]).any():
                    return n, reach
                reach[having] = np.maximum(reach[having], ends[kind][reach[less]])
        return None, reach

    def _needs(self, n_workers: int) -> _Positions:
        """The least that sets must reach for so many workers to hold everything."""
        needs = np.full(self._counts.shape[1], self._last)
        for n in range(n_workers, 0, -1):
            for kind, having, less in self._having(self._sets[n]):
                starts = self._lows[kind][needs[having]]
                needs[less] = np.minimum(needs[less], starts)
        return needs

    def best_path(self) -> list[_Run] | None:
        """(machine, start, stop) of every stage, or None.

        times[q, set] is the least time in which the main machine and these workers
        compute the first q units, infinite if they cannot hold them. A stage of a
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
            for kind, having, less in self._having(sets):
                costs, lows = self._costs[kind], self._lows[kind]
                start = min(lows[first], first)
                before = times[start:stop, less] - costs[start:stop, None]
                for q in range(first, stop):
                    if lows[q] < q:
                        took = before[lows[q] - start : q - start].min(axis=0)
                        times[q, having] = np.minimum(times[q, having], took + costs[q])
        sets = self._sets[fewest][::-1]  # of equals, those of earlier machines
        return self._stages(times, sets[np.argmin(times[self._last, sets])])

    def _stages(self, times: NDArray[np.float64], workers: int) -> list[_Run]:
        """The way back from the last unit; of equals, fuller stages come first."""
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
                for members, lows, costs, stride, count in zip(
                    self._kinds,
                    self._lows,
                    self._costs,
                    self._strides,
                    self._counts[:, workers],
                    strict=True,
                )
                if count
                for p in range(lows[q], q)
            )
            stages.append((-k, -p, q))
            q = -p
        return [(0, 0, q), *reversed(stages)]

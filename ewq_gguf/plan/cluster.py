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

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.plan.memory import compute_bytes, kv_bytes
from ewq_gguf.records.placement import Machine, Placement, Stage
from ewq_gguf.records.plan import PlanTensor

#: llama.cpp's own limit on RPC servers.
MOST_MACHINES = 16

# Where llama.cpp puts the tensors outside the layers (src/llama-arch.cpp,
# LLM_TENSOR_INFOS): with the input, with the first layer, on every device; all others
# with the output.
_INPUT = ("token_embd", "position_embd", "token_types", "per_layer_token_embd")
_FIRST_LAYER = ("token_embd_norm", "per_layer_model_proj", "per_layer_proj_norm")
_EVERYWHERE = ("rope_freqs", "rope_factors_long", "rope_factors_short")

_Times = NDArray[np.float64]
_Workers = tuple[int, ...]


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
    if not 1 <= len(machines) <= MOST_MACHINES:
        raise UsageError(
            "plan",
            "--machine",
            f"is given {len(machines)} times",
            f"name 1 to {MOST_MACHINES} machines",
        )
    load = _Load.of(tensors, n_ctx)
    speeds = [machine.bytes_per_second for machine in machines]
    is_timed = all(speeds)
    rates = np.array([1 / s if s and is_timed else 0.0 for s in speeds])
    lows = [_lows(load, machine, is_main=i == 0) for i, machine in enumerate(machines)]
    path = _Search(load.weights, rates, lows).best_path()
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
        tied = 0 if "output.weight" in sizes else sizes["token_embd.weight"]
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


def _lows(load: _Load, machine: Machine, *, is_main: bool) -> list[int]:
    """For every stop the first unit at which a stage of this machine may start.

    A stage that cannot be is given a start behind its stop.
    """
    used = load.weights + load.kv
    disk_bytes = machine.disk_bytes
    lows = []
    for stop in range(len(used)):
        extra = load.extra_bytes(stop, is_main=is_main)
        beside = extra + load.compute(stop)
        low = _low(used, stop, machine.memory_bytes - beside)
        if disk_bytes is not None:
            low = max(low, _low(load.weights, stop, disk_bytes - extra))
        lows.append(low)
    return lows


def _low(sums: NDArray[np.int64], stop: int, room: int) -> int:
    """The first unit from which all up to `stop` have room."""
    over = max(int(sums[stop]) - room, 0)  # a user's room may be beyond 64 bits
    return int(np.searchsorted(sums, over))


class _Search:
    """Dynamic programming over sets of workers and positions in the row of units.

    times[n][workers][q] is the least time in which the main machine and these n workers
    together compute the first q units, infinite if they cannot hold them. A stage of
    worker k from p to q adds (W[q] - W[p]) r_k.
    """

    def __init__(
        self, weights: NDArray[np.int64], rates: _Times, lows: Sequence[Sequence[int]]
    ) -> None:
        """Keep the costs: W, r, and each machine's first start by stop."""
        self._costs = np.outer(rates, weights)
        self._lows = lows
        self._workers = range(1, len(rates))
        # The main machine holds the first units, or none.
        starts_at_0 = np.array([low == 0 for low in lows[0]])
        alone = np.where(starts_at_0, self._costs[0], np.inf)
        self._times: list[dict[_Workers, _Times]] = [{(): alone}]

    def best_path(self) -> list[tuple[int, int, int]] | None:
        """(machine, start, stop) of every stage, or None."""
        for _ in self._workers:
            if self._is_found():
                break
            self._times.append(self._with_one_more())
        if not self._is_found():
            return None
        last = self._times[-1]
        workers = min(last, key=lambda some: last[some][-1])
        return self._stages(workers)

    def _is_found(self) -> bool:
        return any(np.isfinite(times[-1]) for times in self._times[-1].values())

    def _with_one_more(self) -> dict[_Workers, _Times]:
        """Times of all sets that have one worker more."""
        known = self._times[-1]
        n_positions = self._costs.shape[1]
        sets = list(combinations(self._workers, len(self._times)))
        found = np.full((len(sets), n_positions), np.inf)
        for k in self._workers:
            rows = [row for row, workers in enumerate(sets) if k in workers]
            costs = self._costs[k]
            before = np.stack([known[_without(sets[row], k)] for row in rows]) - costs
            for q, low in enumerate(self._lows[k]):
                if low < q:
                    times = before[:, low:q].min(axis=1) + costs[q]
                    found[rows, q] = np.minimum(found[rows, q], times)
        return dict(zip(sets, found, strict=True))

    def _stages(self, workers: _Workers) -> list[tuple[int, int, int]]:
        """The way back from the last unit; of equals, fuller stages come first."""
        stages = []
        q = self._costs.shape[1] - 1
        while workers:
            costs, known = self._costs, self._times[len(workers) - 1]
            _, p, k = min(
                (known[_without(workers, k)][p] - costs[k, p] + costs[k, q], -p, -k)
                for k in workers
                for p in range(self._lows[k][q], q)
            )
            stages.append((-k, -p, q))
            workers, q = _without(workers, -k), -p
        return [(0, 0, q), *reversed(stages)]


def _without(workers: _Workers, worker: int) -> _Workers:
    return tuple(k for k in workers if k != worker)

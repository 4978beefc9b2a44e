"""Candidates and rivals, measured: a few windows for all, many for the best.

What is measured teaches the predictor, which proposes again; the best file wins,
whoever proposed it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

import numpy as np

from ewq_gguf.bench.statistics import kld_difference
from ewq_gguf.errors import InputError, VerificationError
from ewq_gguf.optimal.allocation import solve_allocation
from ewq_gguf.optimal.latency import LatencyTarget
from ewq_gguf.optimal.measuring import Measuring
from ewq_gguf.optimal.predictor import Prediction, Predictor
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.plan.size_target import SizeLimit
from ewq_gguf.records import Plan, PresetPolicy, SearchedFile, TextResult
from ewq_gguf.stages.candidate_files import types_sha256

#: Selections that are proposed at once: the cheapest, and others that may be it as far
#: as is known.
_N_PROPOSED = 4
_N_ROUNDS = 6
_N_FINALISTS = 3
#: A rival that is predicted to be worse than the best by as many standard deviations is
#: not measured; the most promising ones are, whatever is predicted.
_N_STD = 3.0
_N_ALWAYS = 3
#: A round that improves on the best by less is the last one.
_LEAST_GAIN = 0.01
#: Rounds after files were too slow, and what a token may take in them beyond what they
#: were too slow by.
_N_TIGHTENED = 3
_STRICTER = 0.98
#: A rival that is predicted to be slower by more is not timed.
_LATENCY_MARGIN = 0.1
#: The preset whose weights lose least: what it costs beyond them is the floor.
_FLOOR_PRESET = "Q8_0"


@dataclass
class Entrant:
    """A file in question, and what is known about it so far."""

    name: str
    kind: Literal["optimal", "preset", "plan"]
    plan: Plan
    prediction: Prediction
    few: TextResult | None = None
    many: TextResult | None = None
    tps: float | None = None
    is_slow: bool = False

    @property
    def rank(self) -> tuple[bool, float, float, float]:
        """Of the better file it is smaller: by many windows, few, or prediction."""
        kld = self.prediction.kld_nats
        return (self.is_slow, _nats(self.many), _nats(self.few), kld)

    def record(self, best: Entrant) -> SearchedFile:
        """What is kept of it."""
        is_other = self is not best and self.many is not None
        assert best.many is not None
        return SearchedFile(
            name=self.name,
            kind=self.kind,
            has_imatrix=self.plan.imatrix is not None,
            size_bytes=self.plan.totals.file_size_bytes,
            predicted_nats=self.prediction.kld_nats,
            predicted_std_nats=self.prediction.std_nats,
            few_nats=_nats(self.few) if self.few else None,
            many_nats=_nats(self.many) if self.many else None,
            tps=self.tps,
            difference=kld_difference(self.many, best.many)
            if self.many is not None and is_other
            else None,
        )


@dataclass
class Contest:
    """Files of one size or smaller, and the one that is best.

    Attributes:
        subject: what is planned.
        limit: of the whole file; the smallest types of the menu keep it.
        menu: what each quantisable tensor may be.
        measuring: measures files.
        predictor: with the costs of all types of all entrants.
        deadline: of `time.monotonic`; no round begins that would not end by then.
        make: the plan of types.
        allows: whether a file of types, by tensor, is one that the user may get.
        min_tps: tokens per second that are asked for; 0 for any.
        latency_target: How fast the proposed files have to be; None for any.
        entrants: that were looked at so far.
        n_left_out: rivals that the prediction ruled out.
    """

    subject: ModelTensors
    limit: SizeLimit
    menu: Mapping[str, Sequence[str]]
    measuring: Measuring
    predictor: Predictor
    deadline: float
    make: Callable[[Mapping[str, str]], Plan]
    allows: Callable[[Mapping[str, str]], bool]
    min_tps: float = 0.0
    latency_target: LatencyTarget | None = None
    entrants: list[Entrant] = field(default_factory=list)
    n_left_out: int = 0

    def run(self, rivals: Mapping[str, Plan]) -> tuple[Plan, tuple[SearchedFile, ...]]:
        """The best file's plan, and all that were looked at, best first.

        Args:
            rivals: that are not proposed here, by name; Q8_0 teaches, whatever its
                size.

        Raises:
            InputError: no file is fast enough.
            VerificationError: no file can be measured.
        """
        self._find_floor(rivals)
        best = self._round(0)
        self._meet(
            {
                name: plan
                for name, plan in rivals.items()
                if plan.totals.file_size_bytes <= self.limit.n_bytes
                and self.allows(written_types(plan))
            }
        )
        for number in range(1, _N_ROUNDS):
            if not self._has_time():
                break
            before, best = best, self._round(number)
            if best > before * (1 - _LEAST_GAIN):
                break
        self._compare_best()
        for number in range(_N_ROUNDS, _N_ROUNDS + _N_TIGHTENED):
            if not self._is_too_slow():
                break
            try:
                self._round(number)
            except InputError:  # no types are so fast: what was timed is all there is
                break
            self._compare_best()
        self._check_speed()
        order = sorted(self.entrants, key=lambda entrant: entrant.rank)
        return order[0].plan, tuple(entrant.record(order[0]) for entrant in order)

    @property
    def n_few(self) -> int:
        """Windows that all were measured on; a text may have fewer than asked for."""
        return max(len(one.few.chunks) for one in self.entrants if one.few)

    @property
    def n_many(self) -> int:
        """Windows that the best were measured on."""
        return max(len(one.many.chunks) for one in self.entrants if one.many)

    @property
    def prediction_error(self) -> float | None:
        """Median of |measured / predicted - 1|, each predicted before measured."""
        ratios = [
            abs(_nats(entrant.few) / entrant.prediction.kld_nats - 1)
            for entrant in self.entrants
            if entrant.few and entrant.plan.imatrix and entrant.prediction.kld_nats
        ]
        return median(ratios) if ratios else None

    def _find_floor(self, rivals: Mapping[str, Plan]) -> None:
        """What rounding activations costs: a file of small errors, less these."""
        names = [f"{_FLOOR_PRESET} imatrix", _FLOOR_PRESET]
        plan = next(rivals[name] for name in names if name in rivals)
        (result,) = self.measuring.on_few([plan])
        if result is None:
            return
        weights = self.predictor.predict(written_types(plan)).kld_nats
        floor = max(_nats(result) - weights, 0.0)
        self.predictor = replace(self.predictor, floor_nats=floor)

    def _round(self, number: int) -> float:
        """Propose, measure, learn; the best divergence so far, nats."""
        known = {types_sha256(entrant.plan) for entrant in self.entrants}
        proposed: dict[str, Plan] = {}
        for draw in range(_N_PROPOSED):
            rng = np.random.default_rng([number, draw]) if draw else None
            plan = self._propose(rng)
            if types_sha256(plan) not in known:
                proposed.setdefault(types_sha256(plan), plan)
        n_own = sum(entrant.kind == "optimal" for entrant in self.entrants)
        self._enter(
            [
                self._entrant(f"optimal {n_own + i}", "optimal", plan)
                for i, plan in enumerate(proposed.values(), 1)
            ]
        )
        return min(_nats(e.few) for e in self.entrants if e.kind == "optimal")

    def _compare_best(self) -> None:
        """Measure the best on many windows, and their speed where one is asked for."""
        finalists = self._finalists()
        plans = [entrant.plan for entrant in finalists]
        many = self.measuring.on_many(plans)
        for entrant, result in zip(finalists, many, strict=True):
            entrant.many = result
        if not any(entrant.many for entrant in self.entrants):
            raise VerificationError(
                "plan",
                "--policy optimal",
                "no file of this size could be measured",
                "see the lines above, or choose another policy",
            )
        if self.latency_target is None:
            return
        speeds = self.measuring.speeds(plans)
        for entrant, tps in zip(finalists, speeds, strict=True):
            entrant.tps, entrant.is_slow = tps, tps < self.min_tps

    def _is_too_slow(self) -> bool:
        """Whether none of those proposed here is fast enough; then be stricter."""
        own = [
            e.tps for e in self.entrants if e.kind == "optimal" and e.tps is not None
        ]
        fastest = max(own, default=0.0)
        # Where none could be made or run, none tells how strict to be.
        if self.latency_target is None or not 0 < fastest < self.min_tps:
            return False
        most = self.latency_target.max_seconds * fastest / self.min_tps * _STRICTER
        self.latency_target = replace(self.latency_target, max_seconds=most)
        return True

    def _check_speed(self) -> None:
        """Refuse where nothing that was timed is fast enough.

        Raises:
            InputError: with the speed that was reached.
        """
        timed = [one for one in self.entrants if one.tps is not None]
        if timed and all(entrant.is_slow for entrant in timed):
            fastest = max(entrant.tps or 0.0 for entrant in timed)
            raise InputError(
                "plan",
                "--min-tps",
                f"the fastest file of this size generates {fastest:.1f} tokens per "
                f"second, not {self.min_tps:g}",
                "ask for fewer, or choose a smaller size",
            )

    def _propose(self, rng: np.random.Generator | None) -> Plan:
        now = self.predictor.costs_now(rng)
        allowed = {
            name: {ggml_type: now[name][ggml_type] for ggml_type in types}
            for name, types in self.menu.items()
        }
        types = solve_allocation(
            self.subject, allowed, self.limit.n_bytes, self.latency_target
        )
        if types is None and self.latency_target is not None:
            raise InputError(
                "plan",
                "--min-tps",
                f"no types of this size generate {self.min_tps:g} tokens per second",
                "ask for fewer, or choose a smaller size",
            )
        assert types is not None  # the smallest types fit
        return self.make(types)

    def _meet(self, rivals: Mapping[str, Plan]) -> None:
        """Measure rivals, the most promising first; leave the hopeless out."""
        waiting = {
            types_sha256(plan): self._entrant(
                name,
                "preset" if isinstance(plan.policy, PresetPolicy) else "plan",
                plan,
            )
            for name, plan in reversed(list(rivals.items()))
        }
        order = sorted(waiting.values(), key=lambda entrant: entrant.rank)
        for i, entrant in enumerate(order):
            found = self.predictor.predict(written_types(entrant.plan))
            entrant.prediction = found
            best = min(_nats(one.few) for one in self.entrants)
            is_hopeless = found.at_least(_N_STD) > best
            if self._is_far_too_slow(entrant) or (is_hopeless and i >= _N_ALWAYS):
                self.n_left_out += 1
            else:
                self._enter([entrant])

    def _is_far_too_slow(self, entrant: Entrant) -> bool:
        """By the prediction; what may be fast enough is timed."""
        if self.latency_target is None:
            return False
        seconds = self.latency_target.latency.seconds(
            written_types(entrant.plan), self.latency_target.weights
        )
        return seconds > (1 + _LATENCY_MARGIN) / self.min_tps

    def _entrant(
        self, name: str, kind: Literal["optimal", "preset", "plan"], plan: Plan
    ) -> Entrant:
        return Entrant(name, kind, plan, self.predictor.predict(written_types(plan)))

    def _enter(self, entrants: Sequence[Entrant]) -> None:
        if not entrants:
            return
        found = self.measuring.on_few([entrant.plan for entrant in entrants])
        for entrant, result in zip(entrants, found, strict=True):
            entrant.few = result
            # The table's errors are those of files with the matrix, if there is one.
            has_matrix = bool(entrant.plan.imatrix) == bool(self.subject.importance)
            if result is not None and has_matrix:
                types = written_types(entrant.plan)
                self.predictor = self.predictor.after(types, _nats(result))
        self.entrants += entrants

    def _has_time(self) -> bool:
        needed = self.measuring.seconds_of(_N_PROPOSED, _N_FINALISTS + 1)
        return time.monotonic() + needed <= self.deadline

    def _finalists(self) -> list[Entrant]:
        """The best of those proposed here, the best rival, and all that beat these."""
        measured = [entrant for entrant in self.entrants if entrant.few]
        order = sorted(measured, key=lambda entrant: _nats(entrant.few))
        own = [
            entrant
            for entrant in order
            if entrant.kind == "optimal"
            and not entrant.is_slow
            # What was proposed for a slower target gives way to what is fast enough.
            and (
                self.latency_target is None
                or self.latency_target.is_met(written_types(entrant.plan))
            )
        ]
        others = [e for e in order if e.kind != "optimal" and not e.is_slow]
        least = _nats(own[0].few) if own else 0.0
        better = [entrant for entrant in others[1:] if _nats(entrant.few) < least]
        return [*own[:_N_FINALISTS], *others[:1], *better]


def written_types(plan: Plan) -> dict[str, str]:
    """What each quantisable tensor is in the file."""
    return {t.name: t.written_type for t in plan.tensors if t.is_quantizable}


def _nats(result: TextResult | None) -> float:
    if result is None:
        return float("inf")
    assert result.kld is not None
    return result.kld.kld_mean_nats

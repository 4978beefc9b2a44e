"""The best file of a size: candidates are proposed and measured beside baselines.

All are measured on a few windows of the search text, the best ones on many windows of
the final text. Each measured file teaches the predictor, which proposes again; the
file of the least divergence is taken, whether it was proposed here or is a baseline.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np

from ewq_gguf.errors import InputError, VerificationError
from ewq_gguf.optimal.candidates import Candidate, kld_nats
from ewq_gguf.optimal.file_measurer import FileMeasurer
from ewq_gguf.optimal.predictor import Prediction, Predictor
from ewq_gguf.optimal.search_space import SearchSpace, quantizable_types
from ewq_gguf.optimal.settings import DEFAULT, SearchSettings
from ewq_gguf.records import Plan, PresetPolicy
from ewq_gguf.stages.candidate_files import types_sha256


@dataclass
class CandidateSelection:
    """Files of one size or smaller, and the choice among them.

    Attributes:
        space: types, size and speed that files may have.
        measurer: measures files.
        predictor: predicts divergences, from the costs of all types of all candidates.
        deadline: time by `time.monotonic`; no round begins that would end later.
        settings: constants of the search.
        candidates: files that were considered so far.
        n_left_out: baselines that the prediction ruled out.
    """

    space: SearchSpace
    measurer: FileMeasurer
    predictor: Predictor
    deadline: float
    settings: SearchSettings = DEFAULT
    candidates: list[Candidate] = field(default_factory=list)
    n_left_out: int = 0

    def run(self, baselines: Mapping[str, Plan]) -> list[Candidate]:
        """Propose, measure and compare until a round gains little or time is up.

        Args:
            baselines: plans to compare with, by name; Q8_0 teaches, whatever its size.

        Returns:
            All candidates, the best first.

        Raises:
            InputError: no file is as fast as the user asks for.
            VerificationError: no file can be measured.
        """
        settings = self.settings
        self.estimate_floor(baselines)
        best = self.measure_proposals(0)
        self.measure_baselines(
            {name: plan for name, plan in baselines.items() if self.space.allows(plan)}
        )
        for number in range(1, settings.n_rounds):
            if not self._has_time():
                break
            before, best = best, self.measure_proposals(number)
            if best > before * (1 - settings.min_gain):
                break
        self.compare_finalists()
        for number in range(settings.n_speed_rounds):
            if not self._tighten_latency():
                break
            try:
                self.measure_proposals(settings.n_rounds + number)
            except InputError:  # no types are so fast: the timed files are all there is
                break
            self.compare_finalists()
        self._check_speed()
        return sorted(self.candidates, key=lambda candidate: candidate.rank)

    def estimate_floor(self, baselines: Mapping[str, Plan]) -> None:
        """Measure the cost of rounding activations.

        It is the divergence of a file whose weights are nearly exact, less their own.
        """
        preset = self.settings.floor_preset
        names = [f"{preset} imatrix", preset]
        plan = next(baselines[name] for name in names if name in baselines)
        (result,) = self.measurer.on_search_text([plan])
        if result is None:
            return
        weights = self.predictor.predict(quantizable_types(plan)).kld_nats
        floor = max(kld_nats(result) - weights, 0.0)
        self.predictor = replace(self.predictor, floor_nats=floor)

    def measure_proposals(self, number: int) -> float:
        """Propose files, measure them, and learn.

        Args:
            number: number of the round, which seeds its draws.

        Returns:
            Least divergence of a proposed file so far, nats.
        """
        known = {types_sha256(candidate.plan) for candidate in self.candidates}
        plans: dict[str, Plan] = {}
        for draw in range(self.settings.n_proposed):
            rng = np.random.default_rng([number, draw]) if draw else None
            plan = self.propose(rng)
            if types_sha256(plan) not in known:
                plans.setdefault(types_sha256(plan), plan)
        first = len(self._proposed()) + 1
        self._measure(
            [
                Candidate(f"optimal {i}", "optimal", plan, self._predict(plan))
                for i, plan in enumerate(plans.values(), first)
            ]
        )
        return min(candidate.search_kld for candidate in self._proposed())

    def propose(self, rng: np.random.Generator | None) -> Plan:
        """The plan that costs least as far as is known, or by a draw.

        Args:
            rng: draws the costs from the posterior; None takes their means.

        Raises:
            InputError: no types are as fast as the user asks for.
        """
        types = self.space.solve(self.predictor.corrected_costs(rng))
        if types is None and self.space.latency_target is not None:
            raise InputError(
                "plan",
                "--min-tps",
                "no types of this size generate "
                f"{self.space.policy.min_tps:g} tokens per second",
                "ask for fewer, or choose a smaller size",
            )
        assert types is not None  # the smallest types fit
        return self.space.plan(types)

    def measure_baselines(self, baselines: Mapping[str, Plan]) -> None:
        """Measure baselines, the most promising first; leave out what cannot win."""
        by_types = {
            types_sha256(plan): Candidate(
                name,
                "preset" if isinstance(plan.policy, PresetPolicy) else "plan",
                plan,
                self._predict(plan),
            )
            for name, plan in reversed(list(baselines.items()))
        }
        order = sorted(by_types.values(), key=lambda candidate: candidate.rank)
        for i, candidate in enumerate(order):
            candidate.prediction = self._predict(candidate.plan)
            best = min(other.search_kld for other in self.candidates)
            least = candidate.prediction.at_least(self.settings.n_std_excluded)
            is_hopeless = least > best and i >= self.settings.n_always_measured
            tolerance = self.settings.speed_tolerance
            if is_hopeless or self.space.is_too_slow(candidate.plan, tolerance):
                self.n_left_out += 1
            else:
                self._measure([candidate])

    def compare_finalists(self) -> None:
        """Measure the best on many windows, and their speed where it matters.

        Raises:
            VerificationError: no file can be measured.
        """
        finalists = self._finalists()
        plans = [candidate.plan for candidate in finalists]
        results = self.measurer.on_final_text(plans)
        for candidate, result in zip(finalists, results, strict=True):
            candidate.on_final_text = result
        if not any(candidate.on_final_text for candidate in self.candidates):
            raise VerificationError(
                "plan",
                "--policy optimal",
                "no file of this size could be measured",
                "see the lines above, or choose another policy",
            )
        if self.space.latency_target is None:
            return
        min_tps = self.space.policy.min_tps or 0.0
        speeds = self.measurer.speeds(plans)
        for candidate, tps in zip(finalists, speeds, strict=True):
            candidate.tps, candidate.is_slow = tps, tps < min_tps

    @property
    def n_search_windows(self) -> int:
        """Windows that all were measured on; a text may have fewer than asked for."""
        results = [candidate.on_search_text for candidate in self.candidates]
        return max(len(result.chunks) for result in results if result)

    @property
    def n_final_windows(self) -> int:
        """Windows that the finalists were measured on."""
        results = [candidate.on_final_text for candidate in self.candidates]
        return max(len(result.chunks) for result in results if result)

    @property
    def prediction_error(self) -> float | None:
        """Median of |measured / predicted - 1|, each predicted before measured."""
        ratios = [
            abs(candidate.search_kld / candidate.prediction.kld_nats - 1)
            for candidate in self.candidates
            if candidate.on_search_text
            and candidate.plan.imatrix
            and candidate.prediction.kld_nats
        ]
        return median(ratios) if ratios else None

    def _proposed(self) -> list[Candidate]:
        return [each for each in self.candidates if each.source == "optimal"]

    def _predict(self, plan: Plan) -> Prediction:
        return self.predictor.predict(quantizable_types(plan))

    def _measure(self, candidates: Sequence[Candidate]) -> None:
        """Measure candidates on the search text and learn from them."""
        if not candidates:
            return
        results = self.measurer.on_search_text([each.plan for each in candidates])
        for candidate, result in zip(candidates, results, strict=True):
            candidate.on_search_text = result
            # The table's errors are those of files with the matrix, if there is one.
            has_matrix = candidate.plan.imatrix is not None
            if result is not None and has_matrix == bool(self.space.model.importance):
                types = quantizable_types(candidate.plan)
                self.predictor = self.predictor.after(types, kld_nats(result))
        self.candidates += candidates

    def _has_time(self) -> bool:
        """Whether another round, and then the finalists, can be measured in time."""
        settings = self.settings
        needed = self.measurer.expected_seconds(
            settings.n_proposed, settings.n_finalists + 1
        )
        return time.monotonic() + needed <= self.deadline

    def _finalists(self) -> list[Candidate]:
        """The best proposals, the best baseline, and all baselines that beat these."""
        measured = [each for each in self.candidates if each.on_search_text]
        order = sorted(measured, key=lambda candidate: candidate.search_kld)
        target = self.space.latency_target
        proposals = [
            candidate
            for candidate in order
            if candidate.source == "optimal"
            and not candidate.is_slow
            # A proposal for a lower speed gives way to those that are fast enough.
            and (target is None or target.is_met(quantizable_types(candidate.plan)))
        ]
        others = [c for c in order if c.source != "optimal" and not c.is_slow]
        least = proposals[0].search_kld if proposals else 0.0
        better = [candidate for candidate in others[1:] if candidate.search_kld < least]
        return [*proposals[: self.settings.n_finalists], *others[:1], *better]

    def _tighten_latency(self) -> bool:
        """Ask for faster files where no proposal was fast enough; False if one was."""
        fastest = max((each.tps or 0.0 for each in self._proposed()), default=0.0)
        target, min_tps = self.space.latency_target, self.space.policy.min_tps or 0.0
        # Where none could be made or run, none tells how much faster they have to be.
        if target is None or not 0 < fastest < min_tps:
            return False
        seconds = target.max_seconds * fastest / min_tps * self.settings.speed_margin
        target = replace(target, max_seconds=seconds)
        self.space = replace(self.space, latency_target=target)
        return True

    def _check_speed(self) -> None:
        """Refuse where no timed file is fast enough.

        Raises:
            InputError: with the speed that was reached.
        """
        timed = [
            candidate for candidate in self.candidates if candidate.tps is not None
        ]
        if timed and all(candidate.is_slow for candidate in timed):
            fastest = max(candidate.tps or 0.0 for candidate in timed)
            raise InputError(
                "plan",
                "--min-tps",
                f"the fastest file of this size generates {fastest:.1f} tokens per "
                f"second, not {self.space.policy.min_tps:g}",
                "ask for fewer, or choose a smaller size",
            )

"""A file's KL divergence before it is made, and what measured files teach about it.

    KLD(types) = floor + sum r_t(type) + sum over (role, type) of m x sum a_t e_t(type)

a_t: probed sensitivities; e_t: the error table; r_t: what rounding a tensor's input
costs, as far as it was measured; floor: the rest of that, of any quantised file. The
multipliers m are 1 where probes and errors tell the truth. They have a normal prior
around 1, shared in part by a role, by a type and by all, so that one measured file
teaches about others; the posterior of a linear model with known noise follows in closed
form (Rasmussen and Williams 2006, section 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.tensor_names import role

Floats = NDArray[np.float64]

#: Standard deviation of each of the multipliers' four parts: of all, of a role, of a
#: type, of one role in one type. Together 0.4: probes are that far off now and then.
_PRIOR_STD = 0.2
#: Of a measured divergence, relative: what adding up leaves out.
_NOISE = 0.05
#: Multipliers are never taken as smaller: no error improves a model.
_LEAST = 0.1


@dataclass(frozen=True)
class Prediction:
    """A divergence in nats, and the standard deviation of its error."""

    kld_nats: float
    std_nats: float

    def at_least(self, n_std: float) -> float:
        """What it may be if the prediction is so many standard deviations too high.

        A prediction that is known to a third tells still that a hundred times the best
        is not the best: no multiplier is taken as smaller than a tenth.
        """
        return max(self.kld_nats - n_std * self.std_nats, _LEAST * self.kld_nats)


@dataclass(frozen=True)
class Predictor:
    """What is known about the divergence of a model's files.

    Attributes:
        costs: nats by tensor and type, as probes and errors have it; 0 for what the
            base has.
        floor_nats: of activation rounding, beyond `rounding`.
        rounding: of a tensor's input, nats by tensor and type.
        measured: files' types by tensor, and their divergences.
    """

    costs: Mapping[str, Mapping[str, float]]
    floor_nats: float = 0.0
    rounding: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    measured: tuple[tuple[Mapping[str, str], float], ...] = ()
    _cells: tuple[tuple[str, str], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Number the multipliers."""
        cells = {
            (role(name), ggml_type)
            for name, one in self.costs.items()
            for ggml_type in one
        }
        object.__setattr__(self, "_cells", tuple(sorted(cells)))

    def after(self, types: Mapping[str, str], kld_nats: float) -> Predictor:
        """The same with one more file measured."""
        return replace(self, measured=(*self.measured, (types, kld_nats)))

    def floor(self, types: Mapping[str, str]) -> float:
        """What rounding activations costs a file with these types, nats."""
        return self.floor_nats + sum(
            self.rounding.get(name, {}).get(ggml_type, 0.0)
            for name, ggml_type in types.items()
        )

    def predict(self, types: Mapping[str, str]) -> Prediction:
        """Of a file with these types; tensors that are not named are as in the base."""
        mean, covariance = self._posterior
        features = self._features(types)
        value = self.floor(types) + float(features @ mean)
        spread = float(features @ covariance @ features)
        return Prediction(value, sqrt(max(spread, 0.0) + (_NOISE * value) ** 2))

    def costs_now(
        self, rng: np.random.Generator | None = None
    ) -> dict[str, dict[str, float]]:
        """Nats by tensor and type with what was learnt.

        Args:
            rng: draws multipliers from what they may be; None takes their means.
        """
        mean, covariance = self._posterior
        if rng is not None:
            mean = rng.multivariate_normal(mean, covariance, method="eigh")
        known = dict(zip(self._cells, np.maximum(mean, _LEAST).tolist(), strict=True))
        return {
            name: {
                ggml_type: known[role(name), ggml_type] * cost
                + self.rounding.get(name, {}).get(ggml_type, 0.0)
                for ggml_type, cost in one.items()
            }
            for name, one in self.costs.items()
        }

    def _features(self, types: Mapping[str, str]) -> Floats:
        number = {cell: i for i, cell in enumerate(self._cells)}
        features = np.zeros(len(self._cells))
        for name, ggml_type in types.items():
            cost = self.costs.get(name, {}).get(ggml_type, 0.0)
            if cost:
                features[number[role(name), ggml_type]] += cost
        return features

    @cached_property
    def _posterior(self) -> tuple[Floats, Floats]:
        mean, covariance = np.ones(len(self._cells)), self._prior()
        if not self.measured:
            return mean, covariance
        features = np.stack([self._features(types) for types, _ in self.measured])
        klds = np.array([kld for _, kld in self.measured])
        floors = np.array([self.floor(types) for types, _ in self.measured])
        noise = np.diag((_NOISE * klds) ** 2 + 1e-18)
        gain = (
            covariance
            @ features.T
            @ np.linalg.inv(features @ covariance @ features.T + noise)
        )
        mean = mean + gain @ (klds - floors - features @ mean)
        return mean, covariance - gain @ features @ covariance

    def _prior(self) -> Floats:
        def same(values: Sequence[str]) -> Floats:
            return np.array([[float(a == b) for b in values] for a in values])

        roles = same([cell[0] for cell in self._cells])
        types = same([cell[1] for cell in self._cells])
        shared: Floats = 1.0 + roles + types + np.eye(len(self._cells))
        return _PRIOR_STD**2 * shared

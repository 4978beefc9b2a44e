"""Predictions of a file's KL divergence, corrected by the files measured so far.

    KLD(types) = floor + sum r_t(type) + sum over (role, type) of m x sum a_t e_t(type)

a_t: probed sensitivities; e_t: the error table; r_t: cost of rounding a tensor's input,
as far as it was measured; floor: the rest of that, of any quantised file. The
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

from ewq_gguf.optimal.settings import DEFAULT, SearchSettings
from ewq_gguf.tensor_names import role

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Prediction:
    """A file's predicted divergence.

    Attributes:
        kld_nats: mean KL divergence from the base.
        std_nats: standard deviation of the prediction's error.
        least_nats: divergence with every cost multiplier at its least.
    """

    kld_nats: float
    std_nats: float
    least_nats: float = 0.0

    def at_least(self, n_std: float) -> float:
        """The divergence if the prediction is so many standard deviations too high.

        A prediction that is known to a third still tells that a file of a hundred times
        the best divergence is not the best one.
        """
        return max(self.kld_nats - n_std * self.std_nats, self.least_nats)


@dataclass(frozen=True)
class Predictor:
    """A linear model of the divergence of a model's files, and its posterior.

    Attributes:
        costs: nats by tensor and type, as probes and errors have it; 0 for the base's
            own type.
        floor_nats: cost of rounding activations beyond `rounding`, of every file.
        rounding: nats by tensor and type for rounding the tensor's input.
        measured: types by tensor and divergence of each measured file.
        settings: constants of the prior and the noise.
    """

    costs: Mapping[str, Mapping[str, float]]
    floor_nats: float = 0.0
    rounding: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    measured: tuple[tuple[Mapping[str, str], float], ...] = ()
    settings: SearchSettings = DEFAULT
    _cells: tuple[tuple[str, str], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Number the multipliers: one for each role in each type."""
        cells = {
            (role(name), ggml_type)
            for name, by_type in self.costs.items()
            for ggml_type in by_type
        }
        object.__setattr__(self, "_cells", tuple(sorted(cells)))

    def after(self, types: Mapping[str, str], kld_nats: float) -> Predictor:
        """The same with one more file measured."""
        return replace(self, measured=(*self.measured, (types, kld_nats)))

    def floor(self, types: Mapping[str, str]) -> float:
        """Nats that rounding activations costs a file with these types."""
        return self.floor_nats + sum(
            self.rounding.get(name, {}).get(ggml_type, 0.0)
            for name, ggml_type in types.items()
        )

    def predict(self, types: Mapping[str, str]) -> Prediction:
        """Predict the file with these types; other tensors are as in the base."""
        mean, covariance = self._posterior
        features = self._features(types)
        value = self.floor(types) + float(features @ mean)
        variance = max(float(features @ covariance @ features), 0.0)
        return Prediction(
            value,
            sqrt(variance + (self.settings.noise * value) ** 2),
            self.settings.min_multiplier * value,
        )

    def corrected_costs(
        self, rng: np.random.Generator | None = None
    ) -> dict[str, dict[str, float]]:
        """Nats by tensor and type: weights, times their multipliers, and rounding.

        Args:
            rng: draws the multipliers from the posterior; None takes their means.
        """
        mean, covariance = self._posterior
        if rng is not None:
            mean = rng.multivariate_normal(mean, covariance, method="eigh")
        values = np.maximum(mean, self.settings.min_multiplier).tolist()
        multipliers = dict(zip(self._cells, values, strict=True))
        return {
            name: {
                ggml_type: multipliers[role(name), ggml_type] * cost
                + self.rounding.get(name, {}).get(ggml_type, 0.0)
                for ggml_type, cost in by_type.items()
            }
            for name, by_type in self.costs.items()
        }

    def _features(self, types: Mapping[str, str]) -> Floats:
        """(m,): cost of each role in each type, before correction."""
        number = {cell: i for i, cell in enumerate(self._cells)}
        features = np.zeros(len(self._cells))
        for name, ggml_type in types.items():
            cost = self.costs.get(name, {}).get(ggml_type, 0.0)
            if cost:
                features[number[role(name), ggml_type]] += cost
        return features

    @cached_property
    def _posterior(self) -> tuple[Floats, Floats]:
        """Mean (m,) and covariance (m, m) of the multipliers."""
        mean, covariance = np.ones(len(self._cells)), self._prior()
        if not self.measured:
            return mean, covariance
        features = np.stack([self._features(types) for types, _ in self.measured])
        klds = np.array([kld for _, kld in self.measured])
        floors = np.array([self.floor(types) for types, _ in self.measured])
        noise = np.diag((self.settings.noise * klds) ** 2 + 1e-18)
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
        return self.settings.prior_std**2 * shared

"""The studies of layers: sensitivity, controls and the factor of the threshold."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ewq_gguf.bench.statistics import kld_difference
from ewq_gguf.entropy.layers import layer_statistics
from ewq_gguf.experiments.controls import (
    ALL_LAYERS,
    NOTHING,
    check_probe_type,
    controls,
    correlations,
    kld_mean,
    probes,
    rank_among,
)
from ewq_gguf.experiments.study import Files, StudyDesign
from ewq_gguf.experiments.study_record import (
    Control,
    Controls,
    FactorFile,
    FactorSweep,
    LayerProbe,
    RoleProbe,
    Sensitivity,
)
from ewq_gguf.pipeline.planning import plan
from ewq_gguf.records import (
    ControlPolicy,
    EwqPolicy,
    Measures,
    Plan,
    RulePolicy,
    UniformPolicy,
)
from ewq_gguf.stages.run import Run
from ewq_gguf.stages.scanning import policy_measures, scan


@dataclass(frozen=True)
class SensitivitySpec:
    """Each layer and each role quantised alone, and the statistic that foretells it.

    Attributes:
        ggml_type: type of the part.
        measures: settings of the entropies.
    """

    ggml_type: str = "Q4_0"
    measures: Measures = Measures()
    name = "sensitivity"

    def design(self, run: Run) -> StudyDesign:
        """Plan a file for each part."""
        check_probe_type(self.ggml_type)
        # With the type, so that a matrix without an entry that it needs is refused now.
        whole = _plan(run, UniformPolicy(ggml_type=self.ggml_type))
        parts = list(probes(whole, self.ggml_type))
        statistics = _layer_statistics(run, self.measures)

        def findings(files: Files) -> Sensitivity:
            layers = [
                LayerProbe(
                    layer_idx=idx, statistics=of_layer, file=files[f"layer {idx}"]
                )
                for idx, of_layer in statistics.items()
            ]
            roles = [
                RoleProbe(
                    role=probe.role,
                    n_tensors=len(probe.tensors),
                    n_weights=sum(prod(tensor.shape) for tensor in probe.tensors),
                    file=files[probe.part],
                )
                for probe in parts
                if probe.role is not None
            ]
            return Sensitivity(
                ggml_type=self.ggml_type,
                epsilon=self.measures.epsilon,
                n_bins=self.measures.n_bins,
                floor=files[NOTHING],
                rounding=files[ALL_LAYERS],
                layers=tuple(layers),
                roles=tuple(roles),
                correlations=correlations(
                    [layer.statistics for layer in layers],
                    [kld_mean(layer.file) for layer in layers],
                ),
            )

        return StudyDesign({probe.part: probe.plan for probe in parts}, findings, run)


@dataclass(frozen=True)
class ControlsSpec:
    """A plan beside others that have as many layers of each type.

    Attributes:
        policy: the policy of the plan.
        n_permutations: number of random ones.
        raw_type: type that `raw` stands for: `F16`, `BF16` or `auto`.
    """

    policy: EwqPolicy = EwqPolicy()
    n_permutations: int = 5
    raw_type: str = "auto"
    name = "controls"

    def design(self, run: Run) -> StudyDesign:
        """Plan by the policy, and deal its layers' types anew."""
        own = _plan(run, self.policy, self.raw_type)
        statistics = _layer_statistics(run, policy_measures(self.policy))
        variances = {idx: of_layer["variance"] for idx, of_layer in statistics.items()}
        policies: dict[str, ControlPolicy] = {}
        plans: dict[str, Plan] = {self.policy.name: own}
        for other in controls(own, variances, self.n_permutations):
            policy = other.policy
            assert isinstance(policy, ControlPolicy)
            seed = "" if policy.seed is None else f" {policy.seed}"
            policies[f"{policy.order}{seed}"] = policy
            plans[f"{policy.order}{seed}"] = other

        def findings(files: Files) -> Controls:
            quality = files[self.policy.name].quality
            others = [
                Control(
                    order=policy.order,
                    seed=policy.seed,
                    file=files[label],
                    difference=kld_difference(files[label].quality, quality),
                )
                for label, policy in policies.items()
            ]
            random = [kld_mean(c.file) for c in others if c.order == "random"]
            rank = rank_among(kld_mean(files[self.policy.name]), random)
            return Controls(
                plan=files[self.policy.name],
                controls=tuple(others),
                rank=rank,
                p=rank / (len(random) + 1),
            )

        return StudyDesign(plans, findings, run)


@dataclass(frozen=True)
class FactorSpec:
    """Files of one factor after another.

    Attributes:
        policies: policies that differ in the factor.
        raw_type: type that `raw` stands for: `F16`, `BF16` or `auto`.
    """

    policies: tuple[EwqPolicy, ...]
    raw_type: str = "auto"
    name = "factor"

    def design(self, run: Run) -> StudyDesign:
        """Plan with each factor."""
        plans = {str(p.factor): _plan(run, p, self.raw_type) for p in self.policies}

        def findings(files: Files) -> FactorSweep:
            return FactorSweep(
                files=tuple(
                    FactorFile(factor=float(factor), file=file)
                    for factor, file in files.items()
                )
            )

        return StudyDesign(plans, findings, run)


def _plan(run: Run, policy: RulePolicy, raw_type: str = "auto") -> Plan:
    """Plan by a policy, with nothing kept for being quantised already.

    A checkpoint that cannot be converted is refused before its weights are read.
    """
    _ = run.layout
    return plan(run.with_options(keep_lattice=False), policy, raw_type=raw_type)


def _layer_statistics(run: Run, measures: Measures) -> dict[int, dict[str, float]]:
    return layer_statistics(scan(run, measures).tensors)

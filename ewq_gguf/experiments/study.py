"""Studies: many throwaway files of one model, measured under the same conditions.

A study that was killed goes on where it was, and files that two of them share are
measured once (see `stages.candidate_files`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from ewq_gguf._version import __version__
from ewq_gguf.bench.files import check_measurable, identify
from ewq_gguf.bench.runner import Request
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
from ewq_gguf.experiments.study_record import (
    Control,
    Controls,
    FactorFile,
    FactorSweep,
    Findings,
    LayerProbe,
    RoleProbe,
    Sensitivity,
    Study,
    StudyFile,
)
from ewq_gguf.llamacpp.convertible import check_is_local
from ewq_gguf.pipeline.planning import plan
from ewq_gguf.records import (
    ControlPolicy,
    EwqPolicy,
    Measures,
    Plan,
    RulePolicy,
    TextResult,
    UniformPolicy,
)
from ewq_gguf.stages.candidate_files import measure_plans, types_sha256
from ewq_gguf.stages.converting import base_file
from ewq_gguf.stages.run import Run
from ewq_gguf.stages.scanning import policy_measures, scan

#: Of its errors.
STAGE = "study"


@dataclass(frozen=True)
class StudySpec:
    """What every study needs to know.

    Attributes:
        run: the model and the options.
        request: how files are measured; its tasks and its base are set here.
    """

    run: Run
    request: Request


def study_sensitivity(
    spec: StudySpec, ggml_type: str = "Q4_0", measures: Measures | None = None
) -> Study:
    """Quantise each layer and each role alone, and see which statistic foretells it.

    Args:
        spec: of the study.
        ggml_type: of the part.
        measures: of the entropies; None for the paper's.

    Raises:
        EwqError: of the stage that failed, with what to do.
    """
    measures = measures or Measures()
    check_probe_type(ggml_type)
    # With the type, so that a matrix without an entry that it needs is refused now.
    whole = _plan(spec, UniformPolicy(ggml_type=ggml_type))
    made = list(probes(whole, ggml_type))
    statistics = _layer_statistics(spec, measures)

    def findings(files: Mapping[str, StudyFile]) -> Findings:
        layers = [
            LayerProbe(layer_idx=idx, statistics=known, file=files[f"layer {idx}"])
            for idx, known in statistics.items()
        ]
        roles = [
            RoleProbe(
                role=probe.role,
                n_tensors=len(probe.tensors),
                n_weights=sum(prod(tensor.shape) for tensor in probe.tensors),
                file=files[probe.part],
            )
            for probe in made
            if probe.role is not None
        ]
        return Sensitivity(
            ggml_type=ggml_type,
            epsilon=measures.epsilon,
            n_bins=measures.n_bins,
            floor=files[NOTHING],
            rounding=files[ALL_LAYERS],
            layers=tuple(layers),
            roles=tuple(roles),
            correlations=correlations(
                [layer.statistics for layer in layers],
                [kld_mean(layer.file) for layer in layers],
            ),
        )

    return run_study(spec, {probe.part: probe.plan for probe in made}, findings)


def study_controls(
    spec: StudySpec,
    policy: EwqPolicy | None = None,
    n_permutations: int = 5,
    *,
    raw_type: str = "auto",
) -> Study:
    """Measure a plan beside others that have as many layers of each type.

    Args:
        spec: of the study.
        policy: that plans; None for the paper's.
        n_permutations: random ones.
        raw_type: what `raw` means: `F16`, `BF16` or `auto`.

    Raises:
        EwqError: of the stage that failed, with what to do.
    """
    policy = policy or EwqPolicy()
    planned = _plan(spec, policy, raw_type)
    statistics = _layer_statistics(spec, policy_measures(policy))
    variances = {idx: known["variance"] for idx, known in statistics.items()}
    others = {
        _control_label(control): control
        for control in controls(planned, variances, n_permutations)
    }

    def findings(files: Mapping[str, StudyFile]) -> Findings:
        own = files[policy.name]
        found = [
            _control(control, files[label], own) for label, control in others.items()
        ]
        random = [kld_mean(one.file) for one in found if one.order == "random"]
        rank = rank_among(kld_mean(own), random)
        p = rank / (len(random) + 1)
        return Controls(plan=own, controls=tuple(found), rank=rank, p=p)

    return run_study(spec, {policy.name: planned, **others}, findings)


def study_factor(
    spec: StudySpec, policies: Sequence[EwqPolicy], *, raw_type: str = "auto"
) -> Study:
    """Measure what one factor after another makes.

    Args:
        spec: of the study.
        policies: alike but for the factor.
        raw_type: what `raw` means: `F16`, `BF16` or `auto`.

    Raises:
        EwqError: of the stage that failed, with what to do.
    """
    plans = {str(policy.factor): _plan(spec, policy, raw_type) for policy in policies}
    return run_study(
        spec,
        plans,
        lambda files: FactorSweep(
            files=tuple(
                FactorFile(factor=float(factor), file=file)
                for factor, file in files.items()
            )
        ),
    )


def _plan(spec: StudySpec, policy: RulePolicy, raw_type: str = "auto") -> Plan:
    """What a policy says, with nothing kept for being quantised already.

    A checkpoint that cannot be converted is refused before its weights are read.
    """
    _ = spec.run.layout
    run = spec.run.with_options(keep_lattice=False)
    return plan(run, policy, raw_type=raw_type)


def _layer_statistics(
    spec: StudySpec, measures: Measures
) -> dict[int, dict[str, float]]:
    return layer_statistics(scan(spec.run, measures).tensors)


def _control_label(control: Plan) -> str:
    policy = control.policy
    assert isinstance(policy, ControlPolicy)
    return policy.order if policy.seed is None else f"{policy.order} {policy.seed}"


def _control(control: Plan, file: StudyFile, own: StudyFile) -> Control:
    policy = control.policy
    assert isinstance(policy, ControlPolicy)
    return Control(
        order=policy.order,
        seed=policy.seed,
        file=file,
        difference=kld_difference(file.quality, own.quality),
    )


def run_study(
    spec: StudySpec,
    plans: Mapping[str, Plan],
    findings: Callable[[Mapping[str, StudyFile]], Findings],
) -> Study:
    """Measure the files of plans, and say what they mean together.

    Args:
        spec: of the study.
        plans: by their labels.
        findings: what the files, by these labels, say.

    Raises:
        EwqError: of the stage that failed, with what to do.
    """
    run = spec.run
    check_is_local(run.checkpoint)
    base = base_file(run)
    check_measurable(base, spec.request.n_ctx)
    request = replace(spec.request, tasks=("perplexity", "kld"), base=base)
    known = measure_plans(
        list(plans.values()),
        request,
        run.toolchain,
        options=run.options,
        progress=run.progress,
    )
    files = {
        label: _file(label, made, known[types_sha256(made)].quality)
        for label, made in plans.items()
    }
    return Study(
        ewq_version=__version__,
        model=run.identity,
        base=identify(base),
        parameters=request.parameters(),
        engine=next(iter(known.values())).engine,
        findings=findings(files),
    )


def _file(label: str, plan: Plan, quality: TextResult) -> StudyFile:
    return StudyFile(
        label=label,
        plan_sha256=plan.sha256,
        layer_types=tuple(layer.ggml_type for layer in plan.layers),
        size_bytes=plan.totals.file_size_bytes,
        bpw=plan.totals.bpw,
        quality=quality,
    )

"""The curve of size against divergence: presets, the paper's policies, and the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import exp, log
from statistics import fmean
from typing import Literal

from ewq_gguf.bench.statistics import kld_difference
from ewq_gguf.errors import InputError, ToolError
from ewq_gguf.experiments.controls import kld_mean
from ewq_gguf.experiments.study import StudySpec, run_study
from ewq_gguf.experiments.study_record import Frontier, FrontierFile, Study, StudyFile
from ewq_gguf.pipeline.planning import plan
from ewq_gguf.plan.size_target import SizeTarget
from ewq_gguf.records import EwqPolicy, FastEwqPolicy, OptimalPolicy, Plan, RulePolicy
from ewq_gguf.stages.calibrating import with_imatrix
from ewq_gguf.stages.presets import all_preset_plans


def study_frontier(
    spec: StudySpec, budgets: Mapping[str, SizeTarget], policy: OptimalPolicy
) -> Study:
    """Measure the best file of each size beside everything else of any size.

    Args:
        spec: of the study; its text is the judge and chooses nothing.
        budgets: by their names.
        policy: how the best files are searched for.

    Raises:
        EwqError: of the stage that failed, with what to do.
    """
    run = with_imatrix(spec.run)
    spec = replace(spec, run=run)
    plans = all_preset_plans(run)
    sources: dict[str, tuple[RulePolicy, str | None]] = {}
    rules: tuple[RulePolicy, ...] = (policy, EwqPolicy(), FastEwqPolicy())
    for name, ask in budgets.items():
        for rule in rules:
            label = f"{rule.name} {name}"
            run.progress.note(f"planning {label}")
            try:
                plans[label] = plan(run, rule, budget=ask)
            except (InputError, ToolError) as error:
                if rule is policy:
                    raise
                # Its ladder does not reach the size, or its library is missing.
                run.progress.note(f"no file of {label}: {error}")
                continue
            sources[label] = rule, name
    return run_study(spec, plans, lambda files: frontier_of(plans, files, sources))


def frontier_of(
    plans: Mapping[str, Plan],
    files: Mapping[str, StudyFile],
    sources: Mapping[str, tuple[RulePolicy, str | None]],
) -> Frontier:
    """What measured files say of sizes.

    Args:
        plans: by label; what is not in `sources` is a preset.
        files: of these plans.
        sources: policy and name of the budget, by label.
    """
    presets = {label: files[label] for label in plans if label not in sources}
    found, ratios = [], []
    for label, file in files.items():
        rule, budget = sources.get(label, (None, None))
        limit = plans[label].budget
        one = FrontierFile(
            source=_source(rule),
            budget=budget,
            limit_bytes=limit.limit_bytes if limit else None,
            has_imatrix=plans[label].imatrix is not None,
            file=file,
        )
        # What had been there for as many bytes, whether or not the file needs them all.
        most = max(limit.limit_bytes if limit else 0, file.size_bytes)
        smaller = [p for p in presets.values() if p.size_bytes <= most]
        if isinstance(rule, OptimalPolicy) and smaller:
            rival = min(smaller, key=kld_mean)
            difference = kld_difference(file.quality, rival.quality)
            update = {"rival": rival.label, "difference": difference}
            one = one.model_copy(update=update)
            if kld_mean(file) and kld_mean(rival):  # unquantised it is 0
                ratios.append(log(kld_mean(file) / kld_mean(rival)))
        found.append(one)
    found.sort(key=lambda one: (-one.file.size_bytes, kld_mean(one.file)))
    return Frontier(files=tuple(found), ratio=exp(fmean(ratios)) if ratios else None)


def _source(
    rule: RulePolicy | None,
) -> Literal["preset", "ewq", "fastewq", "optimal"]:
    if isinstance(rule, EwqPolicy | FastEwqPolicy | OptimalPolicy):
        return rule.name
    return "preset"

"""The curve of size against divergence: presets, the paper's policies, and the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, log
from statistics import fmean

from ewq_gguf.bench.statistics import kld_difference
from ewq_gguf.errors import InputError, ToolError
from ewq_gguf.experiments.controls import kld_mean
from ewq_gguf.experiments.study import Files, StudyDesign
from ewq_gguf.experiments.study_record import Frontier, FrontierFile
from ewq_gguf.pipeline.planning import plan
from ewq_gguf.plan.size_target import SizeTarget
from ewq_gguf.records import EwqPolicy, FastEwqPolicy, OptimalPolicy, Plan
from ewq_gguf.stages.calibrating import with_imatrix
from ewq_gguf.stages.presets import all_preset_plans, check_presets, preset_plans
from ewq_gguf.stages.run import Run

#: Presets whose sizes are planned for by default.
PRESETS = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_M", "IQ4_XS")
#: Policy of a file, and the name of the size that it was planned for.
Source = tuple[OptimalPolicy | EwqPolicy | FastEwqPolicy, str]


@dataclass(frozen=True)
class FrontierSpec:
    """The best file of each size beside everything else of any size.

    Attributes:
        policy: settings of the search for the best files.
        presets: presets whose sizes are planned for, where there are no budgets.
        budgets: sizes, by the words that they were given in.
    """

    policy: OptimalPolicy
    presets: tuple[str, ...] = PRESETS
    budgets: tuple[tuple[str, SizeTarget], ...] = ()
    name = "frontier"

    def design(self, run: Run) -> StudyDesign:
        """Plan every preset with the importance matrix and without, and each size.

        The text that files are measured on chooses nothing.
        """
        run = with_imatrix(run)
        plans = all_preset_plans(run)
        sources: dict[str, Source] = {}
        for name, size in self.budgets or _preset_sizes(run, self.presets):
            for policy in (self.policy, EwqPolicy(), FastEwqPolicy()):
                label = f"{policy.name} {name}"
                run.progress.note(f"planning {label}")
                try:
                    plans[label] = plan(run, policy, budget=size)
                except (InputError, ToolError) as error:
                    if policy is self.policy:
                        raise
                    # Its ladder does not reach the size, or its library is missing.
                    run.progress.note(f"no file of {label}: {error}")
                    continue
                sources[label] = policy, name
        return StudyDesign(plans, lambda files: frontier_of(plans, files, sources), run)


def _preset_sizes(
    run: Run, names: tuple[str, ...]
) -> tuple[tuple[str, SizeTarget], ...]:
    """The sizes of presets, by their names.

    With the importance matrix a file says so, and is some hundred bytes larger.
    """
    check_presets(names, has_imatrix=True)
    plans = preset_plans(run, presets=names, needed=names)
    sizes = {name: plans[name].totals.file_size_bytes for name in names}
    return tuple(
        (name, SizeTarget(f"{size}B", n_bytes=size)) for name, size in sizes.items()
    )


def frontier_of(
    plans: Mapping[str, Plan], files: Files, sources: Mapping[str, Source]
) -> Frontier:
    """The files by size, and the optimal ones beside the best presets.

    Args:
        plans: by label; what is not in `sources` is a preset.
        files: the measured files of these plans.
        sources: policy and name of the budget, by label.
    """
    presets = [files[label] for label in plans if label not in sources]
    entries, ratios = [], []
    for label, file in files.items():
        policy, budget = sources.get(label, (None, None))
        limit, rival, difference = plans[label].budget, None, None
        # What had been there for as many bytes, whether or not the file needs them all.
        most = max(limit.limit_bytes if limit else 0, file.size_bytes)
        smaller = [preset for preset in presets if preset.size_bytes <= most]
        if isinstance(policy, OptimalPolicy) and smaller:
            rival = min(smaller, key=kld_mean)
            difference = kld_difference(file.quality, rival.quality)
            if kld_mean(file) and kld_mean(rival):  # unquantised it is 0
                ratios.append(log(kld_mean(file) / kld_mean(rival)))
        entries.append(
            FrontierFile(
                source=policy.name if policy else "preset",
                budget=budget,
                limit_bytes=limit.limit_bytes if limit else None,
                has_imatrix=plans[label].imatrix is not None,
                file=file,
                rival=rival.label if rival else None,
                difference=difference,
            )
        )
    entries.sort(key=lambda entry: (-entry.file.size_bytes, kld_mean(entry.file)))
    return Frontier(files=tuple(entries), ratio=exp(fmean(ratios)) if ratios else None)

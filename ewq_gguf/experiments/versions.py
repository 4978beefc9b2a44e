"""Which files of a model are compared: its base, plans, and the presets beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.errors import UsageError
from ewq_gguf.experiments.comparison_record import Kind
from ewq_gguf.llamacpp.imatrix import check_imatrix
from ewq_gguf.llamacpp.layout import PRESETS
from ewq_gguf.pipeline.making import layout_bytes
from ewq_gguf.pipeline.planning import check_importance, plan
from ewq_gguf.plan.check import check_sound
from ewq_gguf.plan.naming import plan_label
from ewq_gguf.plan.size_target import SizeTarget
from ewq_gguf.records import Plan, RulePolicy
from ewq_gguf.stages.finished_plan import check_weights
from ewq_gguf.stages.presets import check_presets, preset_plans
from ewq_gguf.stages.run import Run

BASE = "base"
#: Names become those of files.
_NAME = re.compile(r"\w[\w.+-]{0,99}")


@dataclass(frozen=True)
class PlanSpec:
    """A plan that is compared.

    Attributes:
        source: the finished plan, or the policy to make it by.
        budget: what its file may take; only of a policy.
        name: of its row; None for the policy's label.
    """

    source: RulePolicy | Plan
    budget: SizeTarget | None = None
    name: str | None = None


@dataclass(frozen=True)
class Version:
    """A file that is compared, before it is made.

    Attributes:
        name: of its row.
        kind: what makes it.
        plan: what it is made from; None of the base.
        size_bytes: of the file, exact.
        bpw: of the whole file.
        brackets: names of plans beside which it is the nearest in size.
    """

    name: str
    kind: Kind
    plan: Plan | None
    size_bytes: int
    bpw: float
    brackets: tuple[str, ...] = ()


#: Of a file's size: another one that differs by less has the same.
_SAME = 0.001


def bracketing(size_bytes: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The nearest file that is no larger, and the nearest that is larger.

    Or the one of the same size, within a thousandth: it needs no other beside it.

    Args:
        size_bytes: of the file between them.
        sizes: of the others, by name; where two are equal the first counts.

    Returns:
        One name where there is none on the other side, or none is needed.
    """
    nearest = min(sizes, key=lambda name: abs(sizes[name] - size_bytes))
    if abs(sizes[nearest] - size_bytes) <= _SAME * size_bytes:
        return (nearest,)
    below = {name: size for name, size in sizes.items() if size <= size_bytes}
    above = {name: size for name, size in sizes.items() if size > size_bytes}
    return (
        *([max(below, key=lambda name: below[name])] if below else []),
        *([min(above, key=lambda name: above[name])] if above else []),
    )


def choose_versions(
    run: Run, plans: Sequence[PlanSpec], presets: Sequence[str]
) -> tuple[Version, ...]:
    """The base first, then all others by falling size.

    Beside each plan there are always the two presets, or the preset and the base,
    between which its size lies, or the one of its size.

    Raises:
        UsageError: two versions have one name, or there is no such preset.
        InputError: a plan is another model's, or of another importance matrix.
    """
    check_presets(presets, has_imatrix=run.options.imatrix is not None)
    check_importance(run)
    made = [_planned(run, wanted) for wanted in plans]
    every = tuple(dict.fromkeys((*PRESETS, *presets)))
    standard = preset_plans(run, presets=every, needed=every)
    base_bytes = layout_bytes(run.layout)
    n_weights = next(iter(standard.values())).totals.n_weights
    sizes = {name: p.totals.file_size_bytes for name, p in standard.items()}
    beside: dict[str, list[str]] = {BASE: [], **{name: [] for name in presets}}
    for version in made:
        for name in bracketing(version.size_bytes, {**sizes, BASE: base_bytes}):
            beside.setdefault(name, []).append(version.name)
    base = Version(
        name=BASE,
        kind="base",
        plan=None,
        size_bytes=base_bytes,
        bpw=8 * base_bytes / n_weights,
        brackets=tuple(beside[BASE]),
    )
    others = [
        *made,
        *(
            _version(name, "preset", standard[name], tuple(brackets))
            for name, brackets in beside.items()
            if name != BASE
        ),
    ]
    _check_names([base, *others])
    return (base, *sorted(others, key=lambda version: -version.size_bytes))


def _planned(run: Run, wanted: PlanSpec) -> Version:
    if isinstance(wanted.source, Plan):
        made = wanted.source
        check_sound(made)
        check_imatrix(made, run.options.imatrix)
        check_weights(run, made)
    else:
        made = plan(run, wanted.source, budget=wanted.budget)
    return _version(wanted.name or plan_label(made), "plan", made)


def _version(
    name: str, kind: Kind, made: Plan, brackets: tuple[str, ...] = ()
) -> Version:
    totals = made.totals
    return Version(name, kind, made, totals.file_size_bytes, totals.bpw, brackets)


def _check_names(versions: Sequence[Version]) -> None:
    """Refuse names that are no file's, or two files'; on some disks case is none."""
    names = [version.name.lower() for version in versions]
    for version in versions:
        if not _NAME.fullmatch(version.name):
            problem, remedy = "cannot be a file's name", "rename the plan's file"
        elif names.count(version.name.lower()) > 1:
            problem = "is the name of two versions"
            remedy = "name each once, or rename a plan's file"
        else:
            continue
        raise UsageError(STAGE, version.name, problem, remedy)

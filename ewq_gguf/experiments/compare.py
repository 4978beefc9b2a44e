"""`ewq compare`: plans of a model beside its base and the presets of similar size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.runner import Request
from ewq_gguf.errors import UsageError
from ewq_gguf.experiments.comparison import estimates, pairs_of
from ewq_gguf.experiments.comparison_record import (
    ComparedFile,
    Comparison,
    Estimate,
    Kind,
)
from ewq_gguf.experiments.engine import ExperimentFile, existing, run_experiment
from ewq_gguf.experiments.kept_files import KeptFiles
from ewq_gguf.llamacpp.convertible import check_is_local
from ewq_gguf.llamacpp.imatrix import check_imatrix
from ewq_gguf.llamacpp.layout import PRESETS
from ewq_gguf.llamacpp.verify import check_bindings
from ewq_gguf.pipeline.making import layout_bytes
from ewq_gguf.pipeline.planning import check_importance, plan
from ewq_gguf.plan.check import check_sound
from ewq_gguf.plan.naming import plan_label
from ewq_gguf.plan.size_target import SizeTarget
from ewq_gguf.records import OptimalPolicy, Plan, Result, RulePolicy
from ewq_gguf.stages.calibrating import with_imatrix
from ewq_gguf.stages.finished_plan import check_weights, chosen_as
from ewq_gguf.stages.presets import check_presets, preset_plans
from ewq_gguf.stages.run import Run

BASE = "base"
#: Names of versions become those of files.
_NAME = re.compile(r"\w[\w.+-]{0,99}")
#: Files whose sizes differ by a smaller share have the same size.
_SAME = 0.001


@dataclass(frozen=True)
class PlanSpec:
    """A plan that is compared.

    Attributes:
        source: the finished plan, or the policy to make it by.
        budget: size of its file; only with a policy.
        name: name of its row; None for the policy's label.
    """

    source: RulePolicy | Plan
    budget: SizeTarget | None = None
    name: str | None = None


@dataclass(frozen=True)
class ComparisonSpec:
    """A comparison that is asked for.

    Attributes:
        plans: the mixed files.
        presets: standard files beside those that bracket the plans.
        request: measurement of every file; its base is replaced by the model's.
        keep_files: whether the GGUF files stay when everything is measured.
    """

    plans: tuple[PlanSpec, ...]
    presets: tuple[str, ...]
    request: Request
    keep_files: bool = True


@dataclass(frozen=True)
class Version(ExperimentFile):
    """A file that is compared, before it is made.

    Attributes:
        kind: base, preset or plan.
        size_bytes: the file's exact bytes.
        bpw: bits per weight of the whole file.
        brackets: names of the plans to which it is the nearest in size.
    """

    kind: Kind
    size_bytes: int
    bpw: float
    brackets: tuple[str, ...] = ()


def compare(
    run: Run, spec: ComparisonSpec, folder: Path | None = None
) -> tuple[Comparison, Path]:
    """Make what is missing, measure everything under the same conditions, compare.

    Files that are there and still valid are used again, so that a run that was killed
    goes on where it was.

    Args:
        run: the model and the options; the importance matrix is that of all files.
        spec: the files and their measurement.
        folder: folder of files, plans and results; None for `compare/NAME` here.

    Returns:
        The comparison, and its file.

    Raises:
        EwqError: a stage failed; the message says what to do.
    """
    spec.request.parameters()
    check_bindings(STAGE)
    _ = run.toolchain  # a missing one is said before a model is downloaded
    for each in spec.plans:
        if isinstance(each.source, Plan):
            run = chosen_as(run, each.source)
    check_is_local(run.checkpoint)
    folder = folder or Path("compare") / run.identity.name
    out = folder / "comparison.json"
    store.check_writable(out, STAGE)
    with store.locked(out, stage=STAGE):
        other = existing(Comparison, out, STAGE, force=run.options.force)
        if other and other.model.fingerprint != run.identity.fingerprint:
            raise store.already_exists(out, STAGE)
        if any(isinstance(each.source, OptimalPolicy) for each in spec.plans):
            run = with_imatrix(run)
        versions = choose_versions(run, spec.plans, spec.presets)
        files = KeptFiles(run, spec.request, folder)
        record = partial(_comparison, run, versions)
        comparison = run_experiment(versions, files, record)
        store.write_text(out, comparison.to_json(), stage=STAGE, force=True)
        if not spec.keep_files:
            files.remove(versions)
    return comparison, out


def bracketing(size_bytes: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The nearest file that is no larger, and the nearest that is larger.

    Or the one of the same size, within a thousandth: it needs no other beside it.

    Args:
        size_bytes: bytes of the file between them.
        sizes: bytes of the others, by name; where two are equal the first counts.

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
        UsageError: there is no file but the base, two have one name, or a preset is
            unknown.
        InputError: a plan is another model's, or of another importance matrix.
    """
    check_presets(presets, has_imatrix=run.options.imatrix is not None)
    check_importance(run)
    planned = [_planned(run, spec) for spec in plans]
    every = tuple(dict.fromkeys((*PRESETS, *presets)))
    standard = preset_plans(run, presets=every, needed=every)
    base_bytes = layout_bytes(run.layout)
    n_weights = next(iter(standard.values())).totals.n_weights
    sizes = {name: p.totals.file_size_bytes for name, p in standard.items()}
    beside: dict[str, list[str]] = {BASE: [], **{name: [] for name in presets}}
    for version in planned:
        for name in bracketing(version.size_bytes, {**sizes, BASE: base_bytes}):
            beside.setdefault(name, []).append(version.name)
    bpw, brackets = 8 * base_bytes / n_weights, tuple(beside.pop(BASE))
    others = [
        *planned,
        *(
            _version(name, "preset", standard[name], tuple(names))
            for name, names in beside.items()
        ),
    ]
    if not others:
        raise UsageError(STAGE, "compare", "there is no plan and no preset", "name one")
    base = Version(BASE, None, "base", base_bytes, bpw, brackets)
    _check_names([base, *others])
    return (base, *sorted(others, key=lambda version: -version.size_bytes))


def _planned(run: Run, spec: PlanSpec) -> Version:
    if isinstance(spec.source, Plan):
        check_sound(spec.source)
        check_imatrix(spec.source, run.options.imatrix)
        check_weights(run, spec.source)
        made = spec.source
    else:
        made = plan(run, spec.source, budget=spec.budget)
    return _version(spec.name or plan_label(made), "plan", made)


def _version(
    name: str, kind: Kind, made: Plan, brackets: tuple[str, ...] = ()
) -> Version:
    totals = made.totals
    return Version(name, made, kind, totals.file_size_bytes, totals.bpw, brackets)


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


def _comparison(
    run: Run, versions: Sequence[Version], request: Request, results: Sequence[Result]
) -> Comparison:
    rows = [
        ComparedFile(
            name=version.name,
            kind=version.kind,
            plan_sha256=version.plan.sha256 if version.plan else None,
            bpw=version.bpw,
            brackets=version.brackets,
            result=result,
            **estimates(result),
        )
        for version, result in zip(versions, results, strict=True)
    ]
    if any(row.kld_mean_nats for row in rows):
        exact = {
            "kld_mean_nats": Estimate(value=0.0, low=0.0, high=0.0),
            "top1_agreement": Estimate(value=1.0, low=1.0, high=1.0),
        }
        rows[0] = rows[0].model_copy(update=exact)
    matrix = run.options.imatrix
    return Comparison(
        model=run.identity,
        imatrix_sha256=store.sha256_file(matrix) if matrix else None,
        n_turns=request.n_repeats if "speed" in request.tasks else 0,
        rows=tuple(rows),
        pairs=pairs_of(rows),
    )

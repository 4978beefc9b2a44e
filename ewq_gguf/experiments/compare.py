"""Versions of one model: made, measured under the same conditions, compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.files import check_measurable, identify
from ewq_gguf.bench.reference_run import cached_reference
from ewq_gguf.bench.runner import Request, bench_file, is_result_of
from ewq_gguf.bench.tasks.speed import combined
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.experiments.comparison import estimates, pairs_of
from ewq_gguf.experiments.comparison_record import ComparedFile, Comparison, Estimate
from ewq_gguf.experiments.versions import PlanSpec, Version, choose_versions
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.llamacpp.convertible import check_is_local
from ewq_gguf.llamacpp.verify import check_bindings
from ewq_gguf.pipeline.making import planned_file
from ewq_gguf.records import OptimalPolicy, Plan, Result, Speed, load_record
from ewq_gguf.stages.calibrating import with_imatrix
from ewq_gguf.stages.converting import base_file
from ewq_gguf.stages.finished_plan import chosen_as
from ewq_gguf.stages.options import Options, Progress
from ewq_gguf.stages.run import Run


@dataclass(frozen=True)
class ComparisonSpec:
    """What is compared, and how.

    Attributes:
        plans: the mixed files.
        presets: standard files beside those that bracket the plans.
        request: what is measured of every file; its base is replaced by the model's.
        keep_files: whether the GGUF files stay when everything is measured.
    """

    plans: tuple[PlanSpec, ...]
    presets: tuple[str, ...]
    request: Request
    keep_files: bool = True


@dataclass(frozen=True)
class BuiltFile:
    """A version with its file.

    Attributes:
        version: which.
        path: of the GGUF.
        request: what is measured of it.
        result_path: where its result is kept.
    """

    version: Version
    path: Path
    request: Request
    result_path: Path


def compare(
    run: Run, wanted: ComparisonSpec, folder: Path | None = None
) -> tuple[Comparison, Path]:
    """Make what is missing, measure everything under the same conditions, compare.

    What is there already and still valid is used again, so that a run that was killed
    goes on where it was. Speeds are measured in turns: one repeat of each file, then
    the next of each; another set of files is timed anew, all of it.

    Args:
        run: the model and the options; the importance matrix is that of all files.
        wanted: what is compared.
        folder: folder of files, plans and results; None for `compare/NAME` here.

    Returns:
        The comparison, and its file.

    Raises:
        EwqError: of the stage that failed, with what to do.
    """
    wanted.request.parameters()
    check_bindings(STAGE)
    _ = run.toolchain  # a missing one is said before a model is downloaded
    for plan in (wish.source for wish in wanted.plans):
        if isinstance(plan, Plan):
            run = chosen_as(run, plan)
    check_is_local(run.checkpoint)
    if any(isinstance(one.source, OptimalPolicy) for one in wanted.plans):
        run = with_imatrix(run)
    options, progress = run.options, run.progress
    folder = folder or Path("compare") / run.identity.name
    out = folder / "comparison.json"
    store.check_writable(out, STAGE)
    with store.locked(out, stage=STAGE):
        _check_model(out, run.checkpoint, options)
        versions = choose_versions(run, wanted.plans, wanted.presets)
        if len(versions) == 1:
            raise UsageError(
                STAGE, "compare", "there is no plan and no preset", "name one"
            )
        files = store.ensure_dir(folder / "files", STAGE)
        _check_room(files, versions)
        base = base_file(run)
        check_measurable(base, wanted.request.n_ctx)
        _check_room(files, versions)
        request = _referred(wanted.request, base, progress)
        made = []
        for version in versions:
            # Measured as soon as it is there: a device that is missing is said before
            # all files are made.
            one = _made(version, base, folder, request)
            if version.plan is not None:
                text, plan_path = version.plan.to_json(), folder / "plans"
                store.write_text(
                    plan_path / f"{version.name}.json",
                    text,
                    stage="plan",
                    force=options.force,
                )
                planned_file(run, version.plan, one.path, base=base)
            _measure(one, options, progress)
            made.append(one)
        results = _timed(made, folder, options, progress)
        comparison = _comparison(run.checkpoint, made, results, options)
        store.write_text(out, comparison.to_json(), stage=STAGE, force=True)
        if not wanted.keep_files:
            for one in made:
                if one.version.kind != "base":
                    one.path.unlink()
    return comparison, out


def _referred(request: Request, base: Path, progress: Progress) -> Request:
    """With what the base says of the texts, so that it runs once and not per file."""
    if "kld" not in request.tasks:
        return request
    reference = cached_reference(
        base,
        replace(request, base=base),
        lambda: progress.measure(f"reference {base.name}"),
    )
    return replace(request, reference=reference)


def _check_model(out: Path, checkpoint: Checkpoint, options: Options) -> None:
    """Refuse a folder that holds something else's comparison."""
    if options.force or not out.exists():
        return
    try:
        known = load_record(Comparison, out, STAGE)
    except InputError:
        raise store.already_exists(out, STAGE) from None
    if known.model.fingerprint != checkpoint.identity.fingerprint:
        raise store.already_exists(out, STAGE)


def _check_room(files: Path, versions: tuple[Version, ...]) -> None:
    """Refuse early where the files do not fit; those that are there are not made."""
    needed = sum(
        version.size_bytes
        for version in versions
        if version.plan is not None and not (files / f"{version.name}.gguf").exists()
    )
    store.check_free(files, needed, STAGE)


def _made(version: Version, base: Path, folder: Path, request: Request) -> BuiltFile:
    is_base = version.plan is None
    return BuiltFile(
        version=version,
        path=base if is_base else folder / "files" / f"{version.name}.gguf",
        request=_of_base(request) if is_base else replace(request, base=base),
        result_path=folder / "results" / f"{version.name}.json",
    )


def _of_base(request: Request) -> Request:
    """The base is not compared with itself: that divergence is 0, by definition."""
    tasks = ["perplexity" if task == "kld" else task for task in request.tasks]
    asked = tuple(dict.fromkeys(tasks))
    return replace(request, tasks=asked, base=None, reference=None)


def _untimed(request: Request) -> Request:
    return replace(request, tasks=tuple(t for t in request.tasks if t != "speed"))


def _turn(request: Request) -> Request:
    """One repeat of the speed test."""
    return replace(request, tasks=("speed",), n_repeats=1)


def _measure(made: BuiltFile, options: Options, progress: Progress) -> None:
    """Everything but the speed, where it is not known."""
    known, request = _known(made, options), _untimed(made.request)
    if known is not None:
        progress.note(f"{made.result_path} was there already, still valid")
    if known is not None or not request.tasks:
        return
    with progress.measure(f"bench {made.version.name}") as tell:
        result = bench_file(made.path, request, tell)
    text = result.to_json()
    store.write_text(made.result_path, text, stage=STAGE, force=True)


def _known(made: BuiltFile, options: Options) -> Result | None:
    """A result that is there, with speed or without it.

    Raises:
        UsageError: another one is there.
    """
    out = made.result_path
    if not out.exists():
        return None
    try:
        result = load_record(Result, out, STAGE)
        requests = [made.request, _untimed(made.request)]
        if any(
            request.tasks and is_result_of(result, made.path, request)
            for request in requests
        ):
            return result
    except InputError:
        pass  # no result: somebody else's file
    if options.force:
        return None
    raise store.already_exists(out, STAGE)


def _timed(
    made: list[BuiltFile], folder: Path, options: Options, progress: Progress
) -> list[Result]:
    """The results with speeds, where they are asked for.

    The turns are kept by everything that belongs to their conditions: all files that
    took part, and how.
    """
    request = made[0].request
    if "speed" not in request.tasks:
        return [_result(one, None, options) for one in made]
    files = [identify(one.path).sha256 for one in made]
    asked = _turn(request).parameters().model_dump_json()
    key = store.sha256_text(f"{files} {asked} {LLAMA_CPP_COMMIT}")[:16]
    turns: dict[str, list[Result]] = {one.version.name: [] for one in made}
    for turn in range(request.n_repeats):
        # Back and forth, so that what drifts with time meets all alike.
        for one in made if turn % 2 == 0 else reversed(made):
            name = one.version.name
            path = folder / "turns" / key / f"{turn + 1}-{name}.json"
            known = _known_turn(path, one)
            if known is None:
                label = f"speed {name}, {turn + 1} of {request.n_repeats}"
                with progress.measure(label) as tell:
                    known = bench_file(one.path, _turn(one.request), tell)
                store.write_text(path, known.to_json(), stage=STAGE, force=True)
            turns[name].append(known)
    return [_result(one, turns[one.version.name], options) for one in made]


def _known_turn(path: Path, made: BuiltFile) -> Result | None:
    try:
        result = load_record(Result, path, STAGE) if path.exists() else None
    except InputError:
        return None
    is_valid = result and is_result_of(result, made.path, _turn(made.request))
    return result if is_valid else None


def _result(made: BuiltFile, turns: list[Result] | None, options: Options) -> Result:
    """All of a file's numbers as one result, as the request has it."""
    known = _known(made, options) or (turns[0] if turns else None)
    assert known is not None
    if turns is None:
        return known
    speed: Speed = combined([turn.speed for turn in turns if turn.speed])
    result = known.model_copy(
        update={
            "parameters": made.request.parameters(),
            "speed": speed,
            "prompt_tps": speed.prompt_tps,
            "generation_tps": speed.generation_tps,
            "ttft_seconds": speed.ttft_seconds,
        }
    )
    text = result.to_json()
    store.write_text(made.result_path, text, stage=STAGE, force=True)
    return result


def _comparison(
    checkpoint: Checkpoint,
    made: list[BuiltFile],
    results: list[Result],
    options: Options,
) -> Comparison:
    rows = tuple(
        _row(one.version, result) for one, result in zip(made, results, strict=True)
    )
    if any(row.kld_mean_nats for row in rows):
        exact = {
            "kld_mean_nats": Estimate(value=0.0, low=0.0, high=0.0),
            "top1_agreement": Estimate(value=1.0, low=1.0, high=1.0),
        }
        rows = (rows[0].model_copy(update=exact), *rows[1:])
    asked = made[0].request
    matrix = options.imatrix
    return Comparison(
        model=checkpoint.identity,
        imatrix_sha256=store.sha256_file(matrix) if matrix else None,
        n_turns=asked.n_repeats if "speed" in asked.tasks else 0,
        rows=rows,
        pairs=pairs_of(rows),
    )


def _row(version: Version, result: Result) -> ComparedFile:
    return ComparedFile(
        name=version.name,
        kind=version.kind,
        plan_sha256=version.plan.sha256 if version.plan else None,
        bpw=version.bpw,
        brackets=version.brackets,
        result=result,
        **estimates(result),
    )

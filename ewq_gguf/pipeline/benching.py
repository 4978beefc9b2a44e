"""Results of files, each measured where it was not yet, in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.bench.engines.saving import save_quantised
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.files import check_measurable, identify, identify_base
from ewq_gguf.bench.runner import Request, bench_file, is_result_of
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.pipeline.bitsandbytes import for_transformers
from ewq_gguf.records import Result, load_record
from ewq_gguf.stages.options import SILENT, Progress
from ewq_gguf.stages.run import Run


def bench(
    files: Sequence[Path],
    request: Request,
    out: Path | None = None,
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> list[Result]:
    """Measure files; a result that is there and answers the same is used again.

    Args:
        files: GGUF files, or one checkpoint's folder.
        request: how each is measured.
        out: the result of one file, or a folder for several; None for `results`.
        force: replace results that answer something else.
        progress: receiver of notes and of each stage's share done.

    Raises:
        EwqError: a stage failed; the message says what to do.
    """
    check_files(files, request)
    parameters = request.parameters()
    base = request.base and identify_base(request.base, parameters)
    if base and base.reference_of and "generation" in parameters.tasks:
        progress.note(f"{request.base} has no answers: none are compared with them")
    paths = _result_paths(files, out)
    # What would be refused is refused before the first file is measured.
    existing = [
        None if force else _existing(path, file, request)
        for path, file in zip(paths, files, strict=True)
    ]
    results = []
    for file, path, result in zip(files, paths, existing, strict=True):
        if result is not None:
            progress.note(f"{path} was there already, still valid")
        else:
            with store.locked(path, stage=STAGE):
                with progress.measure(f"bench {file.name}") as share:
                    result = bench_file(file, request, share)
                store.write_text(path, result.to_json(), stage=STAGE, force=True)
            progress.note(f"wrote {path}")
        results.append(result)
    return results


def check_files(files: Sequence[Path], request: Request) -> None:
    """Refuse what is no model, or none that is measured here, before any work.

    Raises:
        InputError: a file is not there, or its model does not write texts.
        UsageError: a model was made for a shorter context.
    """
    for file in files:
        identify(file)
        check_measurable(file, request.n_ctx)


def quantised_checkpoint(
    run: Run, request: Request, plan_path: Path | None, save: Path | None
) -> tuple[Path, str, Request]:
    """The folder that transformers loads, quantised by a plan where one is given.

    Args:
        run: the checkpoint and the options.
        request: how it is measured.
        plan_path: the plan's file; None for the checkpoint as it is.
        save: folder that the quantised model is written to; None quantises at loading.

    Returns:
        The folder, the name of its result, and the request with the plan.

    Raises:
        EwqError: a stage failed; the message says what to do.
    """
    if save and not plan_path:
        raise UsageError(STAGE, "--save", "needs a plan", "name it with --plan")
    model = for_transformers(run, plan_path)
    if not save:
        return model.folder, model.name, replace(request, plan=model.plan)
    assert model.plan is not None
    force = run.options.force
    if save_quantised(model.folder, model.plan, request.setup, save, force=force):
        run.progress.note(f"wrote {save}")
    return save, model.name, request


def _result_paths(files: Sequence[Path], out: Path | None) -> list[Path]:
    """Where each file's result is written.

    Raises:
        UsageError: two would go to one place, or to a file of their own input.
        ResourceError: a folder cannot be written.
    """
    if len(files) == 1 and out is not None:
        paths = [out]
    else:
        paths = [(out or Path("results")) / f"{file.stem}.json" for file in files]
    for path in paths:
        store.check_writable(path, STAGE)
        store.check_distinct(path, files, STAGE)
        if paths.count(path) > 1:
            raise UsageError(
                STAGE, path, "is the result of two files", "measure them separately"
            )
    return paths


def _existing(path: Path, file: Path, request: Request) -> Result | None:
    """The result that is there, where it answers the same question.

    Raises:
        UsageError: another file is there.
    """
    if not path.exists():
        return None
    try:
        result = load_record(Result, path, STAGE)
    except InputError:
        raise store.already_exists(path, STAGE) from None
    if is_result_of(result, file, request):
        return result
    raise store.already_exists(path, STAGE)

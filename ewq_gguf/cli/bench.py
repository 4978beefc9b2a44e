"""`ewq bench`: PPL, KLD, questions, answers, speed and memory of files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ewq_gguf import api, store
from ewq_gguf.bench.engines.saving import save_quantised
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.files import check_measurable, identify, identify_base
from ewq_gguf.bench.runner import Request, bench_file, is_result_of
from ewq_gguf.cli.bench_options import bench_options, request_of, with_data
from ewq_gguf.cli.common import (
    PATH,
    json_option,
    out_option,
    run_options,
)
from ewq_gguf.cli.progress import BarProgress
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.records import Result, load_record
from ewq_gguf.report.bench_view import bench_view


@click.command()
@click.argument("files", type=PATH, metavar="FILE...|MODEL", nargs=-1, required=True)
@out_option("the result, a folder for several.  [default: results/NAME.json]")
@click.option(
    "--base",
    type=PATH,
    help="The model to compare with: the base GGUF, its reference, or a checkpoint.",
)
@click.option(
    "--backend",
    type=click.Choice(("llama", "bnb")),
    default="llama",
    show_default=True,
    help="bnb: MODEL in transformers, with bitsandbytes' layers.",
)
@click.option(
    "--plan",
    type=PATH,
    help="With bnb: the plan for MODEL's matrices.  [default: unquantised]",
)
@click.option(
    "--save",
    type=PATH,
    metavar="DIR",
    help="With bnb: write the quantised model there, and measure it from there.",
)
@bench_options
@run_options("force")
@json_option
def bench(
    files: tuple[Path, ...],
    out: Path | None,
    as_json: bool,
    options: api.Options,
    progress: BarProgress,
    **values: Any,
) -> None:
    """Evaluate GGUF files, or a plan with bitsandbytes, with error bars.

    Perplexity as llama-perplexity counts it, the divergence from a base model, MMLU
    by letters, answers beside references and the base model's, and speed as
    llama-bench counts it; each file in processes of its own.
    A run that was killed goes on where it was.
    """
    request = request_of(values)
    request.check_base()
    files, out, request = _resolved(files, out, request, values, options, progress)
    for file in files:
        identify(file)
        check_measurable(file, request.n_ctx)
    request = with_data(request, values)
    asked = request.parameters()
    base = request.base and identify_base(request.base, asked)
    if base and base.reference_of and "generation" in asked.tasks:
        progress.note(f"{request.base} has no answers: none are compared with them")
    outs = _outs(files, out)
    # What would be refused is refused before the first file is measured.
    known = [
        _existing(path, file, request, force=options.force)
        for path, file in zip(outs, files, strict=True)
    ]
    results = []
    for file, path, found in zip(files, outs, known, strict=True):
        if found is not None:
            progress.note(f"{path} was there already, still valid")
            results.append(found)
            continue
        with store.locked(path, stage=STAGE):
            with progress.measure(f"bench {file.name}") as tell:
                result = bench_file(file, request, tell)
            store.write_text(path, result.to_json(), stage=STAGE, force=True)
        progress.note(f"wrote {path}")
        results.append(result)
    _print(results, as_json=as_json)


def _resolved(
    files: tuple[Path, ...],
    out: Path | None,
    request: Request,
    values: dict[str, Any],
    options: api.Options,
    progress: BarProgress,
) -> tuple[tuple[Path, ...], Path | None, Request]:
    """The files to measure, and the result's place; for bnb the checkpoint's folder.

    Raises:
        UsageError: options that do not go together.
    """
    plan, folder = values["plan"], values["save"]
    if values["backend"] == "llama":
        if plan or folder:
            what = "--plan" if plan else "--save"
            raise UsageError(STAGE, what, "is for --backend bnb", "add it")
        for file in files:
            if file.is_dir():
                problem = "is a folder, llama.cpp takes GGUF files"
                raise UsageError(STAGE, file, problem, "add --backend bnb")
        return files, out, request
    if len(files) > 1:
        problem = f"{len(files)} models are given, bnb takes one"
        raise UsageError(STAGE, "MODEL", problem, "measure them one by one")
    if folder and not plan:
        raise UsageError(STAGE, "--save", "needs a plan", "name it with --plan")
    options = replace(options, n_threads=request.setup.n_threads)
    model = api.for_transformers(api.Run(str(files[0]), options, progress), plan)
    out = out or Path("results") / f"{model.name}.json"
    if not folder:
        return (model.folder,), out, replace(request, plan=model.plan)
    assert model.plan is not None
    if save_quantised(
        model.folder, model.plan, request.setup, folder, force=options.force
    ):
        progress.note(f"wrote {folder}")
    return (folder,), out, request


def _print(results: list[Result], *, as_json: bool) -> None:
    if not as_json:
        Console(highlight=False).print(bench_view(results))
    elif len(results) == 1:
        click.echo(results[0].to_json(), nl=False)
    else:
        dumped = [result.model_dump(mode="json") for result in results]
        click.echo(json.dumps(dumped, indent=1, sort_keys=True))


def _outs(files: tuple[Path, ...], out: Path | None) -> list[Path]:
    """Where each file's result goes.

    Raises:
        UsageError: two would go to one place, or to a file of their own input.
        ResourceError: a folder cannot be written.
    """
    if len(files) == 1 and out is not None:
        outs = [out]
    else:
        outs = [(out or Path("results")) / f"{file.stem}.json" for file in files]
    for path in outs:
        store.check_writable(path, STAGE)
        store.check_distinct(path, files, STAGE)
        if outs.count(path) > 1:
            raise UsageError(
                STAGE, path, "is the result of two files", "measure them separately"
            )
    return outs


def _existing(out: Path, file: Path, request: Request, *, force: bool) -> Result | None:
    """The result that is there, where it answers the same question.

    Raises:
        UsageError: another file is there.
    """
    if force or not out.exists():
        return None
    try:
        result = load_record(Result, out, STAGE)
    except InputError:
        raise store.already_exists(out, STAGE) from None
    if is_result_of(result, file, request):
        return result
    raise store.already_exists(out, STAGE)

"""`ewq bench`: PPL, KLD, questions, answers, speed and memory of files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ewq_gguf import api
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.runner import Request
from ewq_gguf.cli.bench_options import bench_options, request_of, with_data
from ewq_gguf.cli.common import (
    PATH,
    json_option,
    out_option,
    run_options,
)
from ewq_gguf.cli.progress import BarProgress
from ewq_gguf.errors import UsageError
from ewq_gguf.records import Result
from ewq_gguf.report.bench_view import bench_view


@click.command()
@click.argument("files", type=PATH, metavar="FILE...|MODEL", nargs=-1, required=True)
@out_option("the result, a folder for several.  [default: results/NAME.json]")
@click.option(
    "--base",
    type=PATH,
    help="Model to compare with: the base GGUF, its reference, or a checkpoint.",
)
@click.option(
    "--backend",
    type=click.Choice(("llama", "bnb")),
    default="llama",
    show_default=True,
    help="Engine: llama.cpp, or transformers with bitsandbytes' layers (bnb).",
)
@click.option(
    "--plan",
    type=PATH,
    help="Plan that --backend bnb quantises MODEL by.  [default: unquantised]",
)
@click.option(
    "--save",
    type=PATH,
    metavar="DIR",
    help="Folder to write the quantised model of --backend bnb to.",
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
    api.check_files(files, request)
    request = with_data(request, values)
    results = api.bench(files, request, out, force=options.force, progress=progress)
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
    options = replace(options, n_threads=request.setup.n_threads)
    run = api.Run(str(files[0]), options, progress)
    file, name, request = api.quantised_checkpoint(run, request, plan, folder)
    return (file,), out or Path("results") / f"{name}.json", request


def _print(results: list[Result], *, as_json: bool) -> None:
    if not as_json:
        Console(highlight=False).print(bench_view(results))
    elif len(results) == 1:
        click.echo(results[0].to_json(), nl=False)
    else:
        dumped = [result.model_dump(mode="json") for result in results]
        click.echo(json.dumps(dumped, indent=1, sort_keys=True))

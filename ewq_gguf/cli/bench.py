"""`ewq bench`: PPL, KLD, questions, answers, speed and memory of files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from ewq_gguf import api
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.cli.bench_options import BenchOptions, bench_options
from ewq_gguf.cli.common import (
    PATH,
    json_option,
    out_option,
    run_options,
)
from ewq_gguf.cli.progress import BarProgress
from ewq_gguf.cli.sections import SectionedCommand, option
from ewq_gguf.errors import UsageError
from ewq_gguf.records import Result
from ewq_gguf.report.bench_view import bench_view

_BNB = "bitsandbytes"


@click.command(cls=SectionedCommand)
@click.argument("files", type=PATH, metavar="FILE...|MODEL", nargs=-1, required=True)
@out_option("the result, a folder for several.  [default: results/NAME.json]")
@option(
    "--base",
    type=PATH,
    metavar="FILE",
    help="Model to compare with: the base GGUF, its reference, or a checkpoint.",
)
@option(
    "--backend",
    section=_BNB,
    type=click.Choice(("llama", "bnb")),
    default="llama",
    help="Engine: llama.cpp, or transformers with bitsandbytes' layers (bnb).",
)
@option(
    "--plan",
    section=_BNB,
    type=PATH,
    metavar="PLAN",
    help="Plan that --backend bnb quantises MODEL by.  [default: unquantised]",
)
@option(
    "--save",
    section=_BNB,
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
    base: Path | None,
    backend: str,
    plan: Path | None,
    save: Path | None,
    bench: BenchOptions,
    as_json: bool,
    options: api.Options,
    progress: BarProgress,
) -> None:
    """Evaluate GGUF files, or a plan with bitsandbytes, with error bars.

    Perplexity as llama-perplexity counts it, the divergence from a base model, MMLU
    by letters, answers beside references and the base model's, and speed as
    llama-bench counts it; each file in processes of its own.
    A run that was killed goes on where it was.
    """
    request = bench.request(base)
    request.check_base()
    if backend == "llama":
        _check_llama(files, plan, save)
    else:
        options = replace(options, n_threads=request.setup.n_threads)
        run = api.Run(str(_only(files)), options, progress)
        file, name, request = api.quantised_checkpoint(run, request, plan, save)
        files, out = (file,), out or Path("results") / f"{name}.json"
    api.check_files(files, request)
    request = bench.with_data(request)
    results = api.bench(files, request, out, force=options.force, progress=progress)
    _print(results, as_json=as_json)


def _check_llama(files: Iterable[Path], plan: Path | None, folder: Path | None) -> None:
    """Refuse what only bitsandbytes takes.

    Raises:
        UsageError: naming it.
    """
    for flag, value in (("--plan", plan), ("--save", folder)):
        if value:
            raise UsageError(STAGE, flag, "is for --backend bnb", "add it")
    for file in files:
        if file.is_dir():
            problem = "is a folder, llama.cpp takes GGUF files"
            raise UsageError(STAGE, file, problem, "add --backend bnb")


def _only(files: Sequence[Path]) -> Path:
    """The one model that bitsandbytes takes.

    Raises:
        UsageError: there are more.
    """
    if len(files) > 1:
        problem = f"{len(files)} models are given, bnb takes one"
        raise UsageError(STAGE, "MODEL", problem, "measure them one by one")
    return files[0]


def _print(results: list[Result], *, as_json: bool) -> None:
    if not as_json:
        Console(highlight=False).print(bench_view(results))
    elif len(results) == 1:
        click.echo(results[0].to_json(), nl=False)
    else:
        dumped = [result.model_dump(mode="json") for result in results]
        click.echo(json.dumps(dumped, indent=1, sort_keys=True))

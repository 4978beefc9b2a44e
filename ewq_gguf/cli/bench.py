"""`ewq bench`: what files are worth."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console

from ewq_gguf import store
from ewq_gguf.bench.files import identify
from ewq_gguf.bench.job import MmluRequest
from ewq_gguf.bench.runner import CACHE_TYPES, Request, bench_file, is_result_of
from ewq_gguf.bench.saving import save_quantised
from ewq_gguf.bench.scorer import STAGE
from ewq_gguf.checkpoint.texts import wikitext
from ewq_gguf.cli.common import (
    PATH,
    BarProgress,
    force_option,
    json_option,
    options_of,
    out_option,
    quiet_option,
    threads_option,
)
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.llamacpp.rpc import server_address
from ewq_gguf.pipeline import for_transformers
from ewq_gguf.records import BenchSetup, Result, Task, load_record
from ewq_gguf.report.bench_view import bench_view

_TASKS: tuple[Task, ...] = get_args(Task)


@click.command()
@click.argument("files", type=PATH, metavar="FILE...|MODEL", nargs=-1, required=True)
@out_option("the result, a folder for several.  [default: results/NAME.json]")
@click.option(
    "--tasks",
    metavar="LIST",
    help=f"Of {','.join(_TASKS)}.  [default: all; kld with --base, mmlu with --mmlu]",
)
@click.option(
    "--base", type=PATH, help="What `kld` compares with: a base GGUF, or a checkpoint."
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
    help="With bnb: what becomes of MODEL's matrices.  [default: unquantised]",
)
@click.option(
    "--save",
    type=PATH,
    metavar="DIR",
    help="With bnb: write the quantised model there, and measure it from there.",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="NAME=FILE",
    help="A text to score; repeat.  [default: wikitext, of EWQ_TEXT_DIR or the Hub]",
)
@click.option(
    "--chunks", type=click.IntRange(1), help="Windows per text.  [default: all]"
)
@click.option(
    "--ctx",
    type=click.IntRange(8),
    default=512,
    show_default=True,
    help="Tokens of a window; its second half is scored.",
)
@click.option(
    "--lines", is_flag=True, help="Each line is a document, all of it is scored."
)
@click.option(
    "--mmlu",
    type=PATH,
    metavar="DIR",
    help="MMLU's questions: a folder with test/ and dev/.  [EWQ_MMLU_DIR]",
)
@click.option(
    "--shots",
    type=click.IntRange(0, 5),
    default=5,
    show_default=True,
    help="Examples before each question of MMLU.",
)
@click.option(
    "--limit",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="Questions per subject; 0 is all 14 042.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="Of the speed test.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|NAMES",
    help="Where the model goes; names as llama.cpp lists them.",
)
@click.option(
    "-ngl",
    "--gpu-layers",
    type=click.IntRange(0),
    help="Layers on the devices.  [default: all]",
)
@click.option("--tensor-split", metavar="LIST", help="Shares of the devices.")
@click.option("--rpc", metavar="LIST", help="RPC workers, host:port.")
@click.option("--allow-public", is_flag=True, help="Also RPC workers on the internet.")
@click.option(
    "--cache-type-k",
    type=click.Choice(CACHE_TYPES),
    default="f16",
    show_default=True,
    help="Type of the cached keys.",
)
@click.option(
    "--cache-type-v",
    type=click.Choice(CACHE_TYPES),
    default="f16",
    show_default=True,
    help="Type of the cached values.",
)
@threads_option
@force_option
@quiet_option
@json_option
def bench(
    files: tuple[Path, ...],
    out: Path | None,
    force: bool,
    quiet: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Measure what GGUF files, or a plan with bitsandbytes, are worth, with error bars.

    Perplexity as llama-perplexity counts it, the divergence from a base model, MMLU
    by letters, and speed as llama-bench counts it; each file in processes of its own.
    A run that was killed goes on where it was.
    """
    request = _request(values)
    request.check_base()
    progress = BarProgress(quiet=quiet)
    files, out, request = _resolved(files, out, request, values, force, progress)
    for file in files:
        identify(file)
    if request.is_scored and not request.texts:
        request = replace(request, texts=(("wikitext", wikitext(STAGE)),))
    request.parameters()
    outs = _outs(files, out)
    # What would be refused is refused before the first file is measured.
    known = [
        _existing(path, file, request, force=force)
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
    force: bool,
    progress: BarProgress,
) -> tuple[tuple[Path, ...], Path | None, Request]:
    """What is measured, and where its result goes; for bnb the checkpoint's folder.

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
    options = options_of({**values, "force": force})
    model = for_transformers(str(files[0]), plan, options=options, progress=progress)
    out = out or Path("results") / f"{model.name}.json"
    if not folder:
        return (model.folder,), out, replace(request, plan=model.plan)
    assert model.plan is not None
    if save_quantised(model.folder, model.plan, request.setup, folder, force=force):
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


def _request(values: dict[str, Any]) -> Request:
    folder = values["mmlu"] or os.environ.get("EWQ_MMLU_DIR")
    lacking = {"kld": values["base"] is None, "mmlu": not folder}
    default = [task for task in _TASKS if not lacking.get(task)]
    asked = _list(values["tasks"]) or default
    tasks = tuple(task for task in _TASKS if task in asked)
    if unknown := sorted(set(asked) - set(_TASKS)):
        raise UsageError(
            STAGE, "--tasks", f"there is no {unknown[0]!r}", f"use {','.join(_TASKS)}"
        )
    servers = _list(values["rpc"])
    return Request(
        tasks=tasks,
        base=values["base"],
        texts=tuple(map(_named_text, values["texts"])),
        setup=BenchSetup(
            device=values["device"],
            n_gpu_layers=values["gpu_layers"],
            tensor_split=tuple(map(_share, _list(values["tensor_split"]))),
            rpc=tuple(
                server_address(server, allow_public=values["allow_public"])
                for server in servers
            ),
            n_threads=options_of(values).n_threads,
            cache_type_k=values["cache_type_k"],
            cache_type_v=values["cache_type_v"],
        ),
        n_ctx=values["ctx"],
        n_chunks=values["chunks"],
        is_lines=values["lines"],
        n_repeats=values["repeats"],
        mmlu=MmluRequest(
            folder=str(Path(folder).absolute()),
            n_shots=values["shots"],
            limit=values["limit"] or None,
        )
        if folder
        else None,
    )


def _list(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise UsageError(
            STAGE, "--tensor-split", f"{text!r} is no share", "use numbers, as in 3,1"
        )
    return share


def _named_text(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (separator and name and path):
        raise UsageError(STAGE, "--text", f"{text!r} is not NAME=FILE", "name the file")
    return name, Path(path)


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

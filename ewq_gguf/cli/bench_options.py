"""The options that say what is measured of every file, and how."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click

from ewq_gguf.bench.job import MmluRequest
from ewq_gguf.bench.runner import CACHE_TYPES, Request
from ewq_gguf.bench.scorer import STAGE
from ewq_gguf.checkpoint.texts import wikitext
from ewq_gguf.cli.common import PATH, all_of, options_of, threads_option
from ewq_gguf.errors import UsageError
from ewq_gguf.llamacpp.rpc import server_address
from ewq_gguf.records import BenchSetup, Task

_TASKS: tuple[Task, ...] = get_args(Task)

#: What `request_of` reads, the base left out.
bench_options = all_of(
    (
        click.option(
            "--tasks",
            metavar="LIST",
            help=f"Of {','.join(_TASKS)}.  [default: all; kld with a base, mmlu with "
            "--mmlu]",
        ),
        click.option(
            "--text",
            "texts",
            multiple=True,
            metavar="NAME=FILE",
            help="A text to score; repeat.  [default: wikitext, of EWQ_TEXT_DIR or the "
            "Hub]",
        ),
        click.option(
            "--chunks", type=click.IntRange(1), help="Windows per text.  [default: all]"
        ),
        click.option(
            "--ctx",
            type=click.IntRange(8),
            default=512,
            show_default=True,
            help="Tokens of a window; its second half is scored.",
        ),
        click.option(
            "--lines",
            is_flag=True,
            help="Each line is a document, all of it is scored.",
        ),
        click.option(
            "--mmlu",
            type=PATH,
            metavar="DIR",
            help="MMLU's questions: a folder with test/ and dev/.  [EWQ_MMLU_DIR]",
        ),
        click.option(
            "--shots",
            type=click.IntRange(0, 5),
            default=5,
            show_default=True,
            help="Examples before each question of MMLU.",
        ),
        click.option(
            "--limit",
            type=click.IntRange(0),
            default=10,
            show_default=True,
            help="Questions per subject; 0 is all 14 042.",
        ),
        click.option(
            "--repeats",
            type=click.IntRange(1, 1000),
            default=5,
            show_default=True,
            help="Of the speed test.",
        ),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            metavar="auto|cpu|NAMES",
            help="Where the model goes; names as llama.cpp lists them.",
        ),
        click.option(
            "-ngl",
            "--gpu-layers",
            type=click.IntRange(0),
            help="Layers on the devices.  [default: all]",
        ),
        click.option("--tensor-split", metavar="LIST", help="Shares of the devices."),
        click.option("--rpc", metavar="LIST", help="RPC workers, host:port."),
        click.option(
            "--allow-public", is_flag=True, help="Also RPC workers on the internet."
        ),
        click.option(
            "--cache-type-k",
            type=click.Choice(CACHE_TYPES),
            default="f16",
            show_default=True,
            help="Type of the cached keys.",
        ),
        click.option(
            "--cache-type-v",
            type=click.Choice(CACHE_TYPES),
            default="f16",
            show_default=True,
            help="Type of the cached values.",
        ),
        threads_option,
    )
)


def request_of(values: dict[str, Any]) -> Request:
    """What the command line asks of every file.

    Raises:
        UsageError: a task is unknown, or an option says nothing.
    """
    folder = values["mmlu"] or os.environ.get("EWQ_MMLU_DIR")
    lacking = {"kld": values["base"] is None, "mmlu": not folder}
    default = [task for task in _TASKS if not lacking.get(task)]
    asked = comma_list(values["tasks"]) or default
    tasks = tuple(task for task in _TASKS if task in asked)
    if unknown := sorted(set(asked) - set(_TASKS)):
        raise UsageError(
            STAGE, "--tasks", f"there is no {unknown[0]!r}", f"use {','.join(_TASKS)}"
        )
    servers = comma_list(values["rpc"])
    return Request(
        tasks=tasks,
        base=values["base"],
        texts=tuple(map(_named_text, values["texts"])),
        setup=BenchSetup(
            device=values["device"],
            n_gpu_layers=values["gpu_layers"],
            tensor_split=tuple(map(_share, comma_list(values["tensor_split"]))),
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


def with_text(request: Request) -> Request:
    """A request that reads texts, with wikitext where it names none.

    Raises:
        NetworkError, ResourceError, InputError: it cannot be fetched.
    """
    if request.is_scored and not request.texts:
        return replace(request, texts=(("wikitext", wikitext(STAGE)),))
    return request


def comma_list(text: str | None) -> list[str]:
    """The parts of an option's text, without blanks and empty ones."""
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

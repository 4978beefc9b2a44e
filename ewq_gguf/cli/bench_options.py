"""Options for tasks, texts and devices, shared by commands that measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ewq_gguf import data
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.runner import CACHE_TYPES, Request
from ewq_gguf.bench.task import TaskOption
from ewq_gguf.bench.tasks import all_tasks, task_names, tasks_of
from ewq_gguf.checkpoint.texts import wikitext
from ewq_gguf.cli.common import threads_option
from ewq_gguf.cli.sections import all_of
from ewq_gguf.errors import UsageError
from ewq_gguf.process import N_CPUS
from ewq_gguf.records import BenchSetup
from ewq_gguf.rpc.commands import server_address

_WITH_DATA = ", ".join(
    f"{task.names[0]} with {task.options[0].flag}"
    for task in all_tasks()
    if not task.is_default
)
_DOMAINS = "domains"

ctx_option = click.option(
    "--ctx",
    type=click.IntRange(8),
    default=512,
    show_default=True,
    help="Tokens of a window of text, of which the second half is scored.",
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|NAMES",
    help="Devices to load the model on, named as llama.cpp lists them.",
)


def _option(option: TaskOption) -> Callable[[Any], Any]:
    """A task's option as click's."""
    number = None
    if option.minimum is not None:
        number = click.IntRange(option.minimum, option.maximum)
    return click.option(
        option.flag,
        type=number,
        metavar=option.metavar,
        default=option.default,
        show_default=option.default is not None,
        help=option.help,
    )


#: Which texts are read, and how they are cut.
text_options = all_of(
    (
        click.option(
            "--text",
            "texts",
            multiple=True,
            metavar="NAME=FILE|domains",
            help="Text to score; repeat. domains: six short texts of the package, by "
            "--lines.  [default: wikitext, of EWQ_TEXT_DIR or the Hub]",
        ),
        click.option(
            "--chunks",
            type=click.IntRange(1),
            help="Windows of each text to score, at most.  [default: all]",
        ),
        ctx_option,
        click.option(
            "--lines",
            is_flag=True,
            help="Score each line as a document of its own, all of it.",
        ),
    )
)
#: What `setup_of` reads.
setup_options = all_of(
    (
        device_option,
        click.option(
            "-ngl",
            "--gpu-layers",
            type=click.IntRange(0),
            help="Layers to put on the devices.  [default: all]",
        ),
        click.option(
            "--tensor-split",
            metavar="LIST",
            help="Shares of the model on each device, such as 3,1.",
        ),
        click.option(
            "--rpc",
            metavar="LIST",
            help="RPC workers of llama.cpp, as host:port,host:port.",
        ),
        click.option(
            "--allow-public",
            is_flag=True,
            help="Allow RPC workers with public addresses; they are not encrypted.",
        ),
        click.option(
            "--cache-type-k",
            type=click.Choice(CACHE_TYPES),
            default="f16",
            show_default=True,
            help="ggml type of the KV cache's keys.",
        ),
        click.option(
            "--cache-type-v",
            type=click.Choice(CACHE_TYPES),
            default="f16",
            show_default=True,
            help="ggml type of the KV cache's values.",
        ),
        threads_option,
    )
)
#: What `request_of` and `with_data` read, the base left out.
bench_options = all_of(
    (
        click.option(
            "--tasks",
            metavar="LIST",
            help=f"Tasks: {','.join(task_names())}.  [default: all; kld with a base, "
            f"{_WITH_DATA}]",
        ),
        text_options,
        *(_option(option) for task in all_tasks() for option in task.options),
        setup_options,
    )
)


def request_of(values: dict[str, Any]) -> Request:
    """The request that the command line makes of every file.

    Raises:
        UsageError: a task is unknown, or an option says nothing.
    """
    default = [name for task in all_tasks() for name in task.default_names(values)]
    selected = comma_list(values["tasks"]) or default
    tasks = tuple(name for name in task_names() if name in selected)
    if unknown := sorted(set(selected).difference(task_names())):
        problem, names = f"there is no {unknown[0]!r}", ",".join(task_names())
        raise UsageError(STAGE, "--tasks", problem, f"use {names}")
    has_domains = _DOMAINS in values["texts"]
    if has_domains and len(values["texts"]) > 1 and not values["lines"]:
        problem = "are read by lines, and the other texts would be, too"
        raise UsageError(STAGE, "--text domains", problem, "say so with --lines")
    return Request(
        tasks=tasks,
        base=values["base"],
        texts=tuple(text for one in values["texts"] for text in named_texts(one)),
        setup=setup_of(values),
        n_ctx=values["ctx"],
        n_chunks=values["chunks"],
        is_lines=values["lines"] or has_domains,
        n_repeats=values["repeats"],
    )


def setup_of(values: dict[str, Any]) -> BenchSetup:
    """How models are loaded, by the options.

    Raises:
        UsageError: a share or a worker's address is none.
    """
    return BenchSetup(
        device=values["device"],
        n_gpu_layers=values["gpu_layers"],
        tensor_split=tuple(map(_share, comma_list(values["tensor_split"]))),
        rpc=tuple(
            server_address(server, allow_public=values["allow_public"])
            for server in comma_list(values["rpc"])
        ),
        n_threads=values["n_threads"] or N_CPUS,
        cache_type_k=values["cache_type_k"],
        cache_type_v=values["cache_type_v"],
    )


def with_data(request: Request, values: dict[str, Any]) -> Request:
    """The request with the data that its tasks read, from the Hub where that is said.

    Raises:
        NetworkError, ResourceError: it cannot be fetched.
        InputError: the fetched data are not the known ones.
    """
    texts = request.texts
    tasks = tasks_of(request.tasks)
    if any(task.name == "texts" for task in tasks) and not texts:
        texts = (("wikitext", wikitext(STAGE)),)
    settings = {
        task.name: found for task in tasks if (found := task.settings_of(values))
    }
    return replace(request, texts=texts, settings=settings)


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


def named_texts(text: str) -> tuple[tuple[str, Path], ...]:
    """The texts that one --text names.

    Raises:
        UsageError: it is neither NAME=FILE nor `domains`.
    """
    return data.domains() if text == _DOMAINS else (named_text(text),)


def named_text(text: str) -> tuple[str, Path]:
    """NAME=FILE in its parts.

    Raises:
        UsageError: it is not that.
    """
    name, separator, path = text.partition("=")
    if not (separator and name and path):
        raise UsageError(STAGE, "--text", f"{text!r} is not NAME=FILE", "name the file")
    return name, Path(path)

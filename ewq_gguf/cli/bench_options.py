"""Options for tasks, texts and devices, shared by commands that measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from ewq_gguf import data
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.runner import Request
from ewq_gguf.bench.task import Task, TaskOption
from ewq_gguf.bench.tasks import all_tasks, task_names, tasks_of
from ewq_gguf.checkpoint.hub_data import wikitext
from ewq_gguf.cli.devices import comma_list, setup_options
from ewq_gguf.cli.sections import Decorator, collected, option
from ewq_gguf.errors import UsageError
from ewq_gguf.records import BenchSetup

_WITH_DATA = ", ".join(
    f"{task.names[0]} with {task.options[0].flag}"
    for task in all_tasks()
    if not task.is_default
)
_DOMAINS = "domains"

_TEXTS = "Texts"

ctx_option = option(
    "--ctx",
    section=_TEXTS,
    type=click.IntRange(8),
    default=512,
    metavar="N",
    help="Tokens of a window of text, of which the second half is scored.",
)


@dataclass(frozen=True)
class TextOptions:
    """The texts that are scored, and how.

    Attributes:
        texts: Name and file of each; empty for wikitext.
        n_chunks: Windows of each, at most; None for all.
        n_ctx: Tokens of a window.
        is_lines: Whether each line is a document.
    """

    texts: tuple[tuple[str, Path], ...]
    n_chunks: int | None
    n_ctx: int
    is_lines: bool


def _texts(values: dict[str, Any]) -> dict[str, Any]:
    """The options of texts as TextOptions.

    Raises:
        UsageError: texts that are read by lines and others are given together.
    """
    texts, is_lines = values.pop("texts"), values.pop("lines")
    has_domains = _DOMAINS in texts
    if has_domains and len(texts) > 1 and not is_lines:
        problem = "are read by lines, and the other texts would be, too"
        raise UsageError(STAGE, "--text domains", problem, "say so with --lines")
    options = TextOptions(
        tuple(named for text in texts for named in named_texts(text)),
        values.pop("chunks"),
        values.pop("ctx"),
        is_lines or has_domains,
    )
    return {**values, "texts": options}


#: The options of texts: the command takes `texts`, TextOptions.
text_options = collected(
    (
        option(
            "--text",
            "texts",
            section=_TEXTS,
            multiple=True,
            metavar="NAME=FILE|domains",
            help="Text to score; repeat. domains: six short texts of the package, by "
            "--lines.  [default: wikitext, of EWQ_TEXT_DIR or the Hub]",
        ),
        option(
            "--chunks",
            section=_TEXTS,
            type=click.IntRange(1),
            metavar="N",
            help="Windows of each text to score, at most.  [default: all]",
        ),
        ctx_option,
        option(
            "--lines",
            section=_TEXTS,
            is_flag=True,
            help="Score each line as a document of its own, all of it.",
        ),
    ),
    _texts,
)


def _task_option(task: Task, own: TaskOption) -> Decorator:
    """A task's option as click's."""
    number = None
    if own.minimum is not None:
        number = click.IntRange(own.minimum, own.maximum)
    return option(
        own.flag,
        section=f"Options of task {task.names[0]}",
        type=number,
        metavar=own.metavar or ("N" if number else None),
        default=own.default,
        help=own.help,
    )


@dataclass(frozen=True)
class BenchOptions:
    """The tasks, and the texts and devices that they are measured with.

    Attributes:
        tasks: Names of the tasks; empty for those that have their data.
        texts: Texts to score.
        setup: Devices and threads.
        values: Values of the tasks' own options, by name.
    """

    tasks: tuple[str, ...]
    texts: TextOptions
    setup: BenchSetup
    values: Mapping[str, Any]

    def request(self, base: Path | None) -> Request:
        """The request that the command line makes of every file."""
        values = {**self.values, "base": base}
        default = [name for task in all_tasks() for name in task.default_names(values)]
        return Request(
            tasks=tuple(n for n in task_names() if n in (self.tasks or default)),
            base=base,
            texts=self.texts.texts,
            setup=self.setup,
            n_ctx=self.texts.n_ctx,
            n_chunks=self.texts.n_chunks,
            is_lines=self.texts.is_lines,
            n_repeats=self.values["repeats"],
        )

    def with_data(self, request: Request) -> Request:
        """The request with its tasks' data, from the Hub where that is said.

        Raises:
            NetworkError, ResourceError: it cannot be fetched.
            InputError: the fetched data are not the known ones.
        """
        settings = {
            task.name: own
            for task in tasks_of(request.tasks)
            if (own := task.settings_of(self.values))
        }
        return replace(with_texts(request), settings=settings)


def with_texts(request: Request) -> Request:
    """The request with wikitext, where it scores texts and has none.

    Raises:
        NetworkError, ResourceError: it cannot be fetched.
    """
    has_texts = any(task.name == "texts" for task in tasks_of(request.tasks))
    if request.texts or not has_texts:
        return request
    return replace(request, texts=(("wikitext", wikitext(STAGE)),))


def _bench(values: dict[str, Any]) -> dict[str, Any]:
    """The options of tasks as BenchOptions.

    Raises:
        UsageError: a task is unknown.
    """
    tasks = comma_list(values.pop("tasks"))
    if unknown := sorted(set(tasks).difference(task_names())):
        problem, names = f"there is no {unknown[0]!r}", ",".join(task_names())
        raise UsageError(STAGE, "--tasks", problem, f"use {names}")
    flags = [own.flag for task in all_tasks() for own in task.options]
    keys = [flag.strip("-").replace("-", "_") for flag in flags]
    own_values = {name: values.pop(name) for name in keys}
    bench = BenchOptions(
        tuple(tasks), values.pop("texts"), values.pop("setup"), own_values
    )
    return {**values, "bench": bench}


#: The options of tasks, texts and devices: the command takes `bench`, BenchOptions.
bench_options = collected(
    (
        option(
            "--tasks",
            metavar="LIST",
            help=f"Tasks to run, with commas: {', '.join(task_names())}.  [default: "
            f"all; kld with a base, {_WITH_DATA}]",
        ),
        text_options,
        *(_task_option(task, own) for task in all_tasks() for own in task.options),
        setup_options,
    ),
    _bench,
)


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

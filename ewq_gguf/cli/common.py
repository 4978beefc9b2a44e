"""What commands share: options, default-command groups, output, progress."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ewq_gguf.api import Options
from ewq_gguf.bench.job import MemoryUse
from ewq_gguf.cli import silence
from ewq_gguf.records import Record
from ewq_gguf.size_text import size_text

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R", bound=Record)

PATH = click.Path(path_type=Path)


class DefaultGroup(click.Group):
    """A group whose first argument is a subcommand or belongs to the default one."""

    def __init__(self, *args: Any, default: str = "", **kwargs: Any) -> None:
        """Remember which command takes what no subcommand takes."""
        super().__init__(*args, **kwargs)
        self.default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command in front of what is no subcommand."""
        own = set(self.commands) | set(ctx.help_option_names)
        if args and args[0] not in own:
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The default command's help, then the subcommands'."""
        with self.commands[self.default].make_context(
            ctx.info_name, [], parent=ctx.parent, resilient_parsing=True
        ) as sub:
            sub.command.format_help(sub, formatter)
        with formatter.section("Subcommands"):
            formatter.write_dl(
                [
                    (name, command.get_short_help_str())
                    for name, command in self.commands.items()
                    if name != self.default
                ]
            )


def finite(ctx: click.Context, param: click.Parameter, value: float) -> float:
    """Refuse NaN, which every range lets through.

    Raises:
        click.BadParameter: it is NaN.
    """
    if isnan(value):
        raise click.BadParameter("nan is not a number")
    return value


def all_of(options: Sequence[Callable[[F], F]]) -> Callable[[F], F]:
    """One decorator of several, in their order."""

    def decorate(function: F) -> F:
        for each in reversed(options):
            function = each(function)
        return function

    return decorate


def out_option(what: str) -> Callable[[F], F]:
    """`-o`."""
    return click.option("-o", "--out", type=PATH, help=f"Where to write {what}.")


force_option = click.option(
    "--force", is_flag=True, help="Replace outputs made from other inputs."
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress.")
json_option = click.option(
    "--json", "as_json", is_flag=True, help="The result as JSON on stdout."
)
epsilon_option = click.option(
    "--epsilon",
    type=click.FloatRange(0, 1e6),
    callback=finite,
    default=0.01,
    show_default=True,
    help="Of the softmax measure.",
)
bins_option = click.option(
    "--bins",
    type=click.IntRange(2, 65536),
    default=256,
    show_default=True,
    help="Of the histogram measure.",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    help="Threads.  [default: one per CPU]",
)
stream_option = click.option(
    "--stream",
    is_flag=True,
    help="Read the weights from their server and store nothing.",
)
adapter_option = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="DIR",
    help="Merge a LoRA adapter (PEFT), a folder or a Hub id, into the weights first; "
    "several are merged in their order.",
)
llama_cpp_option = click.option(
    "--llama-cpp",
    type=PATH,
    metavar="DIR",
    help="Your own llama.cpp.  [EWQ_LLAMA_CPP]",
)
nonfinite_option = click.option(
    "--allow-nonfinite", is_flag=True, help="Count NaN and infinities, do not refuse."
)
lattice_option = click.option(
    "--no-lattice",
    is_flag=True,
    help="Plan matrices that are quantised already like any others.",
)
imatrix_option = click.option(
    "--imatrix",
    type=PATH,
    metavar="FILE",
    help="An importance matrix of the model, as llama-imatrix writes it.",
)
#: Options of one command's own output, and the model's adapters.
_OWN = {"out", "force", "quiet", "as_json", "dry_run", "adapters"}
#: What the converter is told beside the checkpoint's files.
CHOICES = ("chat_template", "pre", "mtp")
choice_options = all_of(
    [
        click.option(
            "--chat-template",
            type=PATH,
            metavar="FILE",
            help="A jinja chat template for the GGUF, in place of the model's.",
        ),
        click.option(
            "--pre",
            metavar="NAME",
            help="llama.cpp's pre-tokenizer, for a tokenizer its converter does not "
            "know.",
        ),
        click.option(
            "--mtp",
            type=click.Choice(["keep", "drop", "separate"]),
            default="keep",
            show_default=True,
            help="Heads that draft further tokens; separate is a file beside.",
        ),
    ]
)
mmproj_option = click.option(
    "--mmproj",
    type=click.Choice(
        ["auto", "none", "f16", "bf16", "f32", "q8_0"], case_sensitive=False
    ),
    default="auto",
    show_default=True,
    help="The file for images and sounds beside the text model; auto is the "
    "checkpoint's own type.",
)
no_load_option = click.option(
    "--no-load", is_flag=True, help="Do not load the file and let it answer."
)


def explicit(names: Iterable[str]) -> list[str]:
    """Those of some options that were given on the command line, as they are typed."""
    context = click.get_current_context()
    return [
        f"--{name.replace('_', '-')}"
        for name in names
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]


def typed_options(command: click.Command, without: Collection[str] = ()) -> str:
    """The options that were given and another command takes too, for a shell.

    Args:
        command: the other command.
        without: names of parameters that are not repeated; what a command writes,
            forces or prints never is.
    """
    context, words = click.get_current_context(), list[str]()
    for param in command.params:
        name = str(param.name)
        is_given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if not is_given or name in {*without, *_OWN}:
            continue
        value = context.params[name]
        for each in value if isinstance(value, tuple) else (value,):
            words += [max(param.opts, key=len), *([] if each is True else [str(each)])]
    return "".join(f" {word}" for word in map(shlex.quote, words))


def options_of(values: dict[str, Any]) -> Options:
    """The run's Options from whichever of the shared options a command has."""
    threads = values.get("threads")
    return Options(
        **({"n_threads": threads} if threads else {}),
        llama_cpp=values.get("llama_cpp"),
        allow_nonfinite=values.get("allow_nonfinite", False),
        force=values.get("force", False),
        load=not values.get("no_load", False),
        is_streamed=values.get("stream", False),
        imatrix=values.get("imatrix"),
        calibration=values.get("calibration"),
        adapters=values.get("adapters", ()),
        scheduler=values.get("scheduler"),
        keep_lattice=not values.get("no_lattice", False),
        chat_template=values.get("chat_template"),
        pre=values.get("pre"),
        mtp=values.get("mtp", "keep"),
        mmproj=values.get("mmproj", "auto"),
    )


def show_record(
    record: R, view: Callable[[R], RenderableType], *, as_json: bool
) -> None:
    """Print a record on stdout: for people, or as it is."""
    if as_json:
        click.echo(record.to_json(), nl=False)
    else:
        Console(highlight=False).print(view(record))


def memory_text(use: MemoryUse) -> str:
    """A child's memory, and what it has on GPUs where a driver tells it."""
    on_gpu = "" if use.gpu_bytes is None else f" + {size_text(use.gpu_bytes)} on GPU"
    return f"{size_text(use.rss_bytes)}{on_gpu}"


def console() -> Console:
    """Where people read: stderr; colour only where it is a terminal."""
    return _Console(stderr=True, highlight=False)


class _Console(Console):
    """A console on stderr whose reader may leave: the work goes on."""

    def on_broken_pipe(self) -> None:
        """Say no more."""
        silence(sys.stderr)


class BarProgress:
    """The pipeline's progress: bars on a terminal, one line per stage elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        """Draw nothing yet."""
        if quiet or not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        self._quiet = quiet
        self._console = console()
        self._noted: set[str] = set()

    def note(self, text: str) -> None:
        """Say something once."""
        if text not in self._noted:
            self._noted.add(text)
            self._print(text)

    def _print(self, text: str) -> None:
        if not self._quiet:
            self._console.print(f"ewq: {text}", markup=False)

    @contextmanager
    def stage(
        self, name: str, total_bytes: int | None = None
    ) -> Iterator[Callable[[float], None]]:
        """Show how far a stage is."""
        with self._bar(name, total_bytes) as update:
            yield lambda share: update(share, "")

    @contextmanager
    def measure(self, name: str) -> Iterator[Callable[[float, MemoryUse], None]]:
        """Show how far a stage is, and the memory that its child has."""
        with self._bar(name, None) as update:
            yield lambda share, use: update(share, memory_text(use))

    @contextmanager
    def _bar(
        self, name: str, total_bytes: int | None
    ) -> Iterator[Callable[[float, str], None]]:
        if self._quiet or not sys.stderr.isatty():
            self._print(name)
            yield lambda share, detail: None
            return
        columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
        if total_bytes:
            columns += [DownloadColumn(), TransferSpeedColumn()]
        else:
            columns += [TaskProgressColumn(), TimeElapsedColumn()]
        columns += [TimeRemainingColumn(), TextColumn("{task.fields[detail]}")]
        with Progress(*columns, console=self._console) as progress:
            task: TaskID = progress.add_task(name, total=None, detail="")

            def update(share: float, detail: str) -> None:
                total = total_bytes or 100
                progress.update(
                    task, completed=share * total, total=total, detail=detail
                )

            yield update

"""The options that commands share, and how a record is printed."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from rich.console import Console, RenderableType

from ewq_gguf.api import Options
from ewq_gguf.cli.progress import BarProgress
from ewq_gguf.cli.sections import Decorator, collected, option
from ewq_gguf.records import Record

R = TypeVar("R", bound=Record)

PATH = click.Path(path_type=Path)
_CONVERSION = "Conversion of the checkpoint"


def out_option(what: str, **kwargs: Any) -> Decorator:
    """`-o`: where the command writes what it makes."""
    text = f"Where to write {what}"
    return click.option("-o", "--out", type=PATH, help=text, **kwargs)


force_option = click.option(
    "--force", is_flag=True, help="Replace outputs made from other inputs."
)
quiet_option = click.option(
    "-q", "--quiet", is_flag=True, help="Show no progress and no notes."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."
)
threads_option = click.option(
    "--threads",
    "n_threads",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Threads to compute with.  [default: one per CPU]",
)


def _negated(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    return not value


#: Fields of Options, each with the option of the command line that sets it.
_RUN_OPTIONS: dict[str, Decorator] = {
    "adapters": option(
        "--adapter",
        "adapters",
        multiple=True,
        default=(),
        show_default=False,
        metavar="DIR",
        help="LoRA adapter (PEFT) to merge into the weights first, a folder or a Hub "
        "id; repeat to merge several in order.",
    ),
    "imatrix": option(
        "--imatrix",
        type=PATH,
        metavar="FILE",
        help="Importance matrix of the model, as llama-imatrix writes it.",
    ),
    "calibration": option(
        "--calibration",
        section="Options of --policy optimal",
        type=PATH,
        metavar="FILE",
        help="Text to compute an importance matrix on where none is given.  [default: "
        "written by the model]",
    ),
    "keep_lattice": option(
        "--no-lattice",
        "keep_lattice",
        section=_CONVERSION,
        is_flag=True,
        callback=_negated,
        help="Plan matrices that the checkpoint holds quantised like any others.",
    ),
    "mmproj": option(
        "--mmproj",
        section=_CONVERSION,
        type=click.Choice(
            ["auto", "none", "f16", "bf16", "f32", "q8_0"], case_sensitive=False
        ),
        default="auto",
        help="Type of the mmproj file (images, sound); auto is the checkpoint's own.",
    ),
    "chat_template": option(
        "--chat-template",
        section=_CONVERSION,
        type=PATH,
        metavar="FILE",
        help="Jinja chat template for the GGUF, in place of the model's.",
    ),
    "pre": option(
        "--pre",
        section=_CONVERSION,
        metavar="NAME",
        help="llama.cpp's pre-tokenizer, for a tokenizer its converter does not know.",
    ),
    "mtp": option(
        "--mtp",
        section=_CONVERSION,
        type=click.Choice(["keep", "drop", "separate"]),
        default="keep",
        help="Keep, drop or write to a file of their own the heads for multi-token "
        "prediction.",
    ),
    "is_streamed": option(
        "--stream",
        "is_streamed",
        is_flag=True,
        help="Read the weights from the Hub without storing them.",
    ),
    "scheduler": option(
        "--scheduler",
        metavar="ADDRESS",
        help="Scan on the Dask cluster at tcp://HOST:PORT or tls://HOST:PORT; plain "
        "tcp is neither encrypted nor authenticated: for trusted networks only.",
    ),
    "n_threads": threads_option,
    "allow_nonfinite": option(
        "--allow-nonfinite",
        section=_CONVERSION,
        is_flag=True,
        help="Count NaN and infinite weights instead of refusing them.",
    ),
    "llama_cpp": option(
        "--llama-cpp",
        type=PATH,
        metavar="DIR",
        help="Your own build of llama.cpp.  [default: EWQ_LLAMA_CPP, else ewq's]",
    ),
    "load": option(
        "--no-load",
        "load",
        is_flag=True,
        callback=_negated,
        help="Skip the test that loads the finished file and generates text.",
    ),
    "force": force_option,
}
#: Options of one command's own output, and the model's adapters.
_OWN = {"out", "force", "quiet", "as_json", "dry_run", "adapters"}
#: Fields of Options that tell the converter what the checkpoint's files do not.
CHOICES = ("chat_template", "pre", "mtp")


def run_options(*names: str) -> Decorator:
    """The options of a run: the command takes `options` and `progress`.

    Args:
        names: Fields of Options that the command can set.
    """

    def arguments(values: dict[str, Any]) -> dict[str, Any]:
        progress = BarProgress(quiet=values.pop("quiet"))
        given = {name: values.pop(name) for name in names}
        options = Options(**{n: v for n, v in given.items() if v is not None})
        return {**values, "options": options, "progress": progress}

    return collected([*(_RUN_OPTIONS[name] for name in names), quiet_option], arguments)


def flag_of(name: str) -> str:
    """The option that sets a field named like it: `--chat-template`."""
    return f"--{name.replace('_', '-')}"


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
        if (
            not isinstance(param, click.Option)
            or not is_given
            or name in {*without, *_OWN}
        ):
            continue
        flag, value = max(param.opts, key=len), context.params[name]
        if param.is_flag:
            words.append(flag)
            continue
        for text in _texts(value, is_repeated=param.multiple):
            words += [flag, text]
    return "".join(f" {word}" for word in map(shlex.quote, words))


def _texts(value: Any, *, is_repeated: bool) -> list[str]:
    """The value of an option as it is typed, several of one that repeats."""
    if isinstance(value, dict):
        return [f"{role}={name}".removeprefix("*=") for role, name in value.items()]
    if isinstance(value, tuple):
        return [*map(str, value)] if is_repeated else [",".join(value)]
    return [str(value)]


def show_record(
    record: R, view: Callable[[R], RenderableType], *, as_json: bool
) -> None:
    """Print a record on stdout: for people, or as it is."""
    if as_json:
        click.echo(record.to_json(), nl=False)
    else:
        Console(highlight=False).print(view(record))

"""`ewq toolchain`: build llama.cpp, and say which one is used."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ewq_gguf.llamacpp.build import BACKENDS, STAGE
from ewq_gguf.llamacpp.tested_build import build_toolchain
from ewq_gguf.llamacpp.toolchain import Toolchain, find_toolchain, test_toolchain

_NINJA_STEP = re.compile(r"\[(\d+)/(\d+)\] ")
_PERCENT_BETWEEN_LINES = 10


def backend_option(
    *, default: str | None, note: str = ""
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`--backend`; `note` says what holds without it where there is no default."""
    return click.option(
        "--backend",
        type=click.Choice(BACKENDS),
        default=default,
        show_default=default is not None,
        help=f"Backend to build llama.cpp with, besides the CPU's.{note}",
    )


jobs_option = click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Compilers to run at once.  [default: one per CPU]",
)


@click.group()
def toolchain() -> None:
    """Build or test llama.cpp at the pinned commit, or say which build is used."""


@toolchain.command()
@backend_option(default="cpu")
@jobs_option
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def build(backend: str, jobs: int | None, quiet: bool) -> None:
    """Build llama.cpp once, and test it: a build counts when it computes.

    A build that is there and has passed is used at once. Prints its folder.
    """
    with BuildProgress(quiet=quiet) as progress:
        built = build_toolchain(backend, jobs=jobs, on_line=progress.take)
    click.echo(built.bin_dir.parent)


@toolchain.command()
def test() -> None:
    """Test the build again: tiny models, on every device, against numpy.

    Exit code 0 means that all numbers are right, 4 that some are not or that it
    crashed.
    """
    click.echo(f"self-test {test_toolchain()}")


@toolchain.command()
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."
)
@click.option(
    "--llama-cpp",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Your own build of llama.cpp.  [default: EWQ_LLAMA_CPP, else ewq's]",
)
def info(as_json: bool, llama_cpp: Path | None) -> None:
    """Say which llama.cpp is used."""
    found = find_toolchain(llama_cpp)
    facts = _facts(found)
    if as_json:
        click.echo(json.dumps(facts, indent=2, sort_keys=True))
        return
    facts["self_test"] = str(found.self_test or "not run")
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        lines = value if isinstance(value, list) else [value]
        for line in lines or ["none"]:
            click.echo(f"{name:<{width}}  {'none' if line is None else line}")
            name = ""


def _facts(found: Toolchain) -> dict[str, object]:
    tested = found.self_test
    return {
        "commit": found.commit,
        "backend": found.backend,
        "source_dir": str(found.source_dir),
        "bin_dir": str(found.bin_dir),
        "lib_dir": None if found.lib_dir is None else str(found.lib_dir),
        "flags": list(found.flags),
        "repair": found.repair,
        "self_test": None if tested is None else tested.to_record(),
    }


class BuildProgress:
    """Ninja's steps on stderr: a bar on a terminal, else a line every tenth."""

    def __init__(self, *, quiet: bool) -> None:
        """Nothing is shown until the first line comes."""
        self._quiet = quiet
        self._next_percent = 0
        self._bar: Progress | None = None
        if not quiet and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("building llama.cpp"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("build", total=None, visible=False)

    def __enter__(self) -> BuildProgress:
        """Start the bar, where there is one."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the bar down, so that an error starts on a line of its own."""
        if self._bar is not None:
            self._bar.stop()

    def take(self, line: str) -> None:
        """Show a line: ours as it is, Ninja's as progress, others not at all."""
        if self._quiet:
            return
        if line.startswith(f"{STAGE}: "):
            self._say(line)
        elif step := _NINJA_STEP.match(line):
            self._advance(int(step.group(1)), int(step.group(2)))

    def _advance(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, visible=True)
            return
        percent = 100 * done // total
        if percent >= self._next_percent:
            self._say(f"{STAGE}: {percent:3} % ({done} of {total} steps)")
            self._next_percent = percent - percent % _PERCENT_BETWEEN_LINES + 10

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            click.echo(line, err=True)

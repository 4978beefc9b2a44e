"""`ewq doctor`: what is wrong with this installation, and what repairs it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict

import click

from ewq_gguf.doctor import Check, check_names, examine
from ewq_gguf.errors import ToolError, printable

_COLOURS = {"ok": "green", "warning": "yellow", "failure": "red"}
_WIDTH = max(map(len, _COLOURS))


@click.command()
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."
)
def doctor(as_json: bool) -> None:
    """Check what commands need: packages, llama.cpp, devices, disks, the Hub.

    Each line is ok, a warning (something is slow, or will fail in some cases) or a
    failure, with the command that repairs it. Exit code 4 if there is a failure.
    """
    checks = list(examine() if as_json else _printed(examine()))
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks], indent=2))
    failures = [check.name for check in checks if check.status == "failure"]
    if failures:
        raise ToolError(
            "doctor",
            ", ".join(failures),
            f"{len(failures)} of {len(checks)} checks failed",
            "follow the lines beside them, the first one first",
        )


def _printed(checks: Iterable[Check]) -> Iterator[Check]:
    """Print each as it comes; some take seconds."""
    width = max(map(len, check_names()))
    for check in checks:
        status = click.style(f"{check.status:<{_WIDTH}}", fg=_COLOURS[check.status])
        click.echo(f"{status}  {check.name:<{width}}  {printable(check.found, 2000)}")
        if check.remedy:
            click.echo(f"{'':{_WIDTH + width + 4}}{printable(check.remedy, 2000)}")
        yield check

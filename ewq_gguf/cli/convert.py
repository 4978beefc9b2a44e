"""`ewq convert`: the base GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ewq_gguf import api
from ewq_gguf.cli.common import (
    BarProgress,
    adapter_option,
    choice_options,
    force_option,
    llama_cpp_option,
    mmproj_option,
    no_load_option,
    options_of,
    out_option,
    quiet_option,
)
from ewq_gguf.report.companion_view import companion_line


@click.command()
@click.argument("model")
@adapter_option
@out_option("the GGUF.  [default: NAME-TYPE.gguf]")
@click.option(
    "--outtype",
    type=click.Choice(["auto", "f16", "bf16", "f32"], case_sensitive=False),
    default="auto",
    show_default=True,
    help="auto is the checkpoint's own type.",
)
@mmproj_option
@choice_options
@llama_cpp_option
@no_load_option
@click.option("--dry-run", is_flag=True, help="Print the command, run nothing.")
@force_option
@quiet_option
def convert(
    model: str, out: Path | None, outtype: str, dry_run: bool, **values: Any
) -> None:
    """Write the 16- or 32-bit base GGUF of MODEL; prints its path.

    A model that reads images or hears sounds gets its mmproj beside it.
    """
    progress = BarProgress(quiet=values["quiet"])
    run = api.Run(model, options_of(values), progress)
    if dry_run:
        click.echo("\n".join(api.convert_commands(run, out, outtype)))
        return
    out, companions = api.convert_model(run, out, outtype)
    for each in companions:
        progress.note(companion_line(each.path, each.found))
    click.echo(out)

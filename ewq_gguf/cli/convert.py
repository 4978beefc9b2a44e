"""`ewq convert`: the base GGUF."""

from __future__ import annotations

from pathlib import Path

import click

from ewq_gguf import api
from ewq_gguf.cli.common import CHOICES, out_option, run_options
from ewq_gguf.cli.progress import BarProgress
from ewq_gguf.cli.sections import option
from ewq_gguf.report.companion_view import companion_line


@click.command()
@click.argument("model")
@out_option("the GGUF.  [default: NAME-TYPE.gguf]")
@option(
    "--outtype",
    type=click.Choice(["auto", "f16", "bf16", "f32"], case_sensitive=False),
    default="auto",
    help="Type of the base GGUF; auto is the checkpoint's own.",
)
@click.option("--dry-run", is_flag=True, help="Print the command without running it.")
@run_options("adapters", "mmproj", *CHOICES, "llama_cpp", "load", "force")
def convert(
    model: str,
    out: Path | None,
    outtype: str,
    dry_run: bool,
    options: api.Options,
    progress: BarProgress,
) -> None:
    """Write the 16- or 32-bit base GGUF of MODEL; prints its path.

    A model that reads images or hears sounds gets its mmproj beside it.
    """
    run = api.Run(model, options, progress)
    if dry_run:
        click.echo("\n".join(api.convert_commands(run, out, outtype)))
        return
    out, companions = api.convert_model(run, out, outtype)
    for each in companions:
        progress.note(companion_line(each.path, each.companion))
    click.echo(out)

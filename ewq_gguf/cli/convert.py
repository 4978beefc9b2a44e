"""`ewq convert`: the base GGUF."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from ewq_gguf import api, store
from ewq_gguf.cli.common import (
    BarProgress,
    adapter_option,
    choice_options,
    chosen_options,
    force_option,
    llama_cpp_option,
    mmproj_option,
    no_load_option,
    options_of,
    out_option,
    quiet_option,
)
from ewq_gguf.llamacpp.convert import base_type, convert_argv
from ewq_gguf.llamacpp.converter import content_flags
from ewq_gguf.llamacpp.convertible import check_is_no_gguf
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
    options = options_of(values)
    run = api.Run(model, options, progress)
    toolchain, checkpoint = run.toolchain, run.checkpoint
    check_is_no_gguf(checkpoint)
    ggml_type = base_type(checkpoint) if outtype == "auto" else outtype.upper()
    name = checkpoint.identity.name
    out = out or Path(f"{name}-{ggml_type}.gguf")
    if dry_run:
        flags = content_flags(checkpoint, "text")
        argv = convert_argv(toolchain, checkpoint.folder, name, ggml_type, out, flags)
        for option in chosen_options(options, ("chat_template", "pre")):
            click.echo(f"# the converter has no option for {option}")
        click.echo(shlex.join(["python3", *argv]))
        for content in api.companion_contents(run):
            click.echo(f"# and again with --{content} for what goes beside it")
        return
    store.check_writable(out, "convert")
    if not checkpoint.is_mapped_by_name:  # whether it is whole, before the long work
        _ = run.layout
    api.check_base(run, ggml_type)
    if out.exists() and not values["force"]:
        raise store.already_exists(out, "convert")
    for each in api.convert_model(run, out, ggml_type):
        progress.note(companion_line(each.path, each.found))
    click.echo(out)

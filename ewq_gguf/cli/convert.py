"""`ewq convert`: the base GGUF."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from ewq_gguf import pipeline, store
from ewq_gguf.cli.common import (
    BarProgress,
    adapter_option,
    force_option,
    llama_cpp_option,
    options_of,
    out_option,
    quiet_option,
)
from ewq_gguf.llamacpp.convert import base_type, check_is_no_gguf, convert_argv
from ewq_gguf.llamacpp.convert import convert as convert_checkpoint
from ewq_gguf.llamacpp.toolchain import find_toolchain
from ewq_gguf.pipeline.overflow import check_base


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
@llama_cpp_option
@click.option("--dry-run", is_flag=True, help="Print the command, run nothing.")
@force_option
@quiet_option
def convert(
    model: str, out: Path | None, outtype: str, dry_run: bool, **values: Any
) -> None:
    """Write the 16- or 32-bit base GGUF of MODEL; prints its path."""
    progress = BarProgress(quiet=values["quiet"])
    toolchain = find_toolchain(values["llama_cpp"])
    checkpoint = pipeline.open_model(
        model, options=options_of(values), progress=progress
    )
    check_is_no_gguf(checkpoint)
    kind = base_type(checkpoint) if outtype == "auto" else outtype.upper()
    name = checkpoint.identity.name
    out = out or Path(f"{name}-{kind}.gguf")
    if dry_run:
        argv = convert_argv(toolchain, checkpoint.folder, name, kind, out)
        click.echo(shlex.join(["python3", *argv]))
        return
    store.check_writable(out, "convert")
    if not checkpoint.is_mapped_by_name:  # whether it is whole, before the long work
        pipeline.layout(checkpoint, toolchain, progress)
    check_base(checkpoint, toolchain, kind)
    if out.exists() and not values["force"]:
        raise store.already_exists(out, "convert")
    with store.locked(out, stage="convert"), progress.stage("convert") as share:
        warnings = convert_checkpoint(
            checkpoint, toolchain, out, outtype=kind, on_progress=share
        )
    for warning in warnings:
        progress.note(f"llama.cpp's converter: {warning}")
    click.echo(out)

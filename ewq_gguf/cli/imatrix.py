"""`ewq imatrix`: which activations are large, for quantising with care."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ewq_gguf import api, store
from ewq_gguf.cli.common import (
    PATH,
    BarProgress,
    adapter_option,
    choice_options,
    force_option,
    json_option,
    llama_cpp_option,
    options_of,
    quiet_option,
    threads_option,
)
from ewq_gguf.llamacpp.calibrate import STAGE


@click.command()
@click.argument("model")
@adapter_option
@click.option(
    "-o", "--out", type=PATH, required=True, help="Where to write the matrix, a GGUF."
)
@click.option(
    "--calibration",
    metavar="FILE|self",
    default="self",
    show_default=True,
    help="The text; `self` is one that the model writes.",
)
@click.option(
    "--chunks",
    type=click.IntRange(1),
    help="Windows of 512 tokens.  [default: all]",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of `self`."
)
@threads_option
@choice_options
@llama_cpp_option
@force_option
@quiet_option
@json_option
def imatrix(
    model: str,
    out: Path,
    calibration: str,
    chunks: int | None,
    seed: int,
    as_json: bool,
    **values: Any,
) -> None:
    """Weigh the columns of MODEL's matrices by what goes through them.

    llama-imatrix reads a text; without one the model writes its own, sampled at several
    temperatures from many beginnings, the same whenever it is asked. Prints the path.
    """
    options = options_of(values)
    progress = BarProgress(quiet=values["quiet"])
    store.check_writable(out, STAGE)
    text = None if calibration == "self" else Path(calibration)
    if text is not None:
        store.check_distinct(out, [text], STAGE)
    if out.exists() and not options.force:
        raise store.already_exists(out, STAGE)
    run = api.open_model(model, options=options, progress=progress)
    path, importance = api.make_imatrix(
        run, out, calibration=text, n_chunks=chunks, seed=seed
    )
    record = importance.record
    click.echo(record.model_dump_json(indent=1) if as_json else path)

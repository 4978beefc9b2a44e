"""`ewq imatrix`: which activations are large, for quantising with care."""

from __future__ import annotations

from pathlib import Path

import click

from ewq_gguf import api, store
from ewq_gguf.cli.common import CHOICES, json_option, out_option, run_options
from ewq_gguf.cli.progress import BarProgress
from ewq_gguf.cli.sections import option
from ewq_gguf.llamacpp.calibrate import STAGE


@click.command()
@click.argument("model")
@out_option("the importance matrix, a GGUF.", required=True)
@option(
    "--calibration",
    metavar="FILE|self",
    default="self",
    help="Text to run through the model; self: a text that the model writes.",
)
@option(
    "--chunks",
    type=click.IntRange(1),
    metavar="N",
    help="Windows of 512 tokens to read of the text.  [default: all]",
)
@option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Seed of the text that the model writes.",
)
@run_options("adapters", "n_threads", *CHOICES, "llama_cpp", "force")
@json_option
def imatrix(
    model: str,
    out: Path,
    calibration: str,
    chunks: int | None,
    seed: int,
    as_json: bool,
    options: api.Options,
    progress: BarProgress,
) -> None:
    """Compute an importance matrix of MODEL (llama-imatrix).

    llama-imatrix reads a text; without one the model writes its own, sampled at several
    temperatures from many beginnings, the same whenever it is asked. Prints the path.
    """
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

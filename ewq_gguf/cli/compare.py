"""`ewq compare`: plans beside presets, under the same conditions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ewq_gguf import api
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.cli.bench_options import bench_options, comma_list, request_of, with_data
from ewq_gguf.cli.common import (
    PATH,
    BarProgress,
    DefaultGroup,
    adapter_option,
    choice_options,
    force_option,
    imatrix_option,
    json_option,
    llama_cpp_option,
    nonfinite_option,
    options_of,
    out_option,
    quiet_option,
    show_record,
)
from ewq_gguf.cli.plan_words import HELP, parse_plans
from ewq_gguf.experiments.comparison import across_models
from ewq_gguf.experiments.comparison_record import Comparison
from ewq_gguf.experiments.comparison_view import across_view, comparison_view
from ewq_gguf.records import load_record


@click.group(cls=DefaultGroup, default="make")
def compare() -> None:
    """Compare plans with presets: made, measured alike, told apart or not."""


@compare.command(name="make", hidden=True)
@click.argument("model")
@adapter_option
@click.option(
    "--plans",
    multiple=True,
    default=("ewq",),
    show_default=True,
    metavar="LIST",
    help=HELP,
)
@click.option(
    "--presets",
    multiple=True,
    metavar="LIST",
    help="Such as Q4_K_M,Q8_0. The presets between which a plan's size lies, or the "
    "one of its size, and the base are always there.",
)
@imatrix_option
@out_option("files, plans, results and comparison.json.  [default: compare/NAME]")
@click.option(
    "--keep-files/--delete-files",
    default=True,
    show_default=True,
    help="Whether the GGUF files stay when all is measured.",
)
@bench_options
@nonfinite_option
@choice_options
@llama_cpp_option
@force_option
@quiet_option
@json_option
def make(
    model: str,
    plans: tuple[str, ...],
    presets: tuple[str, ...],
    out: Path | None,
    keep_files: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Compare plans of MODEL with presets of the same size.

    Makes what is missing, measures all files under the same conditions (speeds in
    turns), and says what can and cannot be told apart. A run that was killed goes on
    where it was.
    """
    # The model stands for its base, which is made later.
    request = with_data(request_of({**values, "base": Path(model)}), values)
    wanted = api.ComparisonSpec(
        plans=parse_plans(plans),
        presets=tuple(
            dict.fromkeys(name.upper() for text in presets for name in comma_list(text))
        ),
        request=request,
        keep_files=keep_files,
    )
    progress = BarProgress(quiet=values["quiet"])
    run = api.Run(model, options_of(values), progress)
    found, path = api.compare(run, wanted, out)
    progress.note(f"wrote {path}")
    show_record(found, comparison_view, as_json=as_json)


@compare.command()
@click.argument("files", type=PATH, metavar="FILE...", nargs=-1, required=True)
@json_option
def show(files: tuple[Path, ...], as_json: bool) -> None:
    """Print a comparison; of several, paired tests over their models."""
    records = [load_record(Comparison, file, STAGE) for file in files]
    if len(records) == 1:
        show_record(records[0], comparison_view, as_json=as_json)
        return
    pairs = across_models(records)
    if as_json:
        dumped = [pair.model_dump(mode="json") for pair in pairs]
        click.echo(json.dumps(dumped, indent=1, sort_keys=True))
    else:
        Console(highlight=False).print(across_view(pairs))

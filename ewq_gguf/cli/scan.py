"""`ewq scan`: measure a checkpoint, show and compare."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from ewq_gguf import api, store
from ewq_gguf.checkpoint.dask_scan import check_scheduler
from ewq_gguf.checkpoint.scan import merge_scans
from ewq_gguf.cli.common import (
    CHOICES,
    PATH,
    force_option,
    json_option,
    out_option,
    run_options,
    show_record,
)
from ewq_gguf.cli.policy import measure_options
from ewq_gguf.cli.progress import BarProgress
from ewq_gguf.cli.sections import DefaultGroup, option
from ewq_gguf.records import Measures, Scan, load_record
from ewq_gguf.report.scan_view import diff_values, diff_view, scan_view


def _part(text: str | None) -> tuple[int, int] | None:
    """`2/8` as (2, 8).

    Raises:
        click.BadParameter: it is something else.
    """
    if text is None:
        return None
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 0 < int(index) <= int(count)):
        raise click.BadParameter(f"{text} is not a part such as 2/8")
    return int(index), int(count)


@click.group(cls=DefaultGroup, default="make")
def scan() -> None:
    """Measure the entropy of every tensor of a checkpoint."""


@scan.command(name="make", hidden=True)
@click.argument("model")
@out_option("the scan.  [default: plans/NAME.scan.json]")
@measure_options
@option(
    "--part",
    callback=lambda ctx, param, value: _part(value),
    metavar="I/N",
    help="Scan only the I-th of N parts of about the same bytes; `ewq scan merge` "
    "joins them.",
)
@run_options(
    "adapters", "scheduler", "is_streamed", "n_threads", "allow_nonfinite", *CHOICES,
    "llama_cpp", "force",
)  # fmt: skip
@json_option
def make(
    model: str,
    out: Path | None,
    measures: Measures,
    part: tuple[int, int] | None,
    as_json: bool,
    options: api.Options,
    progress: BarProgress,
) -> None:
    """Measure the entropy of every tensor of MODEL, by both measures.

    One pass over the weights; prints the scan's path.
    """
    if out is not None:
        store.check_writable(out, "scan")
    if options.scheduler:
        check_scheduler(options.scheduler)
    run = api.open_model(model, options=options, progress=progress)
    result = api.scan(run, measures, part=part)
    tag = f".{part[0]}-of-{part[1]}" if part else ""
    out = out or Path("plans") / f"{run.identity.name}{tag}.scan.json"
    store.write_text(out, result.to_json(), stage="scan", force=options.force)
    click.echo(result.to_json() if as_json else out, nl=not as_json)


@scan.command()
@click.argument("paths", type=PATH, metavar="PART...", nargs=-1, required=True)
@out_option("the scan.  [default: plans/NAME.scan.json]")
@force_option
def merge(paths: tuple[Path, ...], out: Path | None, force: bool) -> None:
    """Join the parts of a scan; the result is that of a scan in one go."""
    whole = merge_scans([load_record(Scan, path, "scan") for path in paths])
    out = out or Path("plans") / f"{whole.model.name}.scan.json"
    store.write_text(out, whole.to_json(), stage="scan", force=force)
    click.echo(out)


@scan.command()
@click.argument("path", type=PATH, metavar="SCAN")
@json_option
def show(path: Path, as_json: bool) -> None:
    """Print a scan's layers with small bars."""
    record = load_record(Scan, path, "scan")
    show_record(record, scan_view, as_json=as_json)


@scan.command()
@click.argument("one", type=PATH, metavar="A")
@click.argument("two", type=PATH, metavar="B")
@json_option
def diff(one: Path, two: Path, as_json: bool) -> None:
    """Compare two scans: base and fine-tune, one revision and another."""
    first, second = (load_record(Scan, path, "scan") for path in (one, two))
    if as_json:
        click.echo(json.dumps(diff_values(first, second), indent=1, sort_keys=True))
        return
    Console(highlight=False).print(diff_view(first, second))

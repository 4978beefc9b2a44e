"""`ewq quantize`: the mixed GGUF from a plan and its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ewq_gguf import api
from ewq_gguf.cli.common import (
    PATH,
    BarProgress,
    force_option,
    imatrix_option,
    json_option,
    llama_cpp_option,
    no_load_option,
    options_of,
    quiet_option,
    threads_option,
)
from ewq_gguf.records import Plan, load_record
from ewq_gguf.report.made_view import exact_lines


@click.command()
@click.argument("plan_path", type=PATH, metavar="PLAN")
@click.argument("base", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="Where to write the GGUF.")
@imatrix_option
@llama_cpp_option
@threads_option
@no_load_option
@click.option("--dry-run", is_flag=True, help="Print the command, run nothing.")
@force_option
@quiet_option
@json_option
def quantize(
    plan_path: Path,
    base: Path,
    out: Path,
    dry_run: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Write the GGUF of PLAN from BASE, and verify it; prints its path."""
    progress = BarProgress(quiet=values["quiet"])
    run = api.Run(str(base), options_of(values), progress)
    plan = load_record(Plan, plan_path, "quantize")
    api.check_given(run, plan)
    if dry_run:
        paths = (str(plan_path), str(base), str(out))
        click.echo("\n".join(api.quantize_commands(run, plan, *paths)))
        return
    verification, is_reused = api.planned_file(run, plan, out, base=base)
    if is_reused:
        progress.note(f"{out} was there already, still valid")
    for line in exact_lines(verification):
        progress.note(line)
    click.echo(verification.to_json() if as_json else out, nl=not as_json)

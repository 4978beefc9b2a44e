"""`ewq quantize`: the mixed GGUF from a plan and its base."""

from __future__ import annotations

from pathlib import Path

import click

from ewq_gguf import api
from ewq_gguf.cli.common import PATH, json_option, out_option, run_options
from ewq_gguf.cli.progress import BarProgress
from ewq_gguf.records import Plan, load_record
from ewq_gguf.report.made_view import exact_lines


@click.command()
@click.argument("plan_path", type=PATH, metavar="PLAN")
@click.argument("base", type=PATH)
@out_option("the GGUF.", required=True)
@click.option("--dry-run", is_flag=True, help="Print the command without running it.")
@run_options("imatrix", "llama_cpp", "n_threads", "load", "force")
@json_option
def quantize(
    plan_path: Path,
    base: Path,
    out: Path,
    dry_run: bool,
    as_json: bool,
    options: api.Options,
    progress: BarProgress,
) -> None:
    """Write the GGUF of PLAN from BASE, and verify it; prints its path."""
    run = api.Run(str(base), options, progress)
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

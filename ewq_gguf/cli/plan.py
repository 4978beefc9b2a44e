"""`ewq plan`: decide, show and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ewq_gguf import pipeline, store
from ewq_gguf.cli.common import (
    PATH,
    BarProgress,
    DefaultGroup,
    force_option,
    json_option,
    llama_cpp_option,
    nonfinite_option,
    options_of,
    out_option,
    quiet_option,
    show_record,
    stream_option,
    threads_option,
)
from ewq_gguf.cli.policy import ask_of, policy_of, policy_options, raw_type_of
from ewq_gguf.llamacpp.quantize import export_sh, tensor_types
from ewq_gguf.records import Plan, Scan, load_record
from ewq_gguf.report.plan_view import plan_view


@click.group(cls=DefaultGroup, default="make")
def plan() -> None:
    """Decide each tensor's type and predict the file's bytes."""


@plan.command(name="make", hidden=True)
@click.argument("source", metavar="MODEL|SCAN")
@policy_options
@out_option("the plan.  [default: plans/NAME.POLICY.json]")
@stream_option
@threads_option
@nonfinite_option
@llama_cpp_option
@force_option
@quiet_option
@json_option
def make(source: str, out: Path | None, as_json: bool, **values: Any) -> None:
    """Decide each tensor's type and predict the file's bytes.

    The prediction is exact where the checkpoint and the toolchain are at hand, and
    marked as an estimate elsewhere. Prints the plan's path.
    """
    policy, ask = policy_of(values), ask_of(values)
    progress = BarProgress(quiet=values["quiet"])
    if out is not None:
        store.check_writable(out, "plan")
    result = pipeline.plan(
        load_record(Scan, Path(source), "plan")
        if source.endswith(".json")
        else pipeline.open_model(source, options=options_of(values), progress=progress),
        policy,
        raw_type=raw_type_of(values),
        budget=ask,
        options=options_of(values),
        progress=progress,
    )
    out = out or pipeline.plan_file(result)
    store.write_text(out, result.to_json(), stage="plan", force=values["force"])
    click.echo(result.to_json() if as_json else out, nl=not as_json)


@plan.command()
@click.argument("plan_path", type=PATH, metavar="PLAN")
@json_option
def show(plan_path: Path, as_json: bool) -> None:
    """Print a plan as a table and a layer x role map."""
    record = load_record(Plan, plan_path, "plan")
    show_record(record, plan_view, as_json=as_json)


@plan.command()
@click.argument("plan_path", type=PATH, metavar="PLAN")
@click.option(
    "--format",
    "form",
    type=click.Choice(["sh", "tensor-types"]),
    default="sh",
    show_default=True,
    help="A script to run by hand, or the lines of --tensor-type-file.",
)
@out_option("it.  [default: stdout]")
@force_option
def export(plan_path: Path, form: str, out: Path | None, force: bool) -> None:
    """Write a plan in a form that llama.cpp takes."""
    record = load_record(Plan, plan_path, "plan")
    text = export_sh(record) if form == "sh" else tensor_types(record)
    if out is None:
        click.echo(text, nl=False)
        return
    store.write_text(out, text, stage="plan", force=force)
    click.echo(out)

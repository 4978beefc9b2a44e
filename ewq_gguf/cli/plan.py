"""`ewq plan`: decide, show and export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ewq_gguf import pipeline, store
from ewq_gguf.checkpoint.folder import Checkpoint
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
from ewq_gguf.cli.policy import (
    ask_of,
    ewq_policy_of,
    factors_of,
    policy_of,
    policy_options,
    raw_type_of,
    rule_options,
)
from ewq_gguf.llamacpp.quantize import export_sh, tensor_types
from ewq_gguf.plan.build import make_plan
from ewq_gguf.records import FastEwqPolicy, Plan, Scan, load_record
from ewq_gguf.report.plan_view import plan_view
from ewq_gguf.report.sweep_view import sweep_rows, sweep_view


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
    options = options_of(values)
    if isinstance(policy, FastEwqPolicy):  # headers are all it reads
        options = replace(options, is_streamed=True)
    result = pipeline.plan(
        _source(source, options, progress),
        policy,
        raw_type=raw_type_of(values),
        budget=ask,
        options=options,
        progress=progress,
    )
    out = out or pipeline.plan_file(result)
    store.write_text(out, result.to_json(), stage="plan", force=values["force"])
    click.echo(result.to_json() if as_json else out, nl=not as_json)


@plan.command()
@click.argument("source", metavar="MODEL|SCAN")
@click.option(
    "--factors",
    default="0.3:1.5:0.05",
    show_default=True,
    metavar="FROM:TO:STEP",
    help="Values of X, the last one included; or a list with commas.",
)
@rule_options
@stream_option
@threads_option
@nonfinite_option
@llama_cpp_option
@quiet_option
@json_option
def sweep(source: str, factors: str, as_json: bool, **values: Any) -> None:
    """Plan with one factor after another: layers of each type, size and bits."""
    policies = [
        ewq_policy_of({**values, "factor": factor}) for factor in factors_of(factors)
    ]
    progress = BarProgress(quiet=values["quiet"])
    options = options_of(values)
    measured, layout = pipeline.measured(
        _source(source, options, progress),
        policies[0],
        options=options,
        progress=progress,
    )
    plans = [
        make_plan(measured, policy, layout, raw_type=raw_type_of(values))
        for policy in policies
    ]
    if as_json:
        click.echo(json.dumps(sweep_rows(plans), indent=1, sort_keys=True))
    else:
        presets = layout.preset_bytes if layout else {}
        Console(highlight=False).print(sweep_view(plans, presets))


@plan.command()
@click.argument("plan_path", type=PATH, metavar="PLAN")
@json_option
def show(plan_path: Path, as_json: bool) -> None:
    """Print a plan as a table and a layer x role map."""
    record = load_record(Plan, plan_path, "plan")
    show_record(record, plan_view, as_json=as_json)


def _source(
    source: str, options: pipeline.Options, progress: BarProgress
) -> Checkpoint | Scan:
    """A scan's file, or a model."""
    if source.endswith(".json"):
        return load_record(Scan, Path(source), "plan")
    return pipeline.open_model(source, options=options, progress=progress)


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

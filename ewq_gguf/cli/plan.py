"""`ewq plan`: decide, show and export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ewq_gguf import api, store
from ewq_gguf.cli.common import (
    CHOICES,
    PATH,
    BarProgress,
    DefaultGroup,
    adapter_option,
    choice_options,
    explicit,
    force_option,
    imatrix_option,
    json_option,
    lattice_option,
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
    raw_type_option,
    rule_options,
)
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.llamacpp.export_script import export_sh
from ewq_gguf.llamacpp.quantize import tensor_types
from ewq_gguf.plan.build import make_plan
from ewq_gguf.plan.check import check_sound
from ewq_gguf.records import FastEwqPolicy, Placement, Plan, Scan, load_record
from ewq_gguf.report.plan_csv import plan_csv
from ewq_gguf.report.plan_diff_view import plan_diff_values, plan_diff_view
from ewq_gguf.report.plan_view import plan_view
from ewq_gguf.report.sweep_view import sweep_rows, sweep_view
from ewq_gguf.rpc.commands import rpc_commands

#: A file of another name is a scan.
_WEIGHT_FILES = (".safetensors", ".gguf")
_FORMATS: dict[str, Callable[[Plan], str]] = {
    "sh": export_sh,
    "tensor-type-file": tensor_types,
    "csv": plan_csv,
    "json": Plan.to_json,
}


@click.group(cls=DefaultGroup, default="make")
def plan() -> None:
    """Decide each tensor's type and predict the file's bytes."""


@plan.command(name="make", hidden=True)
@click.argument("source", metavar="MODEL|SCAN")
@adapter_option
@policy_options
@imatrix_option
@lattice_option
@out_option("the plan.  [default: plans/NAME.POLICY.json]")
@stream_option
@threads_option
@nonfinite_option
@choice_options
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
    reads_weights = not isinstance(policy, FastEwqPolicy)
    run = _run(source, options_of(values), progress, reads_weights=reads_weights)
    result = api.plan(run, policy, raw_type=raw_type_of(values), budget=ask)
    _written(result, out, force=values["force"], as_json=as_json)


@plan.command(name="import")
@click.argument("file", type=PATH)
@click.argument("source", metavar="MODEL|SCAN")
@adapter_option
@raw_type_option
@out_option("the plan.  [default: plans/NAME.imported-HASH.json]")
@stream_option
@choice_options
@llama_cpp_option
@force_option
@quiet_option
@json_option
def import_(
    file: Path, source: str, out: Path | None, as_json: bool, **values: Any
) -> None:
    """Plan the types of FILE for MODEL; no weight is read.

    FILE is a quant_plan_*.json of the EWQ proof of concept, by layer or by tensor, or
    any GGUF of the same model. Prints the plan's path.
    """
    progress = BarProgress(quiet=values["quiet"])
    if out is not None:
        store.check_writable(out, "plan")
    run = _run(source, options_of(values), progress, reads_weights=False)
    result = api.import_plan(run, file, raw_type=raw_type_of(values))
    _written(result, out, force=values["force"], as_json=as_json)


def _written(made: Plan, out: Path | None, *, force: bool, as_json: bool) -> None:
    """Write a new plan and tell where."""
    out = out or api.plan_file(made)
    store.write_text(out, made.to_json(), stage="plan", force=force)
    click.echo(made.to_json() if as_json else out, nl=not as_json)


@plan.command()
@click.argument("source", metavar="MODEL|SCAN")
@adapter_option
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
@choice_options
@llama_cpp_option
@quiet_option
@json_option
def sweep(source: str, factors: str, as_json: bool, **values: Any) -> None:
    """Plan with one factor after another: layers of each type, size and bits."""
    policies = [
        ewq_policy_of({**values, "factor": factor}) for factor in factors_of(factors)
    ]
    progress = BarProgress(quiet=values["quiet"])
    run = _run(source, options_of(values), progress)
    measured, layout = api.measured(run, policies[0])
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
    check_sound(record)
    show_record(record, plan_view, as_json=as_json)


def _run(
    source: str,
    options: api.Options,
    progress: BarProgress,
    *,
    reads_weights: bool = True,
) -> api.Run:
    """The run of a model, or of a scan's file.

    Raises:
        UsageError: a scan is given with options that only a model takes.
    """
    path = Path(source)
    is_other_file = path.is_file() and path.suffix not in _WEIGHT_FILES
    if is_other_file or path.suffix == ".json":
        if options.adapters:
            problem = "is a scan of weights as they are"
            raise UsageError("plan", path, problem, "give MODEL with --adapter")
        if given := explicit(CHOICES):
            problem = "is a scan, which keeps the choices that it was made with"
            raise UsageError("plan", path, problem, f"give MODEL with {given[0]}")
        return api.Run(load_record(Scan, path, "plan"), options, progress)
    return api.open_model(
        source, reads_weights=reads_weights, options=options, progress=progress
    )


@plan.command()
@click.argument("one", type=PATH, metavar="A")
@click.argument("two", type=PATH, metavar="B")
@json_option
def diff(one: Path, two: Path, as_json: bool) -> None:
    """Compare two plans: which tensors change, and the bytes they gain or lose."""
    a, b = (load_record(Plan, path, "plan") for path in (one, two))
    for record in (a, b):
        check_sound(record)
    if as_json:
        click.echo(json.dumps(plan_diff_values(a, b), indent=1, sort_keys=True))
        return
    Console(highlight=False).print(plan_diff_view(a, b))


@plan.command()
@click.argument("plan_path", type=PATH, metavar="PLAN")
@click.option(
    "--format",
    "form",
    type=click.Choice([*_FORMATS, "rpc"]),
    default="sh",
    show_default=True,
    help="A script to run by hand, the lines of --tensor-type-file, a table of the "
    "tensors, the plan itself, or the commands of a cluster's machines.",
)
@click.option(
    "--gguf", metavar="FILE", help="rpc: the file's name.  [default: NAME.gguf]"
)
@click.option(
    "--allow-public",
    is_flag=True,
    help="rpc: workers may have addresses that the internet reaches. Nobody who "
    "connects is asked who they are.",
)
@out_option("it.  [default: stdout]")
@force_option
def export(
    plan_path: Path,
    form: str,
    gguf: str | None,
    allow_public: bool,
    out: Path | None,
    force: bool,
) -> None:
    """Write a plan in a form that other programs take."""
    if form != "rpc" and (given := explicit(("gguf", "allow_public"))):
        raise click.BadParameter(f"{given[0]} goes with --format rpc")
    record = load_record(Plan, plan_path, "plan")
    check_sound(record)
    if form == "rpc":
        name = gguf or f"{record.model.name}.gguf"
        text = rpc_commands(name, _placement(record), allow_public=allow_public)
    else:
        text = _FORMATS[form](record)
    if out is None:
        click.echo(text, nl=False)
        return
    store.write_text(out, text, stage="plan", force=force)
    click.echo(out)


def _placement(plan: Plan) -> Placement:
    if plan.placement is None:
        raise InputError(
            "plan",
            plan.model.name,
            "is planned for no cluster",
            "plan it with --machine NAME=MEM for each machine",
        )
    return plan.placement

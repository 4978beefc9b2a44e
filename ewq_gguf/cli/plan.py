"""`ewq plan`: decide, show and export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console

from ewq_gguf import api, store
from ewq_gguf.cli.common import (
    CHOICES,
    PATH,
    flag_of,
    force_option,
    json_option,
    out_option,
    run_options,
    show_record,
)
from ewq_gguf.cli.policy import (
    PolicyOptions,
    factors_option,
    parameter_options,
    policy_options,
    raw_type_option,
)
from ewq_gguf.cli.progress import BarProgress
from ewq_gguf.cli.sections import (
    DefaultGroup,
    SectionedCommand,
    given_options,
    option,
)
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.llamacpp.export_script import export_sh
from ewq_gguf.llamacpp.quantize import tensor_types
from ewq_gguf.plan.build import make_plan
from ewq_gguf.plan.check import check_sound
from ewq_gguf.records import (
    EwqPolicy,
    FastEwqPolicy,
    Placement,
    Plan,
    Scan,
    load_record,
)
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
    """Choose each tensor's type and predict the file's size."""


@plan.command(name="make", hidden=True, cls=SectionedCommand)
@click.argument("source", metavar="MODEL|SCAN")
@out_option("the plan.  [default: plans/NAME.POLICY.json]")
@policy_options
@raw_type_option
@run_options(
    "adapters", "imatrix", "calibration", "keep_lattice", *CHOICES, "is_streamed",
    "n_threads", "allow_nonfinite", "llama_cpp", "force",
)  # fmt: skip
@json_option
def make(
    source: str,
    out: Path | None,
    policy: PolicyOptions,
    raw_type: str,
    as_json: bool,
    options: api.Options,
    progress: BarProgress,
) -> None:
    """Choose each tensor's type and predict the file's size.

    The prediction is exact where the checkpoint and the toolchain are at hand, and
    marked as an estimate elsewhere. Prints the plan's path.
    """
    budget = policy.budget.size_target(options)
    if out is not None:
        store.check_writable(out, "plan")
    reads_weights = not isinstance(policy.policy, FastEwqPolicy)
    run = _run(source, options, progress, reads_weights=reads_weights)
    api.check_replaceable(run, policy.policy, budget, out)
    result = api.plan(run, policy.policy, raw_type=raw_type, budget=budget)
    _written(result, out, force=options.force, as_json=as_json)


@plan.command(name="import")
@click.argument("file", type=PATH)
@click.argument("source", metavar="MODEL|SCAN")
@raw_type_option
@out_option("the plan.  [default: plans/NAME.imported-HASH.json]")
@run_options("adapters", "is_streamed", *CHOICES, "llama_cpp", "force")
@json_option
def import_(
    file: Path,
    source: str,
    raw_type: str,
    out: Path | None,
    as_json: bool,
    options: api.Options,
    progress: BarProgress,
) -> None:
    """Plan the types of FILE for MODEL; no weight is read.

    FILE is a quant_plan_*.json of the EWQ proof of concept, by layer or by tensor, or
    any GGUF of the same model. Prints the plan's path.
    """
    if out is not None:
        store.check_writable(out, "plan")
    run = _run(source, options, progress, reads_weights=False)
    result = api.import_plan(run, file, raw_type=raw_type)
    _written(result, out, force=options.force, as_json=as_json)


def _written(made: Plan, out: Path | None, *, force: bool, as_json: bool) -> None:
    """Write a new plan and tell where."""
    out = out or api.plan_file(made)
    store.write_text(out, made.to_json(), stage="plan", force=force)
    click.echo(made.to_json() if as_json else out, nl=not as_json)


@plan.command()
@click.argument("source", metavar="MODEL|SCAN")
@factors_option("0.3:1.5:0.05")
@parameter_options(EwqPolicy, without=("factor",))
@raw_type_option
@run_options(
    "adapters", "is_streamed", "n_threads", "allow_nonfinite", *CHOICES, "llama_cpp"
)
@json_option
def sweep(
    source: str,
    factors: list[float],
    policy: EwqPolicy,
    raw_type: str,
    as_json: bool,
    options: api.Options,
    progress: BarProgress,
) -> None:
    """Plan with one factor after another: layers of each type, size and bits."""
    run = _run(source, options, progress)
    measured, layout = api.measured(run, policy)
    plans = [
        make_plan(
            measured,
            policy.model_copy(update={"factor": factor}),
            layout,
            raw_type=raw_type,
        )
        for factor in factors
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
        if given := given_options(map(flag_of, CHOICES)):
            problem = "is a scan, which keeps the choices that it was made with"
            raise UsageError(
                "plan", path, problem, f"give MODEL with {given[0].opts[0]}"
            )
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
@option(
    "--format",
    "form",
    type=click.Choice([*_FORMATS, "rpc"]),
    default="sh",
    help="Form to write: a shell script, llama-quantize's --tensor-type-file, a table "
    "of the tensors, the plan itself, or the commands of a cluster's machines.",
)
@option(
    "--gguf",
    metavar="FILE",
    help="File that the commands of --format rpc load.  [default: NAME.gguf]",
)
@click.option(
    "--allow-public",
    is_flag=True,
    help="Let the RPC workers of --format rpc have public addresses: whoever reaches "
    "them can use them.",
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
    if form != "rpc" and (given := given_options(("--gguf", "--allow-public"))):
        raise click.BadParameter(f"{given[0].opts[0]} goes with --format rpc")
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

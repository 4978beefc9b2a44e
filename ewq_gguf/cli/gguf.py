"""`ewq gguf`: everything at once."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from ewq_gguf import api
from ewq_gguf.cli.common import (
    CHOICES,
    PATH,
    json_option,
    out_option,
    run_options,
    typed_options,
)
from ewq_gguf.cli.convert import convert
from ewq_gguf.cli.plan import make as plan_command
from ewq_gguf.cli.policy import (
    POLICY_FLAGS,
    PolicyOptions,
    policy_options,
    raw_type_option,
)
from ewq_gguf.cli.progress import BarProgress, console
from ewq_gguf.cli.quantize import quantize
from ewq_gguf.cli.sections import SectionedCommand, given_options, option
from ewq_gguf.llamacpp.export_script import exact_comment
from ewq_gguf.records import OptimalPolicy, Plan, load_record
from ewq_gguf.report.made_view import made_view

#: Choices that `ewq convert` is told; a plan has those that it was made with.
_CONVERTING = (*CHOICES, "mmproj")


@click.command(cls=SectionedCommand)
@click.argument("model")
@out_option("the GGUF.  [default: NAME-EWQ-<nearest preset>.gguf]")
@policy_options
@option(
    "--plan",
    "plan_path",
    type=PATH,
    metavar="PLAN",
    help="Plan to follow, as `ewq plan` wrote it, in place of a policy.",
)
@option("--dry-run", is_flag=True, help="Plan, and print the commands; run none.")
@raw_type_option
@run_options(
    "adapters", "imatrix", "calibration", "keep_lattice", "mmproj", *CHOICES,
    "n_threads", "allow_nonfinite", "llama_cpp", "load", "force",
)  # fmt: skip
@json_option
def gguf(
    model: str,
    out: Path | None,
    policy: PolicyOptions,
    plan_path: Path | None,
    raw_type: str,
    dry_run: bool,
    as_json: bool,
    options: api.Options,
    progress: BarProgress,
) -> None:
    """Make a verified GGUF of MODEL: scan, plan, convert, quantise, verify.

    Files that are there and still valid are used again. Prints the file's path.
    """
    if plan_path and (given := given_options((*POLICY_FLAGS, "--no-lattice"))):
        problem = f"{given[0].opts[0]} is in the plan already; give one of them"
        raise click.BadParameter(problem)
    if dry_run:
        run = api.Run(model, options, progress)
        click.echo(_dry_run(run, model, out, plan_path, policy, raw_type))
        return
    made = api.make_gguf(
        model,
        out,
        load_record(Plan, plan_path, "gguf") if plan_path else policy.policy,
        raw_type=raw_type,
        budget=policy.budget.size_target(options),
        options=options,
        progress=progress,
    )
    if not progress.is_quiet:
        console().print(
            made_view(
                made.path,
                made.plan,
                made.verification,
                made.preset_bytes,
                plan_path=made.plan_path,
                is_reused=made.is_reused,
                companions=[(each.path, each.companion) for each in made.companions],
            )
        )
    companions = tuple(each.companion for each in made.companions)
    result = made.verification.model_copy(update={"companions": companions})
    click.echo(result.to_json() if as_json else made.path, nl=not as_json)


def _dry_run(
    run: api.Run,
    model: str,
    out: Path | None,
    plan_path: Path | None,
    policy: PolicyOptions,
    raw_type: str,
) -> str:
    """The commands that do the same, for a shell; the plan is made to show its size."""
    if plan_path:
        plan, path = load_record(Plan, plan_path, "gguf"), str(plan_path)
        run = api.as_planned(run, plan)
        api.check_weights(run, plan)
        lines = _making_base(model, plan, run.options)
    else:
        given, budget = run.options, policy.budget.size_target(run.options)
        if isinstance(policy.policy, OptimalPolicy):
            run = api.with_imatrix(run)
        plan = api.plan(run, policy.policy, raw_type=raw_type, budget=budget)
        path = str(api.plan_file(plan))
        typed = typed_options(plan_command)
        lines = [
            *_making_base(model, plan, given),
            f"ewq plan {_quoted(model, given)}{typed} -o {shlex.quote(path)}",
        ]
    return "\n".join([*lines, *_making_file(run, model, out, plan, path)])


def _quoted(model: str, options: api.Options) -> str:
    """The model and its adapters, for a shell."""
    return shlex.join([model, *(f"--adapter={a}" for a in options.adapters)])


def _making_base(model: str, plan: Plan, options: api.Options) -> list[str]:
    """The file's size, and the command that makes the base GGUF where MODEL is none."""
    totals = plan.totals
    size = f"# {totals.file_size_bytes} bytes, {totals.bpw:.3f} bits per weight"
    if plan.model.is_gguf:
        return [size]
    chosen = "".join(f" {each}" for each in api.choices_given(options, _CONVERTING))
    typed = typed_options(convert, without=_CONVERTING)
    return [size, f"ewq convert {_quoted(model, options)}{chosen}{typed} -o base.gguf"]


def _making_file(
    run: api.Run, model: str, out: Path | None, plan: Plan, path: str
) -> list[str]:
    """The commands from a plan and its base to the file."""
    base = model if plan.model.is_gguf else "base.gguf"
    to = str(out or "out.gguf")
    if not any(tensor.is_exact for tensor in plan.tensors):
        return api.quantize_commands(run, plan, path, base, to)
    imatrix = ["--imatrix", str(run.options.imatrix)] if plan.imatrix else []
    command = shlex.join(["ewq", "quantize", path, base, "-o", to, *imatrix])
    typed = typed_options(quantize, without=["imatrix"])
    return [*exact_comment(plan).splitlines(), f"{command}{typed}"]

"""`ewq gguf`: everything at once."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from ewq_gguf import api
from ewq_gguf.cli.common import (
    CHOICES,
    PATH,
    BarProgress,
    adapter_option,
    choice_options,
    chosen_options,
    console,
    explicit,
    force_option,
    imatrix_link,
    imatrix_option,
    json_option,
    lattice_option,
    llama_cpp_option,
    mmproj_option,
    no_load_option,
    nonfinite_option,
    options_of,
    out_option,
    quiet_option,
    threads_option,
)
from ewq_gguf.cli.policy import (
    POLICY_OPTIONS,
    ask_of,
    policy_of,
    policy_options,
    raw_type_of,
)
from ewq_gguf.llamacpp.export_script import exact_comment
from ewq_gguf.llamacpp.quantize import quantize_argv
from ewq_gguf.llamacpp.toolchain import find_toolchain
from ewq_gguf.records import OptimalPolicy, Plan, RulePolicy, load_record
from ewq_gguf.report.made_view import made_view

#: What `ewq convert` and `ewq plan` are told too, beside the policy.
_CONVERTING = (*CHOICES, "mmproj")
_PLANNING = ("no_lattice", "allow_nonfinite", "llama_cpp")


@click.command()
@click.argument("model")
@adapter_option
@out_option("the GGUF.  [default: NAME-EWQ-<nearest preset>.gguf]")
@policy_options
@click.option(
    "--plan", "plan_path", type=PATH, metavar="PLAN", help="Use a finished plan."
)
@imatrix_option
@lattice_option
@mmproj_option
@choice_options
@threads_option
@nonfinite_option
@llama_cpp_option
@no_load_option
@click.option("--dry-run", is_flag=True, help="Plan, print the commands, run none.")
@force_option
@quiet_option
@json_option
def gguf(
    model: str,
    out: Path | None,
    plan_path: Path | None,
    dry_run: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Make a verified GGUF of MODEL: scan, plan, convert, quantise, verify.

    What is there already and still valid is used again. Prints the file's path.
    """
    progress = BarProgress(quiet=values["quiet"])
    if plan_path and (given := explicit((*POLICY_OPTIONS, "no_lattice"))):
        raise click.BadParameter(f"{given[0]} is in the plan already; give one of them")
    policy = load_record(Plan, plan_path, "gguf") if plan_path else policy_of(values)
    options = options_of(values)
    if dry_run:
        click.echo(_dry_run(model, out, policy, plan_path, options, progress))
        return
    made = api.make_gguf(
        model,
        out,
        policy,
        raw_type=raw_type_of(values),
        budget=ask_of(values),
        options=options,
        progress=progress,
    )
    if not values["quiet"]:
        console().print(
            made_view(
                made.path,
                made.plan,
                made.verification,
                made.preset_bytes,
                plan_path=made.plan_path,
                is_reused=made.is_reused,
                companions=[(each.path, each.found) for each in made.companions],
            )
        )
    found = tuple(each.found for each in made.companions)
    result = made.verification.model_copy(update={"companions": found})
    click.echo(result.to_json() if as_json else made.path, nl=not as_json)


def _dry_run(
    model: str,
    out: Path | None,
    policy: RulePolicy | Plan,
    plan_path: Path | None,
    options: api.Options,
    progress: BarProgress,
) -> str:
    """The commands that do the same, for a shell; the plan is made to show its size."""
    run = api.Run(model, options, progress)
    if isinstance(policy, Plan):
        plan, path = policy, str(plan_path)
        run = api.as_planned(run, plan)
        api.check_weights(run, plan)
        lines = _making_base(model, plan, run.options)
    else:
        given = options
        if isinstance(policy, OptimalPolicy):
            run = api.with_imatrix(run)
        params = click.get_current_context().params
        plan = api.plan(
            run, policy, raw_type=raw_type_of(params), budget=ask_of(params)
        )
        path = str(api.plan_file(plan))
        typed = _typed((*POLICY_OPTIONS, *CHOICES, "imatrix", *_PLANNING))
        lines = [
            *_making_base(model, plan, given),
            f"ewq plan {_quoted(model, given)}{typed} -o {shlex.quote(path)}",
        ]
    return "\n".join([*lines, *_making_file(model, out, plan, path, run.options)])


def _quoted(model: str, options: api.Options) -> str:
    """The model and its adapters, for a shell."""
    return shlex.join([model, *(f"--adapter={a}" for a in options.adapters)])


def _making_base(model: str, plan: Plan, options: api.Options) -> list[str]:
    """What is made, and the command that makes its base GGUF where it is none."""
    totals = plan.totals
    size = f"# {totals.file_size_bytes} bytes, {totals.bpw:.3f} bits per weight"
    if plan.model.is_gguf:
        return [size]
    chosen = "".join(f" {each}" for each in chosen_options(options, _CONVERTING))
    typed = _typed(("llama_cpp", "no_load"))
    return [size, f"ewq convert {_quoted(model, options)}{chosen}{typed} -o base.gguf"]


def _making_file(
    model: str, out: Path | None, plan: Plan, path: str, options: api.Options
) -> list[str]:
    """The commands from a plan and its base to the file."""
    base = model if plan.model.is_gguf else "base.gguf"
    to = str(out or "out.gguf")
    if any(tensor.is_exact for tensor in plan.tensors):
        imatrix = ["--imatrix", str(options.imatrix)] if plan.imatrix else []
        command = shlex.join(["ewq", "quantize", path, base, "-o", to, *imatrix])
        typed = _typed(("threads", "llama_cpp", "no_load"))
        return [*exact_comment(plan).splitlines(), f"{command}{typed}"]
    argv = quantize_argv(
        plan,
        find_toolchain(options.llama_cpp).tool("llama-quantize"),
        base=base,
        types="tensor-types.txt",
        out=to,
        n_threads=options.n_threads,
    )
    return [
        f"ewq plan export {shlex.quote(path)} --format tensor-type-file "
        "-o tensor-types.txt",
        *([imatrix_link(options.imatrix)] if plan.imatrix and options.imatrix else []),
        shlex.join(argv),
    ]


def _typed(names: Iterable[str]) -> str:
    """Those of some options that were given, as they are typed."""
    params = click.get_current_context().params
    return "".join(
        f" {name}" if value is True else f" {name} {shlex.quote(str(value))}"
        for name in explicit(names)
        for value in _each(params[name[2:].replace("-", "_")])
    )


def _each(value: Any) -> tuple[Any, ...]:
    """The values of an option that may be given several times."""
    return value if isinstance(value, tuple) else (value,)

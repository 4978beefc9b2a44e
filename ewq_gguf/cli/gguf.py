"""`ewq gguf`: everything at once."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from ewq_gguf import pipeline
from ewq_gguf.cli.common import (
    PATH,
    BarProgress,
    console,
    force_option,
    json_option,
    llama_cpp_option,
    no_load_option,
    nonfinite_option,
    options_of,
    out_option,
    policy_of,
    policy_options,
    quiet_option,
    raw_type_of,
    threads_option,
)
from ewq_gguf.llamacpp.quantize import quantize_argv
from ewq_gguf.records import Plan, Policy, load_record
from ewq_gguf.report.made_view import made_view


@click.command()
@click.argument("model")
@out_option("the GGUF.  [default: NAME-EWQ-<nearest preset>.gguf]")
@policy_options
@click.option(
    "--plan", "plan_path", type=PATH, metavar="PLAN", help="Use a finished plan."
)
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
    policy = policy_of(values)
    options = options_of(values)
    if dry_run:
        click.echo(_dry_run(model, out, policy, options, values, progress))
        return
    made = pipeline.make_gguf(
        model,
        out,
        load_record(Plan, plan_path, "gguf") if plan_path else policy,
        raw_type=raw_type_of(values),
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
            )
        )
    click.echo(made.verification.to_json() if as_json else made.path, nl=not as_json)


def _dry_run(
    model: str,
    out: Path | None,
    policy: Policy,
    options: pipeline.Options,
    values: dict[str, Any],
    progress: BarProgress,
) -> str:

    plan = pipeline.plan(
        pipeline.open_model(model, options=options, progress=progress),
        policy,
        raw_type=raw_type_of(values),
        options=options,
        progress=progress,
    )
    path = pipeline.plan_file(plan)
    quantize = quantize_argv(
        plan,
        "llama-quantize",
        base="base.gguf",
        types="tensor-types.txt",
        out=str(out or "out.gguf"),
        n_threads=options.n_threads,
    )
    commands = [
        ["ewq", "convert", model, "-o", "base.gguf"],
        ["ewq", "plan", model, "--policy", values["policy"], "-o", str(path)],
        ["ewq", "plan", "export", str(path), "--format", "tensor-types"]
        + ["-o", "tensor-types.txt"],
        quantize,
    ]
    size = f"# {plan.totals.file_size_bytes} bytes, {plan.totals.bpw:.3f} bpw"
    return "\n".join([size, *(shlex.join(command) for command in commands)])

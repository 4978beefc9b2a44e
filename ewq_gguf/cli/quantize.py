"""`ewq quantize`: the mixed GGUF from a plan and its base."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from ewq_gguf import store
from ewq_gguf.cli.common import (
    PATH,
    BarProgress,
    force_option,
    imatrix_link,
    imatrix_option,
    json_option,
    llama_cpp_option,
    no_load_option,
    options_of,
    quiet_option,
    threads_option,
)
from ewq_gguf.llamacpp.export_script import exact_comment
from ewq_gguf.llamacpp.imatrix import check_imatrix
from ewq_gguf.llamacpp.quantize import quantize as quantize_plan
from ewq_gguf.llamacpp.quantize import quantize_argv
from ewq_gguf.llamacpp.toolchain import find_toolchain
from ewq_gguf.plan.check import check_sound
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
    options = options_of(values)
    record = load_record(Plan, plan_path, "quantize")
    check_sound(record)
    progress = BarProgress(quiet=values["quiet"])
    if note := check_imatrix(record, options.imatrix):
        progress.note(note)
    toolchain = find_toolchain(options.llama_cpp)
    if dry_run:
        argv = quantize_argv(
            record,
            toolchain.tool("llama-quantize"),
            base=str(base),
            types="tensor-types.txt",
            out=str(out),
            n_threads=options.n_threads,
        )
        export = shlex.join(["ewq", "plan", "export", str(plan_path)])
        click.echo(f"{export} --format tensor-type-file -o tensor-types.txt")
        if options.imatrix:
            click.echo(imatrix_link(options.imatrix))
        click.echo(f"{exact_comment(record)}{shlex.join(argv)}")
        return
    store.check_writable(out, "quantize")
    if out.exists() and not options.force:
        raise store.already_exists(out, "quantize")
    with store.locked(out, stage="quantize"), progress.stage("quantize") as share:
        verification = quantize_plan(
            record,
            base,
            out,
            toolchain,
            n_threads=options.n_threads,
            load=options.load,
            imatrix=options.imatrix,
            on_progress=share,
        )
    for line in exact_lines(verification):
        progress.note(line)
    click.echo(verification.to_json() if as_json else out, nl=not as_json)

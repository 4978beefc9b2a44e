"""`ewq verify`: is a file what its plan says?"""

from __future__ import annotations

from pathlib import Path

import click

from ewq_gguf.cli.common import PATH, json_option
from ewq_gguf.errors import InputError, printable
from ewq_gguf.llamacpp.verify import verify_file
from ewq_gguf.records import Plan, load_record


@click.command()
@click.argument("plan_path", type=PATH, metavar="PLAN")
@click.argument("file", type=PATH)
@click.option(
    "--no-load",
    is_flag=True,
    help="Skip the test that loads the file and generates text.",
)
@json_option
def verify(plan_path: Path, file: Path, no_load: bool, as_json: bool) -> None:
    """Compare FILE with PLAN, tensor by tensor; exit 8 if it differs."""
    record = load_record(Plan, plan_path, "verify")
    if not file.is_file():
        raise InputError("verify", file, "no such file", "check the path")
    result = verify_file(record, file, load=not no_load)
    if as_json:
        click.echo(result.to_json(), nl=False)
        return
    estimated = record.totals.is_estimate
    planned = "the plan's size was an estimate" if estimated else "as planned"
    click.echo(
        f"{file}: {len(result.tensors)} tensors of their planned types, "
        f"{result.found_size_bytes} bytes ({planned}), sha256 {result.file_sha256}"
    )
    if result.answer is not None:
        # The file chose these words.
        click.echo(printable(f"{result.prompt}{result.answer}"))

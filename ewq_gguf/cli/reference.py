"""`ewq reference`: a base's logits for texts, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ewq_gguf import store
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.files import check_measurable, identify
from ewq_gguf.bench.reference_run import existing_reference, make_reference
from ewq_gguf.bench.runner import Request
from ewq_gguf.cli.bench_options import (
    named_texts,
    setup_of,
    setup_options,
    text_options,
    with_data,
)
from ewq_gguf.cli.common import (
    PATH,
    force_option,
    json_option,
    quiet_option,
)
from ewq_gguf.cli.progress import BarProgress
from ewq_gguf.errors import UsageError


@click.command()
@click.argument("base", type=PATH)
@click.option(
    "-o", "--out", type=PATH, required=True, help="Where to write the reference."
)
@text_options
@setup_options
@force_option
@quiet_option
@json_option
def reference(
    base: Path, out: Path, force: bool, quiet: bool, as_json: bool, **values: Any
) -> None:
    """Store the base model's logits once, for KL divergence; prints the path.

    `ewq bench FILE --base REF` needs BASE no more then, also on another machine. The
    file has BASE's output matrix, and the hidden state before it of each scored token.
    """
    if base.is_dir():
        problem = "is a folder, a reference is made of a GGUF file"
        raise UsageError(STAGE, base, problem, "make it with `ewq convert`")
    identify(base)
    check_measurable(base, values["ctx"])
    store.check_writable(out, STAGE)
    request = Request(
        tasks=("perplexity",),
        texts=tuple(text for one in values["texts"] for text in named_texts(one)),
        setup=setup_of(values),
        n_ctx=values["ctx"],
        n_chunks=values["chunks"],
        is_lines=values["lines"] or "domains" in values["texts"],
    )
    request = with_data(request, values)
    store.check_distinct(out, [base, *(path for _, path in request.texts)], STAGE)
    progress = BarProgress(quiet=quiet)
    with store.locked(out, stage=STAGE):
        record = None if force else existing_reference(out, base, request)
        if record is not None:
            progress.note(f"{out} was there already, still valid")
        else:
            with progress.measure(f"reference {base.name}") as tell:
                record = make_reference(base, out, request, tell)
            progress.note(f"wrote {out}")
    click.echo(record.to_json() if as_json else out, nl=not as_json)

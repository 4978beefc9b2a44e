"""`ewq reference`: a base's logits for texts, in one file."""

from __future__ import annotations

from pathlib import Path

import click

from ewq_gguf import store
from ewq_gguf.api import Options
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.files import check_measurable, identify
from ewq_gguf.bench.reference_run import existing_reference, make_reference
from ewq_gguf.bench.runner import Request
from ewq_gguf.cli.bench_options import (
    TextOptions,
    text_options,
    with_texts,
)
from ewq_gguf.cli.common import PATH, json_option, out_option, run_options
from ewq_gguf.cli.devices import setup_options
from ewq_gguf.cli.progress import BarProgress
from ewq_gguf.errors import UsageError
from ewq_gguf.records import BenchSetup


@click.command()
@click.argument("base", type=PATH)
@out_option("the reference.", required=True)
@text_options
@setup_options
@run_options("force")
@json_option
def reference(
    base: Path,
    out: Path,
    texts: TextOptions,
    setup: BenchSetup,
    as_json: bool,
    options: Options,
    progress: BarProgress,
) -> None:
    """Store the base model's logits once, for KL divergence; prints the path.

    `ewq bench FILE --base REF` needs BASE no more then, also on another machine. The
    file has BASE's output matrix, and the hidden state before it of each scored token.
    """
    if base.is_dir():
        problem = "is a folder, a reference is made of a GGUF file"
        raise UsageError(STAGE, base, problem, "make it with `ewq convert`")
    identify(base)
    check_measurable(base, texts.n_ctx)
    store.check_writable(out, STAGE)
    request = with_texts(
        Request(
            tasks=("perplexity",),
            texts=texts.texts,
            setup=setup,
            n_ctx=texts.n_ctx,
            n_chunks=texts.n_chunks,
            is_lines=texts.is_lines,
        )
    )
    store.check_distinct(out, [base, *(path for _, path in request.texts)], STAGE)
    with store.locked(out, stage=STAGE):
        record = None if options.force else existing_reference(out, base, request)
        if record is not None:
            progress.note(f"{out} was there already, still valid")
        else:
            with progress.measure(f"reference {base.name}") as tell:
                record = make_reference(base, out, request, tell)
            progress.note(f"wrote {out}")
    click.echo(record.to_json() if as_json else out, nl=not as_json)

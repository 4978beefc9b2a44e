"""`ewq study`: what many throwaway files say about a way of planning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ewq_gguf import api, store
from ewq_gguf.bench.runner import CPU_SETUP, Request
from ewq_gguf.checkpoint.texts import wikitext
from ewq_gguf.cli.bench_options import ctx_option, device_option, named_text
from ewq_gguf.cli.common import (
    BarProgress,
    adapter_option,
    all_of,
    bins_option,
    choice_options,
    epsilon_option,
    force_option,
    imatrix_option,
    json_option,
    llama_cpp_option,
    options_of,
    out_option,
    quiet_option,
    show_record,
    threads_option,
)
from ewq_gguf.cli.policy import ewq_policy_of, factors_of, raw_type_of, rule_options
from ewq_gguf.errors import InputError
from ewq_gguf.experiments.study import (
    STAGE,
    StudySpec,
    study_controls,
    study_factor,
    study_sensitivity,
)
from ewq_gguf.experiments.study_record import Study
from ewq_gguf.experiments.study_view import study_view
from ewq_gguf.records import Measures, load_record

#: What `run` reads.
study_options = all_of(
    (
        adapter_option,
        choice_options,
        click.option(
            "--text",
            metavar="NAME=FILE",
            help="The text to score.  [default: wikitext, of EWQ_TEXT_DIR or the Hub]",
        ),
        click.option(
            "--chunks",
            type=click.IntRange(1),
            default=8,
            show_default=True,
            help="Windows of it.",
        ),
        ctx_option,
        device_option,
        imatrix_option,
        out_option("the study.  [default: results/NAME.STUDY.json]"),
        threads_option,
        llama_cpp_option,
        force_option,
        quiet_option,
        json_option,
    )
)


@click.group()
def study() -> None:
    """Measure what a way of planning is worth, with many throwaway files.

    Each file is made in the cache, measured and removed; a study that was killed goes
    on where it was.
    """


@study.command()
@click.argument("model")
@click.option(
    "--type",
    "ggml_type",
    default="Q4_0",
    show_default=True,
    help="Of the part that is quantised.",
)
@epsilon_option
@bins_option
@study_options
def sensitivity(
    model: str, ggml_type: str, epsilon: float, bins: int, **values: Any
) -> None:
    """Quantise each layer and each role alone: which suffer, and what foretells it.

    Every statistic of the scan is correlated with the layers' divergence.
    """
    run(
        "sensitivity",
        model,
        lambda spec: study_sensitivity(
            spec, ggml_type.upper(), Measures(epsilon=epsilon, n_bins=bins)
        ),
        values,
    )


@study.command()
@click.argument("model")
@click.option(
    "--permutations",
    type=click.IntRange(1, 10_000),
    default=5,
    show_default=True,
    help="Random ones; 19 are the fewest that can give p = 0.05.",
)
@click.option(
    "--factor",
    type=float,
    default=1.0,
    show_default=True,
    help="X of the threshold mu - X sigma.",
)
@rule_options
@study_options
def controls(model: str, permutations: int, **values: Any) -> None:
    """Measure the EWQ plan beside others with as many layers of each type.

    Random permutations of its layer decisions, its inversion, a ranking by the
    variance of the weights, and one by depth from either end.
    """
    policy = ewq_policy_of(values)
    run(
        "controls",
        model,
        lambda spec: study_controls(
            spec, policy, permutations, raw_type=raw_type_of(values)
        ),
        values,
    )


@study.command()
@click.argument("model")
@click.option(
    "--factors",
    default="0.5:1.5:0.1",
    show_default=True,
    metavar="FROM:TO:STEP",
    help="Values of X, the last one included; or a list with commas.",
)
@rule_options
@study_options
def factor(model: str, factors: str, **values: Any) -> None:
    """Measure what one factor after another makes; equal plans once."""
    policies = [ewq_policy_of({**values, "factor": x}) for x in factors_of(factors)]
    run(
        "factor",
        model,
        lambda spec: study_factor(spec, policies, raw_type=raw_type_of(values)),
        values,
    )


def run(
    name: str,
    model: str,
    study_of: Callable[[StudySpec], Study],
    values: dict[str, Any],
) -> tuple[Study, Path]:
    """Do a study, write it and show it; what was found, and where it was written."""
    progress = BarProgress(quiet=values["quiet"])
    options = options_of(values)
    out: Path | None = values["out"]
    if out is not None:
        store.check_writable(out, STAGE)
    text = named_text(values["text"]) if values["text"] else None
    setup = {"device": values["device"], "n_threads": options.n_threads}
    request = Request(
        tasks=("perplexity",),
        texts=(text or ("wikitext", wikitext(STAGE)),),
        setup=CPU_SETUP.model_copy(update=setup),
        n_ctx=values["ctx"],
        n_chunks=values["chunks"],
    )
    opened = api.open_model(model, options=options, progress=progress)
    out = out or Path("results") / f"{opened.identity.name}.{name}.json"
    shards = opened.checkpoint.shards
    store.check_distinct(out, [shard.path for shard in shards], STAGE)
    spec = StudySpec(opened, request)
    if out.exists() and not values["force"]:
        _check_known(out, name, spec)
    with store.locked(out, stage=STAGE):
        result = study_of(spec)
        store.write_text(out, result.to_json(), stage=STAGE, force=values["force"])
    progress.note(f"wrote {out}")
    show_record(result, study_view, as_json=values["as_json"])
    return result, out


def _check_known(out: Path, name: str, spec: StudySpec) -> None:
    """Refuse before hours of work what would be refused after them.

    Raises:
        UsageError: what is there is no study, or one of another spec.
    """
    try:
        known = load_record(Study, out, STAGE)
    except InputError:
        raise store.already_exists(out, STAGE) from None
    asked = spec.request.parameters()
    measured = known.parameters.model_copy(update={"tasks": asked.tasks})
    model = spec.run.identity.fingerprint
    if (known.findings.kind, known.model.fingerprint, measured) != (name, model, asked):
        raise store.already_exists(out, STAGE)

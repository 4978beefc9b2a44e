"""`ewq study`: many candidate files of a model measured, to judge how EWQ plans."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from ewq_gguf import api, store
from ewq_gguf.bench.runner import CPU_SETUP, Request
from ewq_gguf.checkpoint.hub_data import wikitext
from ewq_gguf.cli.bench_options import ctx_option, named_text
from ewq_gguf.cli.common import (
    CHOICES,
    json_option,
    out_option,
    run_options,
    show_record,
)
from ewq_gguf.cli.devices import device_option
from ewq_gguf.cli.policy import (
    factors_option,
    measure_options,
    parameter_options,
    raw_type_option,
)
from ewq_gguf.cli.progress import BarProgress
from ewq_gguf.cli.sections import Decorator, all_of, collected, option
from ewq_gguf.experiments.study import STAGE, StudySpec
from ewq_gguf.experiments.study_record import Study
from ewq_gguf.experiments.study_view import study_view
from ewq_gguf.records import EwqPolicy, Measures


@dataclass(frozen=True)
class StudyOptions:
    """How the files of a study are measured, and where the study is written.

    Attributes:
        text: Text to score, NAME=FILE; None for wikitext.
        chunks: Windows of the text.
        ctx: Tokens of a window.
        device: Device of the model.
        out: File of the study; None for the default name.
        as_json: Whether JSON is printed.
        options: Settings of the run.
        progress: Notes and bars.
    """

    text: str | None
    chunks: int
    ctx: int
    device: str
    out: Path | None
    as_json: bool
    options: api.Options
    progress: BarProgress


_RUN = ("adapters", *CHOICES, "imatrix", "n_threads", "llama_cpp", "force")


def study_options(*names: str) -> Decorator:
    """The options of every study: the command takes `study`, StudyOptions.

    Args:
        names: More fields of Options that the command can set.
    """

    def arguments(values: dict[str, Any]) -> dict[str, Any]:
        own = {field.name: values.pop(field.name) for field in fields(StudyOptions)}
        return {**values, "study": StudyOptions(**own)}

    options = (
        option(
            "--text",
            metavar="NAME=FILE",
            help="Text to score.  [default: wikitext, of EWQ_TEXT_DIR or the Hub]",
        ),
        option(
            "--chunks",
            type=click.IntRange(1),
            default=8,
            metavar="N",
            help="Windows of the text to score.",
        ),
        ctx_option,
        device_option,
        out_option("the study.  [default: results/NAME.STUDY.json]"),
        json_option,
    )
    run = run_options(*_RUN, *names)
    # The run's options are collected first: `study` holds them.
    return lambda function: all_of(options)(run(collected((), arguments)(function)))


@click.group()
def study() -> None:
    """Measure entropies, controls and factors of EWQ with many candidate files.

    Each file is made in the cache, measured and removed; a study that was killed goes
    on where it was.
    """


@study.command()
@click.argument("model")
@option(
    "--type",
    "ggml_type",
    default="Q4_0",
    metavar="TYPE",
    help="Type of the layer or role that is quantised.",
)
@measure_options
@study_options()
def sensitivity(
    model: str, ggml_type: str, measures: Measures, study: StudyOptions
) -> None:
    """Quantise each layer and each role alone: which suffer, and what foretells it.

    Every statistic of the scan is correlated with the layers' divergence.
    """
    run(model, api.SensitivitySpec(ggml_type.upper(), measures), study)


@study.command()
@click.argument("model")
@option(
    "--permutations",
    type=click.IntRange(1, 10_000),
    default=5,
    metavar="N",
    help="Random permutations to measure; 19 are the fewest that can give p = 0.05.",
)
@parameter_options(EwqPolicy)
@raw_type_option
@study_options()
def controls(
    model: str,
    permutations: int,
    policy: EwqPolicy,
    raw_type: str,
    study: StudyOptions,
) -> None:
    """Measure the EWQ plan beside others with as many layers of each type.

    Random permutations of its layer decisions, its inversion, a ranking by the
    variance of the weights, and one by depth from either end.
    """
    run(model, api.ControlsSpec(policy, permutations, raw_type), study)


@study.command()
@click.argument("model")
@factors_option("0.5:1.5:0.1")
@parameter_options(EwqPolicy, without=("factor",))
@raw_type_option
@study_options()
def factor(
    model: str,
    factors: list[float],
    policy: EwqPolicy,
    raw_type: str,
    study: StudyOptions,
) -> None:
    """Measure what one factor after another makes; equal plans once."""
    policies = tuple(policy.model_copy(update={"factor": x}) for x in factors)
    run(model, api.FactorSpec(policies, raw_type), study)


def run(model: str, spec: StudySpec, study: StudyOptions) -> Study:
    """Do a study, write it and show it."""
    if study.out is not None:
        store.check_writable(study.out, STAGE)
    text = named_text(study.text) if study.text else None
    setup = {"device": study.device, "n_threads": study.options.n_threads}
    request = Request(
        tasks=("perplexity",),
        texts=(text or ("wikitext", wikitext(STAGE)),),
        setup=CPU_SETUP.model_copy(update=setup),
        n_ctx=study.ctx,
        n_chunks=study.chunks,
    )
    opened = api.open_model(model, options=study.options, progress=study.progress)
    result, _ = api.run_study(opened, spec, request, study.out)
    show_record(result, study_view, as_json=study.as_json)
    return result

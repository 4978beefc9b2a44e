"""`ewq compare`: plans and presets, measured under the same conditions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from ewq_gguf import api
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.cli.bench_options import BenchOptions, bench_options
from ewq_gguf.cli.common import (
    CHOICES,
    PATH,
    json_option,
    out_option,
    run_options,
    show_record,
)
from ewq_gguf.cli.devices import comma_list
from ewq_gguf.cli.policy import rule_of
from ewq_gguf.cli.progress import BarProgress
from ewq_gguf.cli.sections import DefaultGroup, SectionedCommand, option
from ewq_gguf.errors import UsageError
from ewq_gguf.experiments.across_models import across_models, across_view
from ewq_gguf.experiments.comparison_record import Comparison
from ewq_gguf.experiments.comparison_view import comparison_view
from ewq_gguf.plan.size_target import parse_budget
from ewq_gguf.records import Plan, PresetPolicy, load_record


@click.group(cls=DefaultGroup, default="make")
def compare() -> None:
    """Compare mixed plans with presets of similar size."""


@compare.command(name="make", hidden=True, cls=SectionedCommand)
@click.argument("model")
@option(
    "--plans",
    multiple=True,
    default=("ewq",),
    metavar="LIST",
    help="Plans to compare, separated by commas: files of plans, or policies with "
    "parameters and budgets, such as ewq:tensor:x0.8 or fastewq@80%; '' for none.",
)
@click.option(
    "--presets",
    multiple=True,
    metavar="LIST",
    help="Presets to compare with besides those nearest to each plan in size, such as "
    "Q4_K_M,Q8_0; the base is always compared.",
)
@out_option("files, plans, results and comparison.json.  [default: compare/NAME]")
@click.option(
    "--keep-files/--delete-files",
    default=True,
    show_default=True,
    help="Keep or delete the GGUF files when all are measured.",
)
@bench_options
@run_options("adapters", "imatrix", "allow_nonfinite", *CHOICES, "llama_cpp", "force")
@json_option
def make(
    model: str,
    plans: tuple[str, ...],
    presets: tuple[str, ...],
    out: Path | None,
    keep_files: bool,
    bench: BenchOptions,
    as_json: bool,
    options: api.Options,
    progress: BarProgress,
) -> None:
    """Compare mixed plans of MODEL with presets of similar size.

    Makes what is missing, measures all files under the same conditions (speeds in
    turns), and says what can and cannot be told apart. A run that was killed goes on
    where it was.
    """
    # The model stands for its base, which is made later.
    request = bench.with_data(bench.request(Path(model)))
    wanted = api.ComparisonSpec(
        plans=parse_plans(plans),
        presets=tuple(
            dict.fromkeys(name.upper() for text in presets for name in comma_list(text))
        ),
        request=request,
        keep_files=keep_files,
    )
    options = replace(options, n_threads=request.setup.n_threads)
    found, path = api.compare(api.Run(model, options, progress), wanted, out)
    progress.note(f"wrote {path}")
    show_record(found, comparison_view, as_json=as_json)


def parse_plans(texts: Iterable[str]) -> tuple[api.PlanSpec, ...]:
    """The plans of `--plans`: files of plans, and policies with their budgets.

    Raises:
        InputError: a file is no plan.
        UsageError: there is no such policy, or a budget is none.
    """
    parts = [part.strip() for text in texts for part in text.split(",")]
    return tuple(_plan_spec(part) for part in parts if part)


def _plan_spec(text: str) -> api.PlanSpec:
    path = Path(text)
    if path.suffix == ".json" or path.is_file():
        plan = load_record(Plan, path, STAGE)
        # `ewq plan` calls it NAME.POLICY.json.
        return api.PlanSpec(plan, name=path.stem.removeprefix(f"{plan.model.name}."))
    policy, budget = rule_of(text, "--plans")
    if isinstance(policy, PresetPolicy):
        raise UsageError("plan", "--plans", f"{text} is a preset", "use --presets")
    return api.PlanSpec(policy, budget=None if budget is None else parse_budget(budget))


@compare.command()
@click.argument("files", type=PATH, metavar="FILE...", nargs=-1, required=True)
@json_option
def show(files: tuple[Path, ...], as_json: bool) -> None:
    """Print a comparison; of several, paired tests over their models."""
    records = [load_record(Comparison, file, STAGE) for file in files]
    if len(records) == 1:
        show_record(records[0], comparison_view, as_json=as_json)
        return
    pairs = across_models(records)
    if as_json:
        dumped = [pair.model_dump(mode="json") for pair in pairs]
        click.echo(json.dumps(dumped, indent=1, sort_keys=True))
    else:
        Console(highlight=False).print(across_view(pairs))

"""`ewq frontier`: size against divergence."""

from __future__ import annotations

from pathlib import Path

import click

from ewq_gguf import api, store
from ewq_gguf.cli.bench_options import comma_list
from ewq_gguf.cli.common import PATH
from ewq_gguf.cli.policy import parameter_options
from ewq_gguf.cli.sections import option
from ewq_gguf.cli.study import StudyOptions, run, study_options
from ewq_gguf.experiments.frontier import study_frontier
from ewq_gguf.experiments.frontier_view import draw_frontier
from ewq_gguf.experiments.study import STAGE, StudySpec
from ewq_gguf.experiments.study_record import Study
from ewq_gguf.plan.policy import check_policy
from ewq_gguf.plan.size_target import SizeTarget, parse_budget
from ewq_gguf.records import OptimalPolicy

_PRESETS = "Q6_K,Q5_K_M,Q5_K_S,Q4_K_M,Q4_K_S,Q3_K_M,IQ4_XS"


@click.command()
@click.argument("model")
@option(
    "--budgets",
    metavar="LIST",
    help="Sizes to find the best file of, with commas, such as 6GiB,5.5GB,30%.",
)
@option(
    "--presets",
    metavar="LIST",
    help=f"Presets whose sizes to find the best file of.  [default: {_PRESETS}]",
)
@option(
    "--picture",
    type=PATH,
    metavar="FILE",
    help="File to draw the curve to: .png, .svg or .pdf.",
)
@parameter_options(OptimalPolicy)
@study_options("calibration")
def frontier(
    model: str,
    budgets: str | None,
    presets: str | None,
    picture: Path | None,
    policy: OptimalPolicy,
    study: StudyOptions,
) -> None:
    """Draw MODEL's curve of size against KL divergence.

    Every preset with an importance matrix and without, and at each size the best file
    that policy optimal finds, EWQ and FastEWQ. The text judges and chooses nothing.
    """
    if budgets and presets:
        raise click.BadParameter("--budgets and --presets are sizes each; give one")
    check_policy(policy, has_budget=True)
    if picture is not None:
        store.check_writable(picture, STAGE)

    def study_of(spec: StudySpec) -> Study:
        if budgets:
            asked = {text: parse_budget(text) for text in comma_list(budgets)}
        else:
            asked = _preset_sizes(spec, comma_list(presets or _PRESETS))
        return study_frontier(spec, asked, policy)

    found, _ = run("frontier", model, study_of, study)
    if picture is not None:
        with store.replacing(picture, stage=STAGE) as temporary:
            draw_frontier(found, temporary)


def _preset_sizes(spec: StudySpec, names: list[str]) -> dict[str, SizeTarget]:
    """The sizes of presets, by their names."""
    names = [name.upper() for name in names]
    api.check_presets(names, has_imatrix=True)
    # With the matrix a file says so, and is some hundred bytes larger.
    run = api.with_imatrix(spec.run)
    plans = api.preset_plans(run, presets=names, needed=names)
    sizes = {name: plans[name].totals.file_size_bytes for name in names}
    return {name: SizeTarget(f"{size}B", n_bytes=size) for name, size in sizes.items()}

"""`ewq frontier`: size against divergence."""

from __future__ import annotations

from pathlib import Path

import click

from ewq_gguf import store
from ewq_gguf.cli.common import PATH
from ewq_gguf.cli.devices import comma_list
from ewq_gguf.cli.policy import parameter_options
from ewq_gguf.cli.sections import option
from ewq_gguf.cli.study import StudyOptions, run, study_options
from ewq_gguf.experiments.frontier import PRESETS, FrontierSpec
from ewq_gguf.experiments.frontier_view import draw_frontier
from ewq_gguf.experiments.study import STAGE
from ewq_gguf.plan.policy import check_policy
from ewq_gguf.plan.size_target import parse_budget
from ewq_gguf.records import OptimalPolicy


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
    help="Presets whose sizes to find the best file of.  "
    f"[default: {','.join(PRESETS)}]",
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

    Every preset with an importance matrix and without, and at each size the best
    file that policy optimal finds, EWQ and FastEWQ. The text judges and chooses
    nothing.
    """
    if budgets and presets:
        raise click.BadParameter("--budgets and --presets are sizes each; give one")
    check_policy(policy, has_budget=True)
    if picture is not None:
        store.check_writable(picture, STAGE)

    spec = FrontierSpec(
        policy,
        presets=tuple(name.upper() for name in comma_list(presets or "")) or PRESETS,
        budgets=tuple((text, parse_budget(text)) for text in comma_list(budgets or "")),
    )
    result = run(model, spec, study)
    if picture is not None:
        with store.replacing(picture, stage=STAGE) as temporary:
            draw_frontier(result, temporary)

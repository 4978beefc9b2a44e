"""Sentences below a study's table: no more than its numbers allow to say."""

from __future__ import annotations

from ewq_gguf.bench.statistics import ALPHA
from ewq_gguf.experiments.controls import kld_mean
from ewq_gguf.experiments.study_record import Control, Controls, Frontier, Sensitivity
from ewq_gguf.records.scores import RankCorrelation

#: Below so many windows a bootstrap's intervals are too narrow.
_FEW_WINDOWS = 20


def sensitivity_sentences(findings: Sensitivity) -> list[str]:
    """How much each part costs, and whether a statistic foretells it."""
    total = sum(kld_mean(probe.file) for probe in findings.layers)
    tests = [c for c in findings.correlations if c.correlation.p is not None]
    low = [c.statistic for c in tests if _excludes_zero(c.correlation)]
    names = f" ({', '.join(low)})" if low else ""
    floor = kld_mean(findings.floor)
    lines = [
        f"Nothing quantised: KLD {floor:.3g}, "
        f"{'as it must be' if floor == 0 else 'which should be 0'}.",
        f"All layers at Q8_0: KLD {kld_mean(findings.rounding):.5f}; the rounding of "
        "activations that any quantised matrix brings with it costs no more. The "
        f"layers one at a time at {findings.ggml_type} sum to {total:.5f}.",
    ]
    if tests:
        lines.append(
            f"{len(low)} of {len(tests)} statistics have an interval without 0"
            f"{names}; chance alone would give about {len(tests) / 20:.1f}, "
            "more at once where statistics are akin."
        )
    for name in ("softmax_entropy_nats", "histogram_entropy_bits"):
        match = next((c for c in tests if c.statistic == name), None)
        if match is not None:
            lines.append(_entropy_sentence(name, match.correlation))
    return lines


def _entropy_sentence(name: str, test: RankCorrelation) -> str:
    what = f"{name.split('_')[0].capitalize()} entropy"
    if not _excludes_zero(test):
        return (
            f"{what} does not foretell which of these {test.n} layers suffer: rho "
            f"{test.rho:+.2f} cannot be told from 0."
        )
    assert test.rho is not None
    if test.rho > 0:
        return (
            f"{what} foretells in part which of these {test.n} layers suffer (rho "
            f"{test.rho:+.2f}): higher entropy, more harm, as EWQ assumes."
        )
    return (
        f"{what} points the wrong way on these {test.n} layers (rho {test.rho:+.2f}): "
        "the layers that EWQ quantises first suffer most."
    )


def _excludes_zero(test: RankCorrelation) -> bool:
    return test.low is not None and test.high is not None and test.low * test.high > 0


def controls_sentences(findings: Controls) -> list[str]:
    """Whether the plan's choice of layers is better than chance's."""
    sizes = file_sizes(findings)
    random = [c for c in findings.controls if c.order == "random"]
    n, p = len(random) + 1, findings.p
    least = (
        f"; with {n - 1} random ones it cannot be less than {1 / n:.2f}, and 19 are "
        "the fewest that could show anything"
        if n < 1 / ALPHA
        else ""
    )
    verdict = (
        "are a better choice than chance's"
        if p <= ALPHA
        else "are not shown to be a better choice than chance's"
    )
    lines = [
        f"Every file has {next(iter(sizes)):,} bytes."
        if len(sizes) == 1
        else f"The files are not of one size: {min(sizes):,} to {max(sizes):,} bytes.",
        f"Among {n} plans with as many layers of each type, it and {n - 1} random "
        f"ones, the plan is number {findings.rank} by KLD. Were its layers chosen at "
        f"random, it would be as good or better with probability {p:.2f}{least}.",
        f"On this model, type and text the layers that the plan quantises {verdict}.",
    ]
    sides: dict[str, list[str]] = {"worse": [], "better": [], "equal": [], "same": []}
    for control in findings.controls:
        sides[_side(control)].append(control.file.label)
    for side, text in (
        ("worse", "Worse than the plan: {}."),
        ("better", "Better than the plan: {}."),
        ("equal", "Not to be told from the plan: {}."),
        ("same", "The plan itself under another name: {}."),
    ):
        if sides[side]:
            lines.append(text.format(", ".join(sides[side])))
    if (
        findings.plan.quality.chunks
        and len(findings.plan.quality.chunks) < _FEW_WINDOWS
    ):
        lines.append(
            f"With {len(findings.plan.quality.chunks)} windows the intervals are too "
            f"narrow; give --chunks {_FEW_WINDOWS} or more."
        )
    return lines


def _side(control: Control) -> str:
    test = control.difference
    if test.difference == 0 == test.difference_low == test.difference_high:
        return "same"
    if test.difference_low is None or test.difference_high is None:
        return "equal"
    if test.difference_low <= 0 <= test.difference_high:
        return "equal"
    return "worse" if test.difference > 0 else "better"


def frontier_sentences(frontier: Frontier) -> list[str]:
    """How the optimal files compare with the best presets no larger than they."""
    tests = {f.file.label: f.difference for f in frontier.files if f.difference}
    if frontier.ratio is None:
        return ["No preset is as small as the optimal files: there is no comparison."]
    n_sure = sum(
        test.difference_high is not None and test.difference_high < 0
        for test in tests.values()
    )
    lines = [
        f"At {len(tests)} sizes the optimal file has {1 - frontier.ratio:.0%} less KLD "
        "than the best preset that is no larger (geometric mean); at "
        f"{n_sure} of them the 95 % interval of the difference is below 0."
    ]
    if worse := [label for label, test in tests.items() if test.difference > 0]:
        lines.append(f"Worse than a preset: {', '.join(worse)}.")
    return lines


def file_sizes(findings: Controls) -> set[int]:
    """Bytes of the plan's file and of the controls'."""
    files = [findings.plan, *(control.file for control in findings.controls)]
    return {file.size_bytes for file in files}

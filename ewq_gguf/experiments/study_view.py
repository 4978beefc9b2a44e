"""A study in 80 columns: its numbers with their errors, and what they allow to say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from statistics import fmean, pstdev
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ewq_gguf.bench.statistics import ALPHA
from ewq_gguf.errors import printable
from ewq_gguf.experiments.frontier_view import frontier_parts
from ewq_gguf.experiments.study_record import (
    Control,
    Controls,
    FactorSweep,
    Frontier,
    Sensitivity,
    Study,
    StudyFile,
)
from ewq_gguf.ggml_types import bits_per_weight
from ewq_gguf.records import Kld
from ewq_gguf.records.scores import RankCorrelation

_BAR = 24
#: Statistics beside each layer's divergence; the correlations have them all.
_SHOWN = {
    "softmax_entropy_nats": "softmax z",
    "histogram_entropy_bits": "histogram z",
    "std": "std z",
}
#: Below so many windows a bootstrap's intervals are too narrow.
_FEW_WINDOWS = 20
_ORDERS = {
    "random": "at random",
    "inverted": "inverted: the plan's lowest types to the highest entropies",
    "variance": "the lowest types to the largest variances",
    "first": "the lowest types to the first layers",
    "last": "the lowest types to the last layers",
}


def study_view(study: Study) -> RenderableType:
    """The whole view, for a rich console."""
    findings = study.findings
    if isinstance(findings, Sensitivity):
        parts = _sensitivity(findings)
        file = findings.floor
    elif isinstance(findings, Controls):
        parts = _controls(findings)
        file = findings.plan
    elif isinstance(findings, Frontier):
        parts = frontier_parts(findings)
        file = findings.files[0].file
    else:
        parts = _factors(findings)
        file = findings.files[0].file
    about = (
        f"{study.model.name}: {file.quality.name}, {file.quality.n_tokens:,} tokens "
        f"scored in {len(file.quality.chunks)} windows of {study.parameters.n_ctx}; "
        f"KLD in nats against {study.base.name}"
    )
    return Group(Text(printable(about)), Text(), *parts)


def _sensitivity(found: Sensitivity) -> list[RenderableType]:
    largest = max(_kld(one.file) for one in found.layers)
    names = {n: t for n, t in _SHOWN.items() if n in found.layers[0].statistics}
    layers = _table("layer", "KLD ±", *names.values())
    layers.add_column("")
    columns = [_z_texts([one.statistics[n] for one in found.layers]) for n in names]
    for one, *zs in zip(found.layers, *columns, strict=True):
        bar = _bar(_kld(one.file), largest)
        layers.add_row(str(one.layer_idx), _kld_text(one.file), *zs, bar)
    roles = _table("role", "tensors", "M weights", "KLD ±", left=1)
    roles.add_column("")
    largest = max(_kld(role.file) for role in found.roles)
    for role in sorted(found.roles, key=lambda role: -_kld(role.file)):
        roles.add_row(
            Text(printable(role.role)),
            str(role.n_tensors),
            f"{role.n_weights / 1e6:.2f}",
            _kld_text(role.file),
            _bar(_kld(role.file), largest),
        )
    ranks = _table("statistic of a layer's weights", "rho", "95 %", "p", left=1)
    for each in sorted(found.correlations, key=lambda c: -abs(c.correlation.rho or 0)):
        ranks.add_row(each.statistic, *_rank_cells(each.correlation))
    return [
        Text(f"one layer at {found.ggml_type}, everything else as the base has it"),
        layers,
        Text("z: how many standard deviations it lies from the layers' mean"),
        Text(),
        Text(f"one role at {found.ggml_type} in every layer"),
        roles,
        Text(),
        Text("Spearman's correlation with the layers' KLD"),
        ranks,
        Text(),
        *(Text(line) for line in sensitivity_sentences(found)),
    ]


def sensitivity_sentences(found: Sensitivity) -> list[str]:
    """What can and cannot be said."""
    total = sum(_kld(one.file) for one in found.layers)
    tests = [c for c in found.correlations if c.correlation.p is not None]
    low = [c.statistic for c in tests if _excludes_zero(c.correlation)]
    names = f" ({', '.join(low)})" if low else ""
    floor = _kld(found.floor)
    lines = [
        f"Nothing quantised: KLD {floor:.3g}, "
        f"{'as it must be' if floor == 0 else 'which should be 0'}.",
        f"All layers at Q8_0: KLD {_kld(found.rounding):.5f}; the rounding of "
        "activations that any quantised matrix brings with it costs no more. The "
        f"layers one at a time at {found.ggml_type} sum to {total:.5f}.",
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


def _rank_cells(test: RankCorrelation) -> list[str]:
    if test.rho is None:
        return ["·", "constant", "·"]
    interval = "·" if test.low is None else f"{test.low:+.2f} to {test.high:+.2f}"
    p = "·" if test.p is None else f"{test.p:.2g}"
    return [f"{test.rho:+.2f}", interval, p]


def _controls(found: Controls) -> list[RenderableType]:
    sizes = {one.file.size_bytes for one in found.controls} | {found.plan.size_bytes}
    table = _table("file", "KLD ±", "less the plan's", "95 %", left=1)
    if len(sizes) > 1:
        table.add_column("bytes", justify="right")
    ranked = sorted(
        [(found.plan, None), *((one.file, one) for one in found.controls)],
        key=lambda pair: _kld(pair[0]),
    )
    for file, control in ranked:
        cells = ["", ""] if control is None else _difference_cells(control)
        if len(sizes) > 1:
            cells.append(f"{file.size_bytes:,}")
        table.add_row(
            Text(printable(file.label)),
            _kld_text(file),
            *cells,
            style="bold" if control is None else "",
        )
    orders = dict.fromkeys(one.order for one in found.controls)
    return [
        Text(f"layers of each file: {_counts(found.plan)}"),
        table,
        Text(),
        *(Text(f"{order}: {_ORDERS[order]}") for order in orders),
        Text(),
        *(Text(line) for line in controls_sentences(found)),
    ]


def _difference_cells(control: Control) -> list[str]:
    test = control.difference
    if test.difference_low is None:
        return [f"{test.difference:+.5f}", "·"]
    return [
        f"{test.difference:+.5f}",
        f"{test.difference_low:+.5f} to {test.difference_high:+.5f}",
    ]


def controls_sentences(found: Controls) -> list[str]:
    """What can and cannot be said of the plan's choice of layers."""
    sizes = {one.file.size_bytes for one in found.controls} | {found.plan.size_bytes}
    random = [one for one in found.controls if one.order == "random"]
    n = len(random) + 1
    least = (
        f"; with {n - 1} random ones it cannot be less than {1 / n:.2f}, and 19 are "
        "the fewest that could show anything"
        if n < 1 / ALPHA
        else ""
    )
    verdict = (
        "are a better choice than chance's"
        if found.p <= ALPHA
        else "are not shown to be a better choice than chance's"
    )
    lines = [
        f"Every file has {next(iter(sizes)):,} bytes."
        if len(sizes) == 1
        else f"The files are not of one size: {min(sizes):,} to {max(sizes):,} bytes.",
        f"Among {n} plans with as many layers of each type, it and {n - 1} random "
        f"ones, the plan is number {found.rank} by KLD. Were its layers chosen at "
        f"random, it would be as good or better with probability {found.p:.2f}{least}.",
        f"On this model, type and text the layers that the plan quantises {verdict}.",
    ]
    sides: dict[str, list[str]] = {"worse": [], "better": [], "equal": [], "same": []}
    for one in found.controls:
        sides[_side(one)].append(one.file.label)
    for side, text in (
        ("worse", "Worse than the plan: {}."),
        ("better", "Better than the plan: {}."),
        ("equal", "Not to be told from the plan: {}."),
        ("same", "The plan itself under another name: {}."),
    ):
        if sides[side]:
            lines.append(text.format(", ".join(sides[side])))
    if found.plan.quality.chunks and len(found.plan.quality.chunks) < _FEW_WINDOWS:
        lines.append(
            f"With {len(found.plan.quality.chunks)} windows the intervals are too "
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


def _factors(found: FactorSweep) -> list[RenderableType]:
    table = _table("factor", "MB", "bpw", "KLD ±", "perplexity ±")
    table.add_column("layers")
    for _, run in groupby(found.files, key=lambda one: one.file.quality.chunks):
        alike = list(run)
        file = alike[0].file
        factors = dict.fromkeys(f"{one.factor:g}" for one in (alike[0], alike[-1]))
        table.add_row(
            " - ".join(factors),
            f"{file.size_bytes / 1e6:,.1f}",
            f"{file.bpw:.3f}",
            _kld_text(file),
            f"{file.quality.ppl:.3f} ±{file.quality.ppl_stderr:.3f}",
            _counts(file),
        )
    return [table]


def _counts(file: StudyFile) -> str:
    """`27 BF16 · 2 Q8_0 · 1 Q4_K`, most bits first."""
    counts = Counter(name or "mixed" for name in file.layer_types)
    names = sorted(counts, key=lambda n: 0.0 if n == "mixed" else -bits_per_weight(n))
    return " · ".join(f"{counts[name]} {name}" for name in names)


def _table(*names: str, left: int = 0) -> Table:
    """Columns of numbers, the first `left` ones of words."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for i, name in enumerate(names):
        justify: Literal["left", "right"] = "left" if i < left else "right"
        table.add_column(name, justify=justify, no_wrap=i > 0)
    return table


def _numbers(file: StudyFile) -> Kld:
    assert file.quality.kld is not None
    return file.quality.kld


def _kld(file: StudyFile) -> float:
    return _numbers(file).kld_mean_nats


def _z_texts(values: Sequence[float]) -> list[str]:
    """How many standard deviations each lies from their mean."""
    mean, std = fmean(values), pstdev(values)
    return [f"{(value - mean) / std:+.2f}" if std else "-" for value in values]


def _kld_text(file: StudyFile) -> str:
    error = _numbers(file).stderr.get("kld_mean_nats")
    return f"{_kld(file):.5f}" + ("" if error is None else f" ±{error:.5f}")


def _bar(value: float, largest: float) -> Text:
    return Text("█" * round(_BAR * value / largest) if largest else "")

"""A study in 80 columns: its numbers with their errors, and sentences on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from statistics import fmean, pstdev

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ewq_gguf.errors import printable
from ewq_gguf.experiments.controls import kld_mean
from ewq_gguf.experiments.frontier_view import frontier_parts
from ewq_gguf.experiments.study_record import (
    Control,
    Controls,
    FactorSweep,
    Frontier,
    LayerProbe,
    RoleProbe,
    Sensitivity,
    Study,
    StudyFile,
)
from ewq_gguf.experiments.study_sentences import (
    controls_sentences,
    file_sizes,
    sensitivity_sentences,
)
from ewq_gguf.ggml_types import bits_per_weight
from ewq_gguf.records.scores import RankCorrelation
from ewq_gguf.report.text import number_table

_BAR = 24
#: Statistics beside each layer's divergence; the correlations have them all.
_SHOWN = {
    "softmax_entropy_nats": "softmax z",
    "histogram_entropy_bits": "histogram z",
    "std": "std z",
}
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
        parts, file = _sensitivity(findings), findings.floor
    elif isinstance(findings, Controls):
        parts, file = _controls(findings), findings.plan
    elif isinstance(findings, Frontier):
        parts, file = frontier_parts(findings), findings.files[0].file
    else:
        parts, file = _factors(findings), findings.files[0].file
    about = (
        f"{study.model.name}: {file.quality.name}, {file.quality.n_tokens:,} tokens "
        f"scored in {len(file.quality.chunks)} windows of {study.parameters.n_ctx}; "
        f"KLD in nats against {study.base.name}"
    )
    return Group(Text(printable(about)), Text(), *parts)


def _sensitivity(findings: Sensitivity) -> list[RenderableType]:
    ggml_type = findings.ggml_type
    ranks = number_table("statistic of a layer's weights", "rho", "95 %", "p")
    for each in sorted(
        findings.correlations, key=lambda c: -abs(c.correlation.rho or 0)
    ):
        ranks.add_row(each.statistic, *_rank_cells(each.correlation))
    return [
        Text(f"one layer at {ggml_type}, everything else as the base has it"),
        _layers(findings.layers),
        Text("z: how many standard deviations it lies from the layers' mean"),
        Text(),
        Text(f"one role at {ggml_type} in every layer"),
        _roles(findings.roles),
        Text(),
        Text("Spearman's correlation with the layers' KLD"),
        ranks,
        Text(),
        *(Text(line) for line in sensitivity_sentences(findings)),
    ]


def _layers(probes: Sequence[LayerProbe]) -> Table:
    headings = {n: t for n, t in _SHOWN.items() if n in probes[0].statistics}
    table = number_table("layer", "KLD ±", *headings.values(), n_words=0)
    table.add_column("")
    columns = [_z_texts([probe.statistics[n] for probe in probes]) for n in headings]
    largest = max(kld_mean(probe.file) for probe in probes)
    for probe, *zs in zip(probes, *columns, strict=True):
        bar = _bar(kld_mean(probe.file), largest)
        table.add_row(str(probe.layer_idx), _kld_text(probe.file), *zs, bar)
    return table


def _roles(probes: Sequence[RoleProbe]) -> Table:
    table = number_table("role", "tensors", "M weights", "KLD ±")
    table.add_column("")
    largest = max(kld_mean(probe.file) for probe in probes)
    for probe in sorted(probes, key=lambda probe: -kld_mean(probe.file)):
        table.add_row(
            Text(printable(probe.role)),
            str(probe.n_tensors),
            f"{probe.n_weights / 1e6:.2f}",
            _kld_text(probe.file),
            _bar(kld_mean(probe.file), largest),
        )
    return table


def _rank_cells(test: RankCorrelation) -> list[str]:
    if test.rho is None:
        return ["·", "constant", "·"]
    interval = "·" if test.low is None else f"{test.low:+.2f} to {test.high:+.2f}"
    p = "·" if test.p is None else f"{test.p:.2g}"
    return [f"{test.rho:+.2f}", interval, p]


def _controls(findings: Controls) -> list[RenderableType]:
    sizes = file_sizes(findings)
    table = number_table("file", "KLD ±", "less the plan's", "95 %")
    if len(sizes) > 1:
        table.add_column("bytes", justify="right")
    ranked = sorted(
        [
            (findings.plan, None),
            *((control.file, control) for control in findings.controls),
        ],
        key=lambda pair: kld_mean(pair[0]),
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
    orders = dict.fromkeys(control.order for control in findings.controls)
    return [
        Text(f"layers of each file: {_counts(findings.plan)}"),
        table,
        Text(),
        *(Text(f"{order}: {_ORDERS[order]}") for order in orders),
        Text(),
        *(Text(line) for line in controls_sentences(findings)),
    ]


def _difference_cells(control: Control) -> list[str]:
    test = control.difference
    if test.difference_low is None:
        return [f"{test.difference:+.5f}", "·"]
    return [
        f"{test.difference:+.5f}",
        f"{test.difference_low:+.5f} to {test.difference_high:+.5f}",
    ]


def _factors(findings: FactorSweep) -> list[RenderableType]:
    table = number_table("factor", "MB", "bpw", "KLD ±", "perplexity ±", n_words=0)
    table.add_column("layers")
    for _, run in groupby(
        findings.files, key=lambda factor: factor.file.quality.chunks
    ):
        alike = list(run)
        file = alike[0].file
        factors = dict.fromkeys(
            f"{factor.factor:g}" for factor in (alike[0], alike[-1])
        )
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


def _z_texts(values: Sequence[float]) -> list[str]:
    """How many standard deviations each lies from their mean."""
    mean, std = fmean(values), pstdev(values)
    return [f"{(value - mean) / std:+.2f}" if std else "-" for value in values]


def _kld_text(file: StudyFile) -> str:
    assert file.quality.kld is not None
    error = file.quality.kld.stderr.get("kld_mean_nats")
    return f"{kld_mean(file):.5f}" + ("" if error is None else f" ±{error:.5f}")


def _bar(value: float, largest: float) -> Text:
    return Text("█" * round(_BAR * value / largest) if largest else "")

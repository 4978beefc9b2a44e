"""A frontier in 80 columns and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from ewq_gguf.errors import ToolError, printable
from ewq_gguf.experiments.controls import kld_mean
from ewq_gguf.experiments.study_record import Frontier, FrontierFile, Study
from ewq_gguf.experiments.study_sentences import frontier_sentences
from ewq_gguf.report.text import number_table
from ewq_gguf.size_text import size_text

#: Colours for the colour-blind too (Okabe and Ito), and markers.
_STYLES = {
    "preset": ("#999999", "s"),
    "ewq": ("#E69F00", "^"),
    "fastewq": ("#56B4E9", "v"),
    "optimal": ("#D55E00", "o"),
}
_Z95 = 1.96


def frontier_parts(frontier: Frontier) -> list[RenderableType]:
    """The table, and sentences below it."""
    table = number_table("file", "size", "bpw", "KLD ±", "KLD vs best preset")
    for column in table.columns:
        column.no_wrap = True
    for entry in frontier.files:
        table.add_row(
            Text(printable(entry.file.label)),
            size_text(entry.file.size_bytes),
            f"{entry.file.bpw:.2f}",
            f"{kld_mean(entry.file):.5f} ±{_stderr(entry):.5f}",
            _difference(entry, frontier),
            style="bold" if entry.source == "optimal" else "",
        )
    return [table, Text(), *(Text(line) for line in frontier_sentences(frontier))]


def draw_frontier(study: Study, path: Path) -> None:
    """Draw size against divergence; the suffix says how, such as .png or .svg.

    Files with an importance matrix are filled, the others hollow.

    Raises:
        ToolError: matplotlib is missing, or does not know the suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ToolError(
            "frontier",
            "matplotlib",
            "is not installed",
            "install it with pip install 'ewq-gguf[plot]'",
        ) from error
    assert isinstance(study.findings, Frontier)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for source in _STYLES:
        _draw_points(
            axes, source, [f for f in study.findings.files if f.source == source]
        )
    for entry in named(study.findings):
        axes.annotate(
            entry.budget or entry.file.label.split()[0],
            _point(entry),
            xytext=(-3, -4),
            textcoords="offset points",
            fontsize=6,
            rotation=30,
            ha="right",
            va="top",
            color=_STYLES[entry.source][0],
        )
    axes.set_yscale("log")
    axes.set_xlabel("size, MB")
    axes.set_ylabel("mean KL divergence from the base, nats")
    axes.set_title(f"{study.model.name}, {study.parameters.texts[0].name}")
    axes.legend()
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=150, format=path.suffix.removeprefix(".") or "png")
    except ValueError as error:
        remedy = "use .png, .svg or .pdf"
        raise ToolError("frontier", path, "is of no known format", remedy) from error


def _draw_points(axes: Any, source: str, files: Sequence[FrontierFile]) -> None:
    """One policy's files, or the presets, with their intervals."""
    colour, marker = _STYLES[source]
    axes.errorbar(
        *zip(*(_point(entry) for entry in files), strict=True) if files else ([], []),
        yerr=[_Z95 * _stderr(entry) for entry in files],
        color=colour,
        marker=marker,
        linestyle="-" if source == "optimal" else "none",
        label=source,
    )
    if hollow := [_point(entry) for entry in files if not entry.has_imatrix]:
        axes.plot(
            *zip(*hollow, strict=True),
            color=colour,
            marker=marker,
            markerfacecolor="white",
            linestyle="none",
            zorder=3,
            label=f"{source}, no matrix",
        )


def _point(entry: FrontierFile) -> tuple[float, float]:
    """Size in MB and mean divergence in nats."""
    return entry.file.size_bytes / 1e6, kld_mean(entry.file)


def named(frontier: Frontier) -> list[FrontierFile]:
    """The files that a picture names, small to large.

    The optimal ones and presets, as long as no smaller file of the same source is
    better: below and left of these is nothing of that source.
    """
    names: list[FrontierFile] = []
    best: dict[str, float] = {}
    for entry in sorted(frontier.files, key=_point):
        value, source = kld_mean(entry.file), entry.source
        if source in ("preset", "optimal") and value < best.get(source, inf):
            best[source] = value
            names.append(entry)
    return names


def _difference(entry: FrontierFile, frontier: Frontier) -> str:
    if entry.rival is None:
        return ""
    rival = next(f.file for f in frontier.files if f.file.label == entry.rival)
    return f"{kld_mean(entry.file) / kld_mean(rival) - 1:+.0%} {entry.rival}"


def _stderr(entry: FrontierFile) -> float:
    assert entry.file.quality.kld is not None
    return entry.file.quality.kld.stderr.get("kld_mean_nats", 0.0)

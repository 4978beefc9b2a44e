"""A frontier in 80 columns and as a picture."""

from __future__ import annotations

from math import inf
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ewq_gguf.errors import ToolError, printable
from ewq_gguf.experiments.controls import kld_mean
from ewq_gguf.experiments.study_record import Frontier, FrontierFile, Study
from ewq_gguf.report.text import size_text

#: Colours that are told apart by everybody (Okabe and Ito).
_STYLES = {
    "preset": ("#999999", "s"),
    "ewq": ("#E69F00", "^"),
    "fastewq": ("#56B4E9", "v"),
    "optimal": ("#D55E00", "o"),
}
_Z95 = 1.96


def frontier_parts(found: Frontier) -> list[RenderableType]:
    """The table, and what it says."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("file", no_wrap=True)
    for name in ("size", "bpw", "KLD ±", "beside the best preset"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found.files:
        table.add_row(
            Text(printable(one.file.label)),
            size_text(one.file.size_bytes),
            f"{one.file.bpw:.2f}",
            f"{kld_mean(one.file):.5f} ±{_stderr(one):.5f}",
            _beside(one, found),
            style="bold" if one.source == "optimal" else "",
        )
    return [table, Text(), *(Text(line) for line in frontier_sentences(found))]


def frontier_sentences(found: Frontier) -> list[str]:
    """What can and cannot be said."""
    optimal = [one for one in found.files if one.difference is not None]
    if found.ratio is None:
        return ["No preset is as small as the optimal files: there is no comparison."]
    worse = [one for one in optimal if one.difference and one.difference.difference > 0]
    sure = [
        one
        for one in optimal
        if one.difference
        and one.difference.difference_high is not None
        and one.difference.difference_high < 0
    ]
    lines = [
        f"At {len(optimal)} sizes the optimal file has {1 - found.ratio:.0%} less KLD "
        "than the best preset that is no larger (geometric mean); at "
        f"{len(sure)} of them the 95 % interval of the difference is below 0."
    ]
    if worse:
        names = ", ".join(one.file.label for one in worse)
        lines.append(f"Worse than a preset: {names}.")
    return lines


def draw_frontier(study: Study, path: Path) -> None:
    """Draw size against divergence; the suffix says how, such as .png or .svg.

    Filled are files with an importance matrix.

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
    for source, (colour, marker) in _STYLES.items():
        files = [one for one in study.findings.files if one.source == source]
        axes.errorbar(
            [one.file.size_bytes / 1e6 for one in files],
            [kld_mean(one.file) for one in files],
            yerr=[_Z95 * _stderr(one) for one in files],
            color=colour,
            marker=marker,
            linestyle="-" if source == "optimal" else "none",
            label=source,
        )
        if hollow := [one for one in files if not one.has_imatrix]:
            axes.plot(
                [one.file.size_bytes / 1e6 for one in hollow],
                [kld_mean(one.file) for one in hollow],
                color=colour,
                marker=marker,
                markerfacecolor="white",
                linestyle="none",
                zorder=3,
                label=f"{source}, no matrix",
            )
    for one in named(study.findings):
        axes.annotate(
            one.budget or one.file.label.split()[0],
            (one.file.size_bytes / 1e6, kld_mean(one.file)),
            xytext=(-3, -4),
            textcoords="offset points",
            fontsize=6,
            rotation=30,
            ha="right",
            va="top",
            color=_STYLES[one.source][0],
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
        known = "use .png, .svg or .pdf"
        raise ToolError("frontier", path, "is of no known format", known) from error


def named(found: Frontier) -> list[FrontierFile]:
    """Files that a picture has room to name, small to large.

    The optimal ones and presets, as long as none of their kind of as many bytes is
    better: below and left of these is nothing of that kind.
    """
    names: list[FrontierFile] = []
    best: dict[str, float] = {}
    for one in sorted(
        found.files, key=lambda one: (one.file.size_bytes, kld_mean(one.file))
    ):
        value = kld_mean(one.file)
        if one.source in ("preset", "optimal") and value < best.get(one.source, inf):
            best[one.source] = value
            names.append(one)
    return names


def _beside(one: FrontierFile, found: Frontier) -> str:
    if one.rival is None:
        return ""
    rival = next(f.file for f in found.files if f.file.label == one.rival)
    return f"{kld_mean(one.file) / kld_mean(rival) - 1:+.0%} {one.rival}"


def _stderr(one: FrontierFile) -> float:
    assert one.file.quality.kld is not None
    return one.file.quality.kld.stderr.get("kld_mean_nats", 0.0)

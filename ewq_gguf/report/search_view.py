"""A search in 80 columns: what was tried, what it was worth, and what won."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from ewq_gguf.errors import printable
from ewq_gguf.records import Search, SearchedFile
from ewq_gguf.report.text import Column, Map
from ewq_gguf.size_text import size_text

#: More were tried than anyone reads; the plan's JSON has them all.
_MAX_ROWS = 12


def search_view(search: Search) -> RenderableType:
    """The best files, and in words how they were found."""
    files = search.files[:_MAX_ROWS]
    left = len(search.files) - len(files)
    more = [Text(f"... and {left} more")] if left else []
    return Group(_files(search, files), *more, Text(), Text(_foot(search)))


def search_line(search: Search) -> str:
    """Who won, and by how much over the best of the others."""
    best = search.files[0]
    own = best.kind == "optimal"
    rest = [f for f in search.files[1:] if (f.kind == "optimal") != own]
    against = next((file for file in rest if file.difference is not None), None)
    won = f"{best.name} is best" if own else f"{best.name} is best, and is what you get"
    text = f"{won}: KLD {best.many_nats:.4f} nats"
    if against is None or against.many_nats is None or against.difference is None:
        return text
    sure = against.difference.difference_low
    doubt = "" if sure is not None and sure > 0 else ", which may be chance"
    return f"{text}, {against.name} {against.many_nats:.4f}{doubt}"


def _files(search: Search, files: tuple[SearchedFile, ...]) -> Map:
    def numbers(name: str, cells: list[str]) -> Column:
        return Column(name, [Text(cell) for cell in cells], is_number=True)

    return Map(
        [Column("file", [Text(printable(file.name)) for file in files])],
        [
            numbers("size", [size_text(file.size_bytes) for file in files]),
            numbers(
                "predicted",
                [f"{f.predicted_nats:.4f} ±{f.predicted_std_nats:.4f}" for f in files],
            ),
            numbers(
                f"KLD, {search.n_few} windows", [_nats(file.few_nats) for file in files]
            ),
            numbers(
                f"KLD, {search.n_many} windows",
                [_nats(file.many_nats) for file in files],
            ),
            *(
                [numbers("tokens/s", [_tps(file) for file in files])]
                if any(file.tps for file in files)
                else []
            ),
            numbers("dKLD vs best [95 %]", [_difference(file) for file in files]),
        ],
    )


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _tps(file: SearchedFile) -> str:
    return "-" if file.tps is None else f"{file.tps:.1f}"


def _difference(file: SearchedFile) -> str:
    found = file.difference
    if found is None:
        return "-"
    if found.difference_low is None or found.difference_high is None:
        return f"{found.difference:+.4f}"
    return (
        f"{found.difference:+.4f} ({found.difference_low:+.4f} to "
        f"{found.difference_high:+.4f})"
    )


def _foot(search: Search) -> str:
    error = (
        "" if search.prediction_error is None
        else f" Predictions were {search.prediction_error:.0%} off (median)."
    )  # fmt: skip
    left = (
        f" {search.n_left_out} files no larger were not measured: by the prediction, "
        "at three standard deviations, they cannot win."
        if search.n_left_out
        else ""
    )
    return (
        f"{search.n_probes} probes, at {search.probe_type} first, told what tensors "
        f"cost; rounding activations costs the best {search.floor_nats:.4f} nats."
        f"{error}{left} Measured on text that the model wrote, "
        "which calibrated nothing; intervals are 95 %."
    )

"""A search in 80 columns: files with their predictions and measurements."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from ewq_gguf.errors import printable
from ewq_gguf.records import Search, SearchedFile
from ewq_gguf.report.text import Column, Map
from ewq_gguf.size_text import size_text

#: Rows of the table at most; the plan's JSON has all files.
_MAX_ROWS = 12


def search_view(search: Search) -> RenderableType:
    """A table of the best files, and a paragraph about the search."""
    files = search.files[:_MAX_ROWS]
    left = len(search.files) - len(files)
    more = [Text(f"... and {left} more")] if left else []
    return Group(_files(search, files), *more, Text(), Text(_foot(search)))


def search_line(search: Search) -> str:
    """One line: the best file, and the best baseline or proposal beside it."""
    best = search.files[0]
    is_proposed = best.kind == "optimal"
    others = [f for f in search.files[1:] if (f.kind == "optimal") != is_proposed]
    other = next((file for file in others if file.difference is not None), None)
    chosen = "is best" if is_proposed else "is best, so this is the file you get"
    text = f"{best.name} {chosen}: KLD {best.many_nats:.4f} nats"
    if other is None or other.many_nats is None or other.difference is None:
        return text
    low = other.difference.difference_low
    doubt = "" if low is not None and low > 0 else ", which may be chance"
    return f"{text}, {other.name} {other.many_nats:.4f}{doubt}"


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
    paired = file.difference
    if paired is None:
        return "-"
    low, high = paired.difference_low, paired.difference_high
    if low is None or high is None:
        return f"{paired.difference:+.4f}"
    return f"{paired.difference:+.4f} [{low:+.4f}, {high:+.4f}]"


def _foot(search: Search) -> str:
    error = search.prediction_error
    sentences = [
        f"{search.n_probes} probes, first with {search.probe_type}, measured how "
        "sensitive tensors are.",
        f"Rounding activations costs the best file {search.floor_nats:.4f} nats.",
        f"The median error of predictions is {error:.0%}." if error is not None else "",
        f"{search.n_left_out} other files of this size or smaller were not measured: "
        "their predictions are worse than the best file by three standard deviations."
        if search.n_left_out
        else "",
        "Measured on text that the model wrote and that was not used for calibration; "
        "intervals are 95 %.",
    ]
    return " ".join(filter(None, sentences))

"""Versions of a model side by side, in several tables on a narrow terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ewq_gguf.errors import printable
from ewq_gguf.experiments.comparison_record import (
    ComparedFile,
    Comparison,
    Estimate,
    PairAcrossModels,
)
from ewq_gguf.experiments.comparison_words import notes, verdicts
from ewq_gguf.records import Speed
from ewq_gguf.report.text import Column, Map, size_text

_NONE = "·"
_MAX_NAME = 24

_Cell = Callable[[ComparedFile], str]


def comparison_view(comparison: Comparison) -> RenderableType:
    """The table, and what may and may not be said of it, for a rich console."""
    rows = comparison.rows
    names = [Text(printable(row.name, _MAX_NAME), style=_style(row)) for row in rows]
    columns = []
    for heading, cell in _COLUMNS.items():
        cells = [cell(row) for row in rows]
        if any(text != _NONE for text in cells):
            texts = [
                Text(text, style=_style(row))
                for text, row in zip(cells, rows, strict=True)
            ]
            columns.append(Column(heading, texts, is_number=True))
    return Group(
        Text(printable(comparison.model.name), style="bold"),
        Map([Column("version", names)], columns),
        Text(),
        *(Text(printable(line, 2000)) for line in notes(comparison)),
        *(part for verdict in verdicts(comparison) for part in _verdict(verdict)),
    )


def across_view(pairs: Sequence[PairAcrossModels]) -> RenderableType:
    """Versions over several models, a line per pair, for a rich console."""
    if not pairs:
        return Text("No version was measured on two models.")
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for heading in ("measure", "first", "second"):
        table.add_column(heading, overflow="fold", max_width=_MAX_NAME)
    for heading in ("models", "difference", "t", "p", "d"):
        table.add_column(heading, justify="right")
    for pair in pairs:
        test = pair.test
        cells = (
            [f"{test.mean:+.4g}", f"{test.t:.3g}", f"{test.p:.2g}"]
            + [f"{test.cohens_d:.2g}"]
            if test
            else [_NONE] * 4
        )
        names = (Text(printable(name)) for name in (pair.first, pair.second))
        table.add_row(pair.measure, *names, str(len(pair.models)), *cells)
    return Group(
        table,
        Text(),
        Text(
            "Differences are first minus second, over models; paired t-test, and "
            "Cohen's d with pooled population deviations, as in the paper's table 13. "
            "Lower is better, but of accuracy. Each p stands alone: of twenty such "
            "tests one is below 0.05 by chance."
        ),
    )


def _verdict(lines: Sequence[str]) -> list[Text]:
    head, *others = (printable(line, 2000) for line in lines)
    return [Text(), Text(head, style="bold"), *(Text(f"- {line}") for line in others)]


def _style(row: ComparedFile) -> str:
    return "bold" if row.kind == "plan" else ""


def _half(estimate: Estimate, digits: int, scale: float = 1.0) -> str:
    """`26.06 ±1.76`: half of the interval, which may lie a little askew."""
    text = f"{scale * estimate.value:.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return text
    half = scale * (estimate.high - estimate.low) / 2
    return f"{text} ±{half:.{digits}f}"


def _number(name: str, digits: int, scale: float = 1.0) -> _Cell:
    """A column of estimates, by their field of ComparedFile."""

    def cell(row: ComparedFile) -> str:
        estimate: Estimate | None = dict(row)[name]
        return _half(estimate, digits, scale) if estimate else _NONE

    return cell


def _speed(value: Callable[[Speed], tuple[float, float]], digits: int) -> _Cell:
    def cell(row: ComparedFile) -> str:
        if row.result.speed is None:
            return _NONE
        mean, deviation = value(row.result.speed)
        return f"{mean:.{digits}f} ±{deviation:.{digits}f}"

    return cell


def _memory(row: ComparedFile) -> str:
    memory = row.result.memory
    # What a model takes: on devices where it is there, else the process.
    return size_text(memory.device_bytes or memory.peak_rss_bytes) if memory else _NONE


#: The seeds' columns first; one that nothing was measured for is left out.
_COLUMNS: dict[str, _Cell] = {
    "memory": _memory,
    "tokens/s": _speed(lambda s: (s.generation_tps, s.generation_tps_std), 1),
    "MMLU, %": _number("accuracy", 1, 100),
    "perplexity": _number("ppl", 2),
    "ROUGE-L": _number("rouge_l", 3),
    "size": lambda row: size_text(row.result.size_bytes),
    "bpw": lambda row: f"{row.bpw:.2f}",
    "KLD": _number("kld_mean_nats", 5),
    "like base": _number("fidelity", 3),
    "same top, %": _number("top1_agreement", 1, 100),
    "MMLU ppl": _number("mmlu_perplexity", 3),
    "score": _number("composite_score", 3),
    "prompt/s": _speed(lambda s: (s.prompt_tps, s.prompt_tps_std), 0),
    "first, s": _speed(lambda s: (s.ttft_seconds, s.ttft_seconds_std), 2),
}

"""A comparison in 80 columns: its table, and sentences on what can be told apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import exp

from rich.console import Group, RenderableType
from rich.text import Text

from ewq_gguf.bench.statistics import accuracy_sentence, mean_sentence
from ewq_gguf.errors import printable
from ewq_gguf.experiments.comparison_record import (
    ComparedFile,
    ComparedPair,
    Comparison,
    Estimate,
)
from ewq_gguf.records import Speed
from ewq_gguf.records.scores import PairedMean
from ewq_gguf.report.text import Column, Map
from ewq_gguf.size_text import size_text

_NONE = "·"
_MAX_NAME = 24
#: The bootstrap's interval is too narrow below it.
_FEW_PIECES = 20
_Cell = Callable[[ComparedFile], str]


def comparison_view(comparison: Comparison) -> RenderableType:
    """The table, the notes on it and the sentences on each plan, for a rich console."""
    rows = comparison.rows
    names = [Text(printable(row.name, _MAX_NAME), style=_style(row)) for row in rows]
    columns = []
    scores = dict.fromkeys(name for row in rows for name in row.scores)
    for heading, cell in (_COLUMNS | {n: partial(_score, n) for n in scores}).items():
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
        *(part for lines in verdicts(comparison) for part in _verdict(lines)),
    )


def _verdict(lines: Sequence[str]) -> list[Text]:
    head, *others = (printable(line, 2000) for line in lines)
    return [Text(), Text(head, style="bold"), *(Text(f"- {line}") for line in others)]


def _style(row: ComparedFile) -> str:
    return "bold" if row.kind == "plan" else ""


def _number(name: str, digits: int, scale: float = 1.0) -> _Cell:
    """A column of estimates, by their field of ComparedFile: `26.06 ±1.76`."""
    return lambda row: _half(dict(row)[name], digits, scale)


def _score(name: str, row: ComparedFile) -> str:
    return _half(row.scores.get(name), 3)


def _half(estimate: Estimate | None, digits: int, scale: float = 1.0) -> str:
    """A number and half of its interval, which may lie a little askew."""
    if estimate is None:
        return _NONE
    text = f"{scale * estimate.value:.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ±{scale * (estimate.high - estimate.low) / 2:.{digits}f}"


def _speed(value: Callable[[Speed], tuple[float, float]], digits: int) -> _Cell:
    def cell(row: ComparedFile) -> str:
        if row.result.speed is None:
            return _NONE
        mean, deviation = value(row.result.speed)
        return f"{mean:.{digits}f} ±{deviation:.{digits}f}"

    return cell


def _memory(row: ComparedFile) -> str:
    memory = row.result.memory
    # The model's memory: on devices where it is there, else the process's.
    return size_text(memory.device_bytes or memory.peak_rss_bytes) if memory else _NONE


#: The paper's columns first; one that nothing was measured for is left out.
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


def notes(comparison: Comparison) -> list[str]:
    """How the table was measured, and which of its numbers say little."""
    first, matrix = comparison.rows[0], comparison.imatrix_sha256
    of_matrix = (
        f"one importance matrix ({matrix[:12]})" if matrix else "no importance matrix"
    )
    of_speed = ", of speeds the standard deviation" if comparison.n_turns else ""
    lines = [
        f"± is half of a 95 % interval{of_speed}. Quantised files were made with "
        f"{of_matrix}."
    ]
    if n_chunks := sum(len(text.chunks) for text in first.result.texts):
        unit = "lines" if first.result.parameters.is_lines else "windows"
        subject = "Perplexity and KLD are" if first.kld_mean_nats else "Perplexity is"
        lines.append(f"{subject} of {n_chunks} {unit} of text.")
        if n_chunks < _FEW_PIECES:
            lines[-1] += (
                f" Intervals of fewer than {_FEW_PIECES} are too narrow: take them as "
                "hints."
            )
    at_chance = [
        row.name
        for row in comparison.rows
        if row.result.mmlu is not None and row.result.mmlu.is_at_chance
    ]
    if at_chance:
        is_all = len(at_chance) == len(comparison.rows)
        names = "every version" if is_all else ", ".join(at_chance)
        lines.append(
            f"MMLU is at chance (25 %) for {names}: guessing explains that accuracy, "
            "and it says nothing of what quantisation costs."
        )
    if comparison.n_turns:
        times = f"{comparison.n_turns} turns" if comparison.n_turns > 1 else "one turn"
        lines.append(
            f"Speeds: mean and deviation of {times}, in each of which every file was "
            "timed once, one after another."
        )
    if not comparison.pairs:
        lines.append("No plan was compared: nothing is said of mixed precision here.")
    elif any(p.nll_nats or p.accuracy or p.scores for p in comparison.pairs):
        lines.append(
            "Each sentence below stands alone, at 95 %: of twenty such one is wrong by "
            "chance."
        )
    return lines


def verdicts(comparison: Comparison) -> list[list[str]]:
    """For each plan a heading and its sentences."""
    return [
        [
            f"{row.name}, {size_text(row.result.size_bytes)}",
            *_sentences(row, comparison),
        ]
        for row in comparison.rows
        if row.kind == "plan"
    ]


def _sentences(row: ComparedFile, comparison: Comparison) -> list[str]:
    """Files beside a plan in size; the smallest better one, the largest worse one."""
    pairs = {pair.second: pair for pair in comparison.pairs if pair.first == row.name}
    others = sorted(
        (other for other in comparison.rows if other.name in pairs),
        key=lambda other: other.result.size_bytes,
    )
    size_bytes, lines = row.result.size_bytes, []
    for other in others:
        if row.name in other.brackets:
            lines.append(
                f"Beside it in size: {other.name}, {_size_beside(other, row)}."
            )
            lines += _pair_sentences(pairs[other.name])
    better = [
        other
        for other in others
        if other.result.size_bytes <= size_bytes and _sign(pairs[other.name]) > 0
    ]
    if better:
        least = better[0]
        more = f" ({len(better) - 1} more such)" if len(better) > 1 else ""
        lines.append(
            f"A file that is no larger is better: {least.name}, "
            f"{_size_beside(least, row)}, has the lower "
            f"{_measure(pairs[least.name])[0]}{more}."
        )
    worse = [
        other
        for other in others
        if other.result.size_bytes > size_bytes
        and other.kind != "base"
        and _sign(pairs[other.name]) < 0
    ]
    if worse:
        most = max(worse, key=lambda other: other.result.size_bytes)
        lines.append(
            f"It is better than a larger file: {most.name}, {_size_beside(most, row)}, "
            f"has the higher {_measure(pairs[most.name])[0]}."
        )
    return lines


def _pair_sentences(pair: ComparedPair) -> list[str]:
    def sentence(
        name: str, test: PairedMean, more: str = "", pieces: str = "pieces"
    ) -> str:
        text = mean_sentence(name, pair.first, pair.second, test)
        return f"{text.removesuffix('.').replace('pieces', pieces)}{more}."

    lines = []
    if pair.kld_nats is not None:
        lines.append(sentence("KLD", pair.kld_nats))
    if (nll := pair.nll_nats) is not None:
        ratio = f"; its perplexity is {exp(nll.difference):.4f} times that of "
        lines.append(sentence("log perplexity", nll, f"{ratio}{pair.second}"))
    if pair.accuracy is not None:
        lines.append(accuracy_sentence(pair.first, pair.second, pair.accuracy))
    if pair.mmlu_nats is not None:
        lines.append(
            sentence("log MMLU perplexity", pair.mmlu_nats, pieces="questions")
        )
    if pair.composite_score is not None:
        more = ""
        if (t := pair.subjects) is not None:
            more = (
                f"; over {t.n} subjects t = {t.t:.2f}, p = {t.p:.2g}, "
                f"d = {t.cohens_d:.2f}"
            )
        lines.append(
            sentence("composite score", pair.composite_score, more, "questions")
        )
    for name, test in pair.scores.items():
        lines.append(sentence(name, test, pieces="questions"))
    return lines


def _measure(pair: ComparedPair) -> tuple[str, PairedMean | None]:
    """The divergence decides where it is known: the perplexity is far noisier."""
    if pair.kld_nats is not None:
        return "KLD", pair.kld_nats
    return "perplexity", pair.nll_nats


def _sign(pair: ComparedPair) -> int:
    """1 where the first is distinguishably worse, -1 where better, else 0."""
    _, test = _measure(pair)
    if test is None or test.difference_low is None or test.difference_high is None:
        return 0
    return int(test.difference_low > 0) - int(test.difference_high < 0)


def _size_beside(other: ComparedFile, row: ComparedFile) -> str:
    """`174.89 MB, 44 % smaller`."""
    theirs, ours = other.result.size_bytes, row.result.size_bytes
    size = size_text(theirs)
    if theirs == ours:
        return f"{size}, as large"
    share = abs(100 * (theirs / ours - 1))
    return f"{size}, {share:.3g} % {'smaller' if theirs < ours else 'larger'}"

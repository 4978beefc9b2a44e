"""What a comparison allows to say, in plain sentences, and what it does not."""

from __future__ import annotations

from math import exp

from ewq_gguf.bench.statistics import accuracy_sentence, mean_sentence
from ewq_gguf.experiments.comparison_record import (
    ComparedFile,
    ComparedPair,
    Comparison,
)
from ewq_gguf.records.scores import PairedMean
from ewq_gguf.size_text import size_text

#: The bootstrap's interval is too narrow below it.
_FEW_PIECES = 20


def notes(comparison: Comparison) -> list[str]:
    """How the table was measured, and which of its numbers mean little."""
    rows = comparison.rows
    lines = [_about(comparison)]
    if n_chunks := sum(len(text.chunks) for text in rows[0].result.texts):
        unit = "lines" if rows[0].result.parameters.is_lines else "windows"
        measures = "Perplexity and KLD" if rows[0].kld_mean_nats else "Perplexity"
        verb = "are" if rows[0].kld_mean_nats else "is"
        lines.append(f"{measures} {verb} of {n_chunks} {unit} of text.")
        if n_chunks < _FEW_PIECES:
            lines[-1] += (
                f" Intervals of fewer than {_FEW_PIECES} are too narrow: take them as "
                "hints."
            )
    if at_chance := [r.name for r in rows if r.result.mmlu and _is_at_chance(r)]:
        who = "every version" if len(at_chance) == len(rows) else ", ".join(at_chance)
        lines.append(
            f"MMLU is at chance (25 %) for {who}: guessing explains that accuracy, and "
            "it says nothing of what quantisation costs."
        )
    if comparison.n_turns:
        times = f"{comparison.n_turns} turns" if comparison.n_turns > 1 else "one turn"
        lines.append(
            f"Speeds: mean and deviation of {times}, in each of which every file was "
            "timed once, one after another."
        )
    if not comparison.pairs:
        lines.append("No plan was compared: nothing is said of mixed precision here.")
    elif any(pair.nll_nats or pair.accuracy for pair in comparison.pairs):
        lines.append(
            "Each sentence below stands alone, at 95 %: of twenty such one is wrong by "
            "chance."
        )
    return lines


def verdicts(comparison: Comparison) -> list[list[str]]:
    """For each plan a heading and its sentences."""
    by_name = {row.name: row for row in comparison.rows}
    return [
        [_heading(row), *_sentences(row, by_name, comparison.pairs)]
        for row in comparison.rows
        if row.kind == "plan"
    ]


def _about(comparison: Comparison) -> str:
    matrix = comparison.imatrix_sha256
    made = (
        f"one importance matrix ({matrix[:12]})" if matrix else "no importance matrix"
    )
    errors = "half of a 95 % interval"
    if comparison.n_turns:
        errors += ", of speeds the standard deviation"
    return f"± is {errors}. Quantised files were made with {made}."


def _is_at_chance(row: ComparedFile) -> bool:
    return row.result.mmlu is not None and row.result.mmlu.is_at_chance


def _heading(row: ComparedFile) -> str:
    return f"{row.name}, {size_text(row.result.size_bytes)}"


def _sentences(
    row: ComparedFile,
    by_name: dict[str, ComparedFile],
    pairs: tuple[ComparedPair, ...],
) -> list[str]:
    found = {pair.second: pair for pair in pairs if pair.first == row.name}
    beside = [by_name[name] for name in found if row.name in by_name[name].brackets]
    lines = []
    for other in sorted(beside, key=lambda other: other.result.size_bytes):
        lines.append(f"Beside it in size: {other.name}, {_size_beside(other, row)}.")
        lines += _pair_sentences(found[other.name])
    smaller = [
        other
        for other in (by_name[name] for name in found)
        if other.result.size_bytes <= row.result.size_bytes
    ]
    better = [o for o in smaller if _worse_by(found[o.name])]
    if better:
        least = min(better, key=lambda other: other.result.size_bytes)
        measure = _worse_by(found[least.name])
        others = len(better) - 1
        more = f" ({others} more such)" if others else ""
        lines.append(
            f"A file that is no larger is better: {least.name}, "
            f"{_size_beside(least, row)}, has the lower {measure}{more}."
        )
    larger = [
        other
        for name in found
        if (other := by_name[name]).kind != "base"
        and other.result.size_bytes > row.result.size_bytes
        and _better_by(found[name])
    ]
    if larger:
        most = max(larger, key=lambda other: other.result.size_bytes)
        lines.append(
            f"It is better than a larger file: {most.name}, {_size_beside(most, row)}, "
            f"has the higher {_better_by(found[most.name])}."
        )
    return lines


def _pair_sentences(pair: ComparedPair) -> list[str]:
    lines = []
    if pair.kld_nats is not None:
        lines.append(mean_sentence("KLD", pair.first, pair.second, pair.kld_nats))
    if (nll := pair.nll_nats) is not None:
        ratio = f"; its perplexity is {exp(nll.difference):.4f} times that of "
        sentence = mean_sentence("log perplexity", pair.first, pair.second, nll)
        lines.append(sentence.removesuffix(".") + f"{ratio}{pair.second}.")
    if pair.accuracy is not None:
        lines.append(accuracy_sentence(pair.first, pair.second, pair.accuracy))
    if (letters := pair.mmlu_nats) is not None:
        name = "log MMLU perplexity"
        sentence = mean_sentence(name, pair.first, pair.second, letters)
        lines.append(sentence.replace("pieces", "questions"))
    if (score := pair.composite_score) is not None:
        name = "composite score"
        sentence = mean_sentence(name, pair.first, pair.second, score)
        if (test := pair.subjects) is not None:
            sentence = sentence.removesuffix(".") + (
                f"; over {test.n} subjects t = {test.t:.2f}, p = {test.p:.2g}, "
                f"d = {test.cohens_d:.2f}."
            )
        lines.append(sentence.replace("pieces", "questions"))
    return lines


def _worse_by(pair: ComparedPair) -> str | None:
    """The first measure of text by which the first is distinguishably worse."""
    return next((name for name, test in _measures(pair) if _sign(test) > 0), None)


def _better_by(pair: ComparedPair) -> str | None:
    """The same, for better."""
    return next((name for name, test in _measures(pair) if _sign(test) < 0), None)


def _measures(pair: ComparedPair) -> list[tuple[str, PairedMean]]:
    """The divergence decides where it is known: the perplexity is far noisier."""
    if pair.kld_nats is not None:
        return [("KLD", pair.kld_nats)]
    return [("perplexity", pair.nll_nats)] if pair.nll_nats else []


def _sign(test: PairedMean) -> int:
    """1 where the first is distinguishably higher, -1 where lower, else 0."""
    if test.difference_low is None or test.difference_high is None:
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

"""Scores of questions and answers, in 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ewq_gguf.records.scores import (
    Fidelity,
    GenerationScores,
    MmluNumbers,
    MmluScores,
    RowFault,
    TextScores,
    TooLong,
)

#: Rows or prompts that are named; of more, the number is said.
_MAX_NAMED = 5
_MEASURES = ("BLEU (95 %)", "ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum")


def mmlu_view(scores: MmluScores) -> RenderableType:
    """A line per subject, the total, and what was not asked, for a rich console."""
    table = _table(f"MMLU, {scores.n_shots} shots")
    table.add_column("subject")
    for heading in ("asked", "right, %", "95 %", "perplexity"):
        table.add_column(heading, justify="right")
    for subject in scores.subjects:
        table.add_row(subject.subject.replace("_", " "), *_cells(subject))
    table.add_row("all questions", *_cells(scores), style="bold")
    return Group(table, *(Text(note) for note in _mmlu_notes(scores)))


def generation_view(scores: GenerationScores) -> RenderableType:
    """BLEU and ROUGE beside references and the base model, for a rich console."""
    if scores.references is None and scores.fidelity is None:
        n_answers = len(scores.answers)
        what = f"{n_answers} prompts were answered, and compared with nothing: there is"
        remedy = "neither a reference nor a --base. The answers are in --json."
        return Group(Text(f"{what} {remedy}"), *map(Text, _too_long(scores.too_long)))
    table = _table(f"Answers to {len(scores.answers)} prompts")
    table.add_column("")
    columns = [list(_MEASURES)]
    notes = _too_long(scores.too_long)
    if scores.references:
        table.add_column("beside references", justify="right")
        columns.append(_text_cells(scores.references))
        notes += _text_notes(scores.references)
    if scores.fidelity:
        table.add_column("beside the base model's", justify="right")
        columns.append(_text_cells(scores.fidelity.scores))
        notes.append(_fidelity_note(scores.fidelity))
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    return Group(table, *(Text(note) for note in notes))


def _fidelity_note(fidelity: Fidelity) -> str:
    error = fidelity.common_prefix_share_stderr
    margin = "" if error is None else f" ± {100 * error:.0f}"
    return (
        f"{fidelity.n_identical} answers are the base model's; the mean answer leaves "
        f"it after {fidelity.common_prefix_mean:.1f} tokens, "
        f"{100 * fidelity.common_prefix_share:.0f}{margin} % of its length."
    )


def _cells(numbers: MmluNumbers) -> list[str]:
    perplexity = f"{numbers.mmlu_perplexity:.3g}"
    if numbers.mmlu_perplexity_stderr is not None:
        perplexity += f" ±{numbers.mmlu_perplexity_stderr:.2g}"
    return [
        str(numbers.n),
        f"{100 * numbers.accuracy:.1f}",
        f"{100 * numbers.accuracy_low:.1f} - {100 * numbers.accuracy_high:.1f}",
        perplexity,
    ]


def _mmlu_notes(scores: MmluScores) -> list[str]:
    notes = []
    if scores.n < scores.n_available:
        notes.append(f"{scores.n} of {scores.n_available:,} questions were asked.")
    constant = f"{100 * scores.constant_accuracy:.1f} %"
    notes.append(
        f"The accuracy is {'at' if scores.is_at_chance else 'not at'} chance (25 %); "
        f"always {scores.constant_letter} would be {constant}."
    )
    if scores.n_without_letters:
        notes.append(
            f"{scores.n_without_letters} questions have no letter among the 100 "
            "likeliest tokens: 1/4 each in the perplexity."
        )
    return notes + _too_long(scores.too_long) + _faults(scores.faults)


def _too_long(skipped: Sequence[TooLong]) -> list[str]:
    if not skipped:
        return []
    longest = max(one.n_tokens for one in skipped)
    return [
        f"{len(skipped)} prompts were not asked: they need up to {longest:,} tokens of "
        f"context, there are {skipped[0].n_ctx:,}."
    ]


def _faults(faults: Sequence[RowFault]) -> list[str]:
    notes = []
    for is_left_out, what in ((True, "left out"), (False, "repeated, and kept")):
        some = [fault for fault in faults if fault.is_left_out == is_left_out]
        if some:
            notes.append(f"{len(some)} rows of the files were {what}:")
        notes += [f"  {f.file} row {f.row} {f.problem}" for f in some[:_MAX_NAMED]]
        if len(some) > _MAX_NAMED:
            notes.append(f"  and {len(some) - _MAX_NAMED} more, in --json")
    return notes


def _text_cells(scores: TextScores) -> list[str]:
    """One per line of _MEASURES."""
    bleu = f"{scores.bleu:.1f}"
    if scores.bleu_low is not None and scores.bleu_high is not None:
        bleu += f" ({scores.bleu_low:.1f} - {scores.bleu_high:.1f})"
    rouges = (
        (scores.rouge_1, scores.rouge_1_stderr),
        (scores.rouge_2, scores.rouge_2_stderr),
        (scores.rouge_l, scores.rouge_l_stderr),
        (scores.rouge_lsum, scores.rouge_lsum_stderr),
    )
    return [
        bleu,
        *(
            f"{mean:.4f}" + (f" ± {error:.4f}" if error is not None else "")
            for mean, error in rouges
        ),
    ]


def _text_notes(scores: TextScores) -> list[str]:
    counts = (
        (scores.n_empty_answers, "answers are empty and score 0."),
        (scores.n_empty_references, "references are empty; their pairs score 0."),
        (scores.n_wordless, "pairs have a side without a-z and 0-9: ROUGE 0."),
    )
    return [f"{n} {what}" for n, what in counts if n]


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=None,
        pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip

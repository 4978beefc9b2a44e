"""MMLU: questions with four choices, answered by the likeliest letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.questions.letters import ask
from ewq_gguf.bench.questions.mmlu_data import MmluTask, load_task
from ewq_gguf.bench.questions.mmlu_scores import mmlu_scores
from ewq_gguf.bench.questions.notes import fault_notes, too_long_notes
from ewq_gguf.bench.task import ResultTable, TaskOption, TaskRun
from ewq_gguf.bench.task import Settings as _Settings
from ewq_gguf.bench.task import Task as _Task
from ewq_gguf.checkpoint.hub_data import mmlu_folder
from ewq_gguf.records import MmluPart, Result
from ewq_gguf.records.scores import MmluNumbers, MmluOutcome, MmluScores

#: Tokens of context: the longest prompt with five examples has 3024.
_N_CTX = 4096


class Settings(_Settings):
    """Questions of MMLU that are asked, and their examples.

    Attributes:
        folder: holds test/ and dev/; absolute.
        n_shots: examples before each question.
        limit: questions per subject; None is all.
    """

    folder: str
    n_shots: int
    limit: int | None

    def task(self) -> MmluTask:
        """The prompts.

        Raises:
            UsageError, InputError, ToolError: as of `load_task`.
        """
        return load_task(Path(self.folder), n_shots=self.n_shots, limit=self.limit)

    def parameters(self) -> dict[str, object]:
        """The hash of all prompts and answers."""
        return {"mmlu_sha256": self.task().sha256}


class Task(_Task):
    """MMLU as lm-evaluation-harness's task `mmlu` asks it."""

    name = "mmlu"
    names = ("mmlu",)
    options = (
        TaskOption(
            "--mmlu",
            "MMLU's questions: a folder with test/ and dev/.  [EWQ_MMLU_DIR]",
            metavar="DIR|hub",
        ),
        TaskOption(
            "--shots",
            "Examples before each question of MMLU.",
            default=5,
            minimum=0,
            maximum=5,
        ),
        TaskOption(
            "--limit",
            "Questions of MMLU per subject; 0 is all 14 042.",
            default=10,
            minimum=0,
        ),
    )
    variable = "EWQ_MMLU_DIR"
    is_default = False
    remedy = "name a folder with test/ and dev/, or set EWQ_MMLU_DIR"

    def settings_of(self, values: Mapping[str, Any]) -> Settings | None:
        """The questions' folder, from the Hub where that is said."""
        if not (source := self.source(values)):
            return None
        folder = mmlu_folder(STAGE) if source == "hub" else Path(source)
        return Settings(
            folder=str(folder.absolute()),
            n_shots=values["shots"],
            limit=values["limit"] or None,
        )

    def measure(self, run: TaskRun) -> dict[str, object]:
        """Ask the questions that are not in the journal."""
        task = Settings.model_validate(run.job.settings).task()
        finished = run.finished(MmluPart)
        outcomes = {name: part.outcome for name, part in finished.items()}
        skipped = []
        for one in ask(run.model.model, task, n_ctx=_N_CTX, finished=set(finished)):
            if isinstance(one, MmluOutcome):
                outcomes[one.id] = one
                run.keep(MmluPart(name=one.id, outcome=one))
            else:
                skipped.append(one)
            run.tell((len(outcomes) + len(skipped)) / len(task.prompts))
        asked = [outcomes[name] for name in task.ids if name in outcomes]
        scores = mmlu_scores(task, asked, skipped)
        return {
            "mmlu": scores,
            "accuracy": scores.accuracy,
            "accuracy_stderr": scores.accuracy_stderr,
            "mmlu_perplexity": scores.mmlu_perplexity,
        }

    def tables(self, results: Sequence[Result]) -> list[ResultTable]:
        """A table for each file, with a row for each subject."""
        return [
            mmlu_table(result.mmlu, result.file.name)
            for result in results
            if result.mmlu
        ]


def mmlu_table(scores: MmluScores, file: str = "") -> ResultTable:
    """A row for each subject, the total, and what was not asked."""
    subjects = [(s.subject.replace("_", " "), *_cells(s)) for s in scores.subjects]
    return ResultTable(
        columns=("subject", "asked", "right, %", "95 %", "perplexity"),
        rows=[*subjects, ("all questions", *_cells(scores))],
        title=f"MMLU, {scores.n_shots} shots",
        above=file,
        notes=_notes(scores),
        has_total=True,
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


def _notes(scores: MmluScores) -> list[str]:
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
    return notes + too_long_notes(scores.too_long) + fault_notes(scores.faults)

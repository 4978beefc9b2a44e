"""Questions with choices of which the likeliest continuation is taken.

A task of this kind is a subclass of `ChoiceTask`: it reads its files, makes tokens of a
question, and says which choice each of its measures takes.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from ewq_gguf.bench.engines.scorer import STAGE, Model
from ewq_gguf.bench.questions.continuations import (
    Continuations,
    Likelihoods,
    likelihoods,
)
from ewq_gguf.bench.questions.notes import fault_notes, too_long_notes
from ewq_gguf.bench.statistics import wilson
from ewq_gguf.bench.task import ResultTable, Settings, Task, TaskRun
from ewq_gguf.errors import InputError
from ewq_gguf.records import ItemPart, Result
from ewq_gguf.records.scores import ItemScore, Measure, RowFault, TaskScores, TooLong

#: Tokens of context: of a question's choices, and of a group's together.
_N_CTX = 4096
#: As llama-perplexity's --hellaswag-tasks.
DEFAULT_LIMIT = 400


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question, as its file has it.

    Attributes:
        row: number in the file, from 1.
        prompt: text before each choice.
        choices: texts.
        answer: index of the right choice.
    """

    row: int
    prompt: str
    choices: tuple[str, ...]
    answer: int

    @property
    def key(self) -> str:
        """Everything that the model is asked, as a text."""
        return json.dumps([self.prompt, self.choices, self.answer])

    @property
    def id(self) -> str:
        """The same for every model that is asked."""
        return f"row {self.row}"


class ChoiceSettings(Settings):
    """A file of questions, and how many of them are asked.

    Attributes:
        task: name of the task.
        path: the file; absolute.
        limit: questions at most; None is all.
        seed: start of the random choice among them.
    """

    task: str
    path: str
    limit: int | None
    seed: int = 0

    def parameters(self) -> dict[str, object]:
        """The hash of all questions that are asked."""
        from ewq_gguf.bench.tasks import all_tasks

        (task,) = (one for one in all_tasks() if one.name == self.task)
        assert isinstance(task, ChoiceTask)
        questions, *_ = task.questions(self)
        return {"data_sha256": {self.task: data_hash(questions)}}


class ChoiceTask(Task):
    """A task of questions with choices.

    Attributes:
        title: heading of its table.
        measures: names, the most important first.
    """

    title: ClassVar[str]
    measures: ClassVar[tuple[str, ...]]
    is_default = False

    @abstractmethod
    def hub_file(self) -> Path:
        """The data set's file of the Hub.

        Raises:
            NetworkError, ResourceError: it cannot be fetched.
        """

    @abstractmethod
    def read(self, path: Path) -> Iterable[ChoiceQuestion | RowFault]:
        """All rows of a file, sound or not.

        Raises:
            InputError: it cannot be read at all.
        """

    @abstractmethod
    def tokenize(self, model: Model, question: ChoiceQuestion) -> Continuations:
        """The tokens of each choice with the prompt before it."""

    @abstractmethod
    def chosen(
        self, question: ChoiceQuestion, scored: Likelihoods
    ) -> Mapping[str, int]:
        """Index of the choice that each measure takes."""

    def settings_of(self, values: Mapping[str, Any]) -> ChoiceSettings | None:
        """The questions' file, from the Hub where that is said."""
        if not (source := self.source(values)):
            return None
        path = self.hub_file() if source == "hub" else Path(source)
        limit = values[f"{self.name}_limit"] or None
        return ChoiceSettings(task=self.name, path=str(path.absolute()), limit=limit)

    def questions(
        self, settings: ChoiceSettings
    ) -> tuple[list[ChoiceQuestion], list[RowFault], int]:
        """The questions that are asked, the rows with faults, and the sound questions.

        Those with the smallest hashes of seed and question are asked: the same on every
        machine, and a lower limit takes some of a higher one's.

        Raises:
            InputError: the file cannot be read, or no question in it is sound.
        """
        path = Path(settings.path)
        rows = list(self.read(path))
        faults = [row for row in rows if isinstance(row, RowFault)]
        sound = [row for row in rows if isinstance(row, ChoiceQuestion)]
        if not sound:
            first = f"; row {faults[0].row} {faults[0].problem}" if faults else ""
            problem = f"has no sound question{first}"
            raise InputError(STAGE, path, problem, self.remedy)

        def rank(question: ChoiceQuestion) -> tuple[bytes, int]:
            key = f"{settings.seed}\0{question.key}"
            return hashlib.sha256(key.encode()).digest(), question.row

        chosen = sorted(sound, key=rank)[: settings.limit]
        return sorted(chosen, key=lambda q: q.row), faults, len(sound)

    def measure(self, run: TaskRun) -> dict[str, object]:
        """Ask the questions that are not in the journal."""
        settings = ChoiceSettings.model_validate(run.job.settings)
        questions, faults, n_available = self.questions(settings)
        by_id = {question.id: question for question in questions}
        items = {name: part.item for name, part in run.finished(ItemPart).items()}
        tokens = [self.tokenize(run.model.model, question) for question in questions]
        skipped: list[TooLong] = []
        for one in likelihoods(
            run.model.model, tokens, n_ctx=_N_CTX, finished=set(items)
        ):
            if isinstance(one, TooLong):
                skipped.append(one)
            else:
                items[one.id] = self._item(by_id[one.id], one)
                run.keep(ItemPart(name=one.id, item=items[one.id]))
            run.tell((len(items) + len(skipped)) / len(questions))
        if not items:
            problem = f"all {len(skipped)} questions are longer than {_N_CTX} tokens"
            raise InputError(STAGE, self.name, problem, "give shorter ones")
        ordered = [items[q.id] for q in questions if q.id in items]
        scores = TaskScores(
            n=len(ordered),
            n_available=n_available,
            limit=settings.limit,
            seed=settings.seed,
            data_sha256=data_hash(questions),
            chance=fmean(1 / len(item.nats) for item in ordered),
            measures={
                name: share([item.values[name] for item in ordered])
                for name in self.measures
            },
            items=tuple(ordered),
            too_long=tuple(skipped),
            faults=tuple(faults),
        )
        return {"scores": {self.name: scores}}

    def _item(self, question: ChoiceQuestion, scored: Likelihoods) -> ItemScore:
        chosen = self.chosen(question, scored)
        return ItemScore(
            id=question.id,
            answer=question.answer,
            nats=tuple(scored.nats.tolist()),
            values={
                name: float(index == question.answer) for name, index in chosen.items()
            },
        )

    def tables(self, results: Sequence[Result]) -> list[ResultTable]:
        """A row for each file."""
        rows = [
            (result.file.name, result.scores[self.name])
            for result in results
            if self.name in result.scores
        ]
        if not rows:
            return []
        _, first = rows[0]
        notes = [
            f"{first.n:,} of {first.n_available:,} questions; guessing gives "
            f"{100 * first.chance:.1f} %.",
            *too_long_notes(first.too_long),
            *fault_notes(first.faults),
        ]
        columns = [text for name in self.measures for text in (f"{name}, %", "95 %")]
        return [
            ResultTable(
                columns=("file", "asked", *columns),
                rows=[
                    [name, f"{scores.n:,}", *_cells(scores)] for name, scores in rows
                ],
                title=self.title,
                notes=notes,
            )
        ]


def share(values: Sequence[float]) -> Measure:
    """The share of right answers, with Wilson's interval; 0 or 1 each."""
    n, value = len(values), fmean(values)
    low, high = wilson(round(sum(values)), n)
    stderr = sqrt(value * (1 - value) / (n - 1)) if n > 1 else None
    return Measure(value=value, stderr=stderr, low=low, high=high)


def data_hash(questions: Iterable[ChoiceQuestion]) -> str:
    """SHA-256 of all questions and their ids, by which outcomes are paired."""
    texts = (f"{question.id} {question.key}\0" for question in questions)
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def _cells(scores: TaskScores) -> list[str]:
    cells = []
    for one in scores.measures.values():
        assert one.low is not None
        assert one.high is not None
        cells += [
            f"{100 * one.value:.1f}",
            f"{100 * one.low:.1f} - {100 * one.high:.1f}",
        ]
    return cells

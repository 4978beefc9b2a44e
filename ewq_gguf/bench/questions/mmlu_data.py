"""MMLU's questions: read, chosen, and written as prompts.

The prompt is that of lm-evaluation-harness's task `mmlu`, to the character: questions
stripped, choices as they are, the first n of dev as examples, ` A` to ` D` as answers.

Source: Hendrycks et al., arXiv:2009.03300; lm-evaluation-harness 0.4.13.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import cast

from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.questions.mmlu_files import (
    LETTERS,
    REMEDY,
    SubjectRows,
    find_subjects,
)
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.records.scores import Letter, RowFault

#: 10 of each of 57 subjects: a standard error of 1.8 points at chance.
DEFAULT_LIMIT = 10
MAX_SHOTS = 5

_N_FIELDS = 6


@dataclass(frozen=True)
class Question:
    """A question with four choices.

    Attributes:
        subject: such as `college_physics`.
        row: number in its file, from 1.
        text: as in the file.
        choices: four, as in the file.
        answer: the right one's letter.
    """

    subject: str
    row: int
    text: str
    choices: tuple[str, ...]
    answer: Letter

    @property
    def id(self) -> str:
        """Subject and row: the same for every model that is asked."""
        return f"{self.subject}/{self.row}"

    @property
    def block(self) -> str:
        """The question, its choices and `Answer:`."""
        lines = [
            f"{letter}. {choice}"
            for letter, choice in zip(LETTERS, self.choices, strict=True)
        ]
        return "\n".join([self.text.strip(), *lines, "Answer:"])


@dataclass(frozen=True)
class Prompt:
    """A text whose next token a model is asked for.

    A tokenizer may join characters across the seam: tokenize `text`, not the halves,
    and look for the tokens that a subject's prompts share (`tokens.n_shared_tokens`).

    Attributes:
        question: asked.
        prefix: header and examples, the same for the whole subject.
        suffix: the question's own.
    """

    question: Question
    prefix: str
    suffix: str

    @property
    def text(self) -> str:
        """All of it."""
        return self.prefix + self.suffix


@dataclass(frozen=True)
class MmluTask:
    """The prompts of a run, and how they were chosen.

    Attributes:
        prompts: by subject, each subject's together.
        n_shots: examples in each prefix.
        limit: questions per subject at most; None is all.
        seed: start of the random choice.
        n_available: sound questions in the files.
        faults: rows with faults, those of dev included where examples are used.
    """

    prompts: tuple[Prompt, ...]
    n_shots: int
    limit: int | None
    seed: int
    n_available: int
    faults: tuple[RowFault, ...]

    @property
    def ids(self) -> list[str]:
        """Ids of its questions."""
        return [prompt.question.id for prompt in self.prompts]

    @property
    def sha256(self) -> str:
        """Hash of all prompts and answers; equal where two models can be compared."""
        # With the ids, by which outcomes are kept and paired.
        texts = (
            f"{p.question.id} {p.text} {p.question.answer}\0" for p in self.prompts
        )
        return hashlib.sha256("".join(texts).encode()).hexdigest()


def load_task(
    folder: Path,
    *,
    n_shots: int = MAX_SHOTS,
    limit: int | None = DEFAULT_LIMIT,
    seed: int = 0,
    subjects: Sequence[str] = (),
) -> MmluTask:
    """Read questions and make prompts of them.

    Args:
        folder: with test/SUBJECT_test.csv and dev/SUBJECT_dev.csv (question, four
            choices, answer; no header), or the Hub's SUBJECT/test-*.parquet; or the
            Hub's folder `all` itself.
        n_shots: 0 to 5.
        limit: questions per subject; None is all.
        seed: start of the random choice among them.
        subjects: names, or none for all.

    Raises:
        UsageError: a subject that is not there, or numbers out of range.
        InputError: a file is missing, empty or not sound, no question is, or a subject
            has too few examples.
        ToolError: pyarrow is missing for a parquet file.
    """
    if not 0 <= n_shots <= MAX_SHOTS or (limit is not None and limit < 1):
        problem = f"{n_shots} shots and a limit of {limit} are out of range"
        raise UsageError(STAGE, "mmlu", problem, "0 to 5 shots, a limit of 1 or more")
    faults: list[RowFault] = []
    files = _select(find_subjects(folder, "test"), subjects)
    questions = {
        subject: _read(subject, found, faults) for subject, found in files.items()
    }
    examples: dict[str, list[Question]] = {}
    if n_shots:
        examples = {
            subject: _read(subject, found, faults)
            for subject, found in find_subjects(folder, "dev").items()
            if questions.get(subject)
        }
    if not any(questions.values()):
        problem = f"none of its {len(files)} subjects has a sound question"
        raise InputError(STAGE, folder, problem, REMEDY)
    chosen = (choose(found, limit, seed) for found in questions.values())
    return MmluTask(
        prompts=make_prompts((q for some in chosen for q in some), examples, n_shots),
        n_shots=n_shots,
        limit=limit,
        seed=seed,
        n_available=sum(len(found) for found in questions.values()),
        faults=tuple(faults),
    )


def choose(
    questions: Sequence[Question], limit: int | None, seed: int
) -> list[Question]:
    """The same `limit` questions of a subject on every machine, in the file's order.

    Those with the smallest hashes of seed and question are taken, so a lower limit
    takes some of a higher one's, and other rows of the file change nothing.
    """
    if limit is None or limit >= len(questions):
        return list(questions)

    def rank(question: Question) -> tuple[bytes, int]:
        key = f"{seed}\0{question.subject}\0{question.block}"
        return hashlib.sha256(key.encode()).digest(), question.row

    return sorted(sorted(questions, key=rank)[:limit], key=lambda q: q.row)


def make_prompts(
    questions: Iterable[Question],
    examples: Mapping[str, Sequence[Question]],
    n_shots: int,
) -> tuple[Prompt, ...]:
    """The standard prompt of each question.

    Args:
        questions: any, each subject's together.
        examples: by subject, those of dev.
        n_shots: how many of them come first.

    Raises:
        InputError: a subject has fewer examples.
    """
    prompts = []
    for subject, group in groupby(questions, key=lambda question: question.subject):
        shown = examples.get(subject, ())[:n_shots]
        if len(shown) < n_shots:
            problem = f"dev has {len(shown)} sound examples, {n_shots} are needed"
            raise InputError(STAGE, subject, problem, "ask with fewer --shots")
        header = (
            "The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n"
        )
        prefix = header + "".join(f"{q.block} {q.answer}\n\n" for q in shown)
        prompts += [Prompt(question, prefix, question.block) for question in group]
    return tuple(prompts)


def _select(
    files: Mapping[str, SubjectRows], subjects: Sequence[str]
) -> dict[str, SubjectRows]:
    """The subjects asked for; all where none is named."""
    for subject in subjects:
        if subject not in files:
            near = difflib.get_close_matches(subject, files, 1)
            remedy = f"the nearest is {near[0]}" if near else "see the files' names"
            raise UsageError(STAGE, subject, "is not a subject here", remedy)
    return {name: files[name] for name in files if name in subjects or not subjects}


def _read(subject: str, rows: SubjectRows, faults: list[RowFault]) -> list[Question]:
    """A subject's sound rows; what is wrong with the others goes to `faults`."""

    def fault(row: int, problem: str, *, is_left_out: bool = True) -> None:
        faults.append(
            RowFault(file=rows.name, row=row, problem=problem, is_left_out=is_left_out)
        )

    questions: list[Question] = []
    first_rows: dict[tuple[str, ...], Question] = {}
    for row, fields in enumerate(rows.read(), 1):
        if problem := _problem(fields):
            fault(row, problem)
            continue
        text, *choices, answer = fields
        question = Question(
            subject, row, text, tuple(choices), cast("Letter", answer.strip())
        )
        same = first_rows.setdefault((text.strip(), *choices), question)
        if same is not question:
            other = "" if same.answer == question.answer else " with another answer"
            fault(row, f"repeats row {same.row}{other}", is_left_out=False)
        questions.append(question)
    if not subject.strip():
        fault(0, "has no subject in its name")
        return []
    if not questions:
        fault(0, "has no sound question")
    return questions


def _problem(fields: Sequence[str]) -> str:
    """The fault of a row; an empty text for none."""
    if len(fields) != _N_FIELDS:
        return f"has {len(fields)} fields, not question, four choices and answer"
    text, *choices, answer = fields
    if not text.strip():
        return "has no question"
    for letter, choice in zip(LETTERS, choices, strict=True):
        if not choice.strip():
            return f"has no choice {letter}"
    if answer.strip() not in LETTERS:
        return f"has the answer {answer[:20]!r}, not A, B, C or D"
    return ""

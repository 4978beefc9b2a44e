"""Answers to questions and paired tests of them, with the error of each number."""

from __future__ import annotations

from typing import Literal

from ewq_gguf.records.base import Part

Letter = Literal["A", "B", "C", "D"]


class RowFault(Part):
    """A row of a data file that is not as it should be.

    Attributes:
        file: its name, with the folder it is in.
        row: from 1; 0 is the file as a whole.
        problem: the fault, in words.
        is_left_out: whether it is not asked; a repeated row is.
    """

    file: str
    row: int
    problem: str
    is_left_out: bool


class TooLong(Part):
    """A prompt that does not fit the context; it is not asked, and never cut.

    Attributes:
        id: the question's or prompt's.
        n_tokens: it has.
        n_ctx: tokens that there are.
    """

    id: str
    n_tokens: int
    n_ctx: int


class MmluOutcome(Part):
    """One question as a model answered it.

    Attributes:
        id: subject and row, such as `anatomy/12`.
        answer: the right one.
        chosen: the likeliest of the four; the first of equal ones.
        letter_logprobs_nats: ln p of ` A` to ` D` among the whole vocabulary.
        n_in_top: letters among the 100 likeliest tokens.
        nll_nats: minus ln p of the right letter, the paper's way.
    """

    id: str
    answer: Letter
    chosen: Letter
    letter_logprobs_nats: tuple[float, float, float, float]
    n_in_top: int
    nll_nats: float


class MmluNumbers(Part):
    """Some questions together; each counts the same.

    Attributes:
        n: questions that were asked.
        n_right: questions with the right answer.
        accuracy: n_right / n.
        accuracy_stderr: sample deviation / sqrt(n); None for one question.
        accuracy_low: lower end of Wilson's 95 % interval.
        accuracy_high: upper end of Wilson's 95 % interval.
        nll_mean_nats: the paper's perplexity of a subject, before its exp.
        mmlu_perplexity: exp of it.
        mmlu_perplexity_stderr: mmlu_perplexity times the standard error of the mean;
            None for one question.
        is_at_chance: whether the interval holds 0.25, so that guessing explains it.
    """

    n: int
    n_right: int
    accuracy: float
    accuracy_stderr: float | None
    accuracy_low: float
    accuracy_high: float
    nll_mean_nats: float
    mmlu_perplexity: float
    mmlu_perplexity_stderr: float | None
    is_at_chance: bool


class MmluSubject(MmluNumbers):
    """The questions of one subject.

    Attributes:
        subject: such as `college_physics`.
    """

    subject: str


class MmluScores(MmluNumbers):
    """All questions, and what was and was not asked.

    Attributes:
        n_shots: examples before each question.
        limit: questions per subject at most; None is all.
        seed: start of the random choice among them.
        prompts_sha256: hash of all prompts and answers; equal where models can be
            compared.
        n_available: sound questions in the files.
        constant_letter: the most frequent right answer among those asked.
        constant_accuracy: the accuracy of always saying it.
        n_without_letters: questions with no letter among the 100 likeliest tokens.
        subjects: by name.
        outcomes: in the order asked.
        too_long: not asked.
        faults: rows that were left out or repeat another.
    """

    n_shots: int
    limit: int | None
    seed: int
    prompts_sha256: str
    n_available: int
    constant_letter: Letter
    constant_accuracy: float
    n_without_letters: int
    subjects: tuple[MmluSubject, ...]
    outcomes: tuple[MmluOutcome, ...]
    too_long: tuple[TooLong, ...]
    faults: tuple[RowFault, ...]


class PairedAccuracy(Part):
    """Two models on the same questions, by McNemar's exact test.

    Attributes:
        n: questions both were asked.
        n_unpaired: questions only one was asked.
        n_only_first: right in the first model only.
        n_only_second: right in the second model only.
        difference: accuracy of the first minus that of the second.
        difference_low: lower end of the 95 % interval (Agresti and Min).
        difference_high: upper end of the 95 % interval.
        p: two-sided, that chance gives so uneven a split of those that differ.
    """

    n: int
    n_unpaired: int
    n_only_first: int
    n_only_second: int
    difference: float
    difference_low: float
    difference_high: float
    p: float


class PairedMean(Part):
    """Two models on the same pieces of text or answers, by the bootstrap.

    Attributes:
        n: pieces.
        difference: weighted mean of the first minus that of the second.
        difference_low: 2.5th percentile; None for fewer than two pieces.
        difference_high: 97.5th percentile; None for fewer than two pieces.
    """

    n: int
    difference: float
    difference_low: float | None
    difference_high: float | None


class RankCorrelation(Part):
    """Spearman's correlation of two measures.

    Attributes:
        n: items.
        rho: in -1..1; None where a measure is constant.
        low: lower end of the 95 % interval (Bonett and Wright); None for fewer than
            four items.
        high: upper end of the 95 % interval.
        p: two-sided, from Student's t; None for fewer than three items.
    """

    n: int
    rho: float | None
    low: float | None
    high: float | None
    p: float | None


class ItemScore(Part):
    """One question of a task as a model answered it.

    Attributes:
        id: the same for every model that is asked.
        answer: index of the right choice.
        nats: log-likelihood of each choice.
        values: the question's share of each measure, by its name: the measure is the
            mean over all questions.
    """

    id: str
    answer: int
    nats: tuple[float, ...]
    values: dict[str, float]


class Measure(Part):
    """A mean over questions.

    Attributes:
        value: the mean.
        stderr: sample deviation / sqrt(n); None for one question.
        low: lower end of the 95 % interval: Wilson's for a share of right answers.
        high: upper end of the 95 % interval.
    """

    value: float
    stderr: float | None
    low: float | None
    high: float | None


class TaskScores(Part):
    """The numbers of a task that has no record of its own.

    Attributes:
        n: questions that were asked.
        n_available: sound questions in the data.
        limit: questions at most; None is all.
        seed: start of the random choice among them.
        data_sha256: hash of all questions asked; equal where models can be compared.
        chance: the share of right answers that guessing gives.
        measures: by their names, the most important first.
        items: in the order asked.
        too_long: questions that do not fit the context, and were not asked.
        faults: rows of the data that were left out, or repeat another.
    """

    n: int
    n_available: int
    limit: int | None
    seed: int
    data_sha256: str
    chance: float
    measures: dict[str, Measure]
    items: tuple[ItemScore, ...]
    too_long: tuple[TooLong, ...]
    faults: tuple[RowFault, ...]


class PairedTest(Part):
    """Student's paired test, as the paper's table 13 has it.

    Attributes:
        n: pairs.
        mean: mean of first minus second.
        t: with n - 1 degrees of freedom.
        p: two-sided.
        cohens_d: mean over the pooled population standard deviation of both.
    """

    n: int
    mean: float
    t: float
    p: float
    cohens_d: float

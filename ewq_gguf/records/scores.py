"""What questions and generated answers say about a model, with the error of each."""

from __future__ import annotations

from typing import Literal

from ewq_gguf.records.base import Part

Letter = Literal["A", "B", "C", "D"]


class RowFault(Part):
    """A row of a data file that is not as it should be.

    Attributes:
        file: its name, with the folder it is in.
        row: from 1; 0 is the file as a whole.
        problem: what is wrong.
        is_left_out: whether it is not asked; a repeated row is.
    """

    file: str
    row: int
    problem: str
    is_left_out: bool


class TooLong(Part):
    """A prompt that does not fit the context; it is not asked, and never cut.

    Attributes:
        id: of the question or prompt.
        n_tokens: it has.
        n_ctx: that there are.
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
        letter_logprobs_nats: of ` A` to ` D` among the whole vocabulary.
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
        n_right: of them.
        accuracy: n_right / n.
        accuracy_stderr: sample deviation / sqrt(n); None for one question.
        accuracy_low: of Wilson's 95 % interval.
        accuracy_high: of Wilson's 95 % interval.
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
        seed: of the choice among them.
        prompts_sha256: of all prompts and answers; equal where models can be compared.
        n_available: sound questions in the files.
        constant_letter: the most frequent right answer among those asked.
        constant_accuracy: what always saying it would give.
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
        difference_low: of the 95 % interval (Agresti and Min).
        difference_high: of the 95 % interval.
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
        low: of the 95 % interval (Bonett and Wright); None for fewer than four items.
        high: of the 95 % interval.
        p: two-sided, from Student's t; None for fewer than three items.
    """

    n: int
    rho: float | None
    low: float | None
    high: float | None
    p: float | None


class TextOutcome(Part):
    """One answer beside its reference.

    Attributes:
        id: of the prompt, `line 3`.
        rouge_1: F1 of words.
        rouge_2: F1 of pairs of words.
        rouge_l: F1 of the longest common subsequence of words.
        rouge_lsum: the same, line by line.
    """

    id: str
    rouge_1: float
    rouge_2: float
    rouge_l: float
    rouge_lsum: float


class TextScores(Part):
    """Answers beside references: those of a file, or another model's answers.

    Attributes:
        n: answers.
        n_empty_answers: that are empty or white space; they score 0.
        n_empty_references: likewise; a pair with one scores 0.
        n_wordless: pairs of which one side has no word of a-z and 0-9, the only
            characters ROUGE sees; their ROUGE is 0 whatever they say.
        bleu: of all answers together, 0 to 100.
        bleu_low: 2.5th percentile of the bootstrap over answers; None for one.
        bleu_high: 97.5th percentile.
        bleu_signature: sacrebleu's.
        rouge_1: mean F1, 0 to 1.
        rouge_1_stderr: sample deviation / sqrt(n); None for one answer.
        rouge_2: mean F1.
        rouge_2_stderr: of it.
        rouge_l: mean F1.
        rouge_l_stderr: of it.
        rouge_lsum: mean F1.
        rouge_lsum_stderr: of it.
        rouge_signature: library, version and settings.
        outcomes: per answer.
    """

    n: int
    n_empty_answers: int
    n_empty_references: int
    n_wordless: int
    bleu: float
    bleu_low: float | None
    bleu_high: float | None
    bleu_signature: str
    rouge_1: float
    rouge_1_stderr: float | None
    rouge_2: float
    rouge_2_stderr: float | None
    rouge_l: float
    rouge_l_stderr: float | None
    rouge_lsum: float
    rouge_lsum_stderr: float | None
    rouge_signature: str
    outcomes: tuple[TextOutcome, ...]


class Answer(Part):
    """What a model generated.

    Attributes:
        id: of the prompt, `line 3`.
        text: without the prompt.
        tokens: of it, without the end of text.
    """

    id: str
    text: str
    tokens: tuple[int, ...]


class Fidelity(Part):
    """One model's answers beside the base model's.

    Attributes:
        scores: with the base model's answers as references.
        n_identical: answers with the same tokens.
        common_prefix_tokens: per answer, before the first token that differs.
        common_prefix_mean: of them.
        common_prefix_share: mean over the longer answer's length; 1 where identical.
        common_prefix_share_stderr: of it; None for one answer.
    """

    scores: TextScores
    n_identical: int
    common_prefix_tokens: tuple[int, ...]
    common_prefix_mean: float
    common_prefix_share: float
    common_prefix_share_stderr: float | None


class GenerationScores(Part):
    """Answers to a file of prompts.

    Attributes:
        prompts_sha256: of the prompts as the model got them.
        n_prompts: in the file.
        has_chat_template: whether prompts went through the model's template.
        answers: in the file's order.
        too_long: prompts that were not asked.
        references: beside the file's references; None where it has none.
        fidelity: beside the base model's answers; None where there are none.
    """

    prompts_sha256: str
    n_prompts: int
    has_chat_template: bool
    answers: tuple[Answer, ...]
    too_long: tuple[TooLong, ...]
    references: TextScores | None
    fidelity: Fidelity | None

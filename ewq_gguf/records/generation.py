"""Generated answers, and their BLEU and ROUGE with the error of each."""

from __future__ import annotations

from ewq_gguf.records.base import Part
from ewq_gguf.records.scores import TooLong


class TextOutcome(Part):
    """One answer beside its reference.

    Attributes:
        id: the prompt's, `line 3`.
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
        n_empty_answers: answers that are empty or white space; they score 0.
        n_empty_references: likewise; a pair with one scores 0.
        n_wordless: pairs of which one side has no word of a-z and 0-9, the only
            characters ROUGE sees; their ROUGE is 0 whatever they say.
        bleu: BLEU of all answers together, 0 to 100.
        bleu_low: 2.5th percentile of the bootstrap over answers; None for one.
        bleu_high: 97.5th percentile.
        bleu_signature: sacrebleu's.
        rouge_1: mean F1, 0 to 1.
        rouge_1_stderr: sample deviation / sqrt(n); None for one answer.
        rouge_2: mean F1.
        rouge_2_stderr: its standard error.
        rouge_l: mean F1.
        rouge_l_stderr: its standard error.
        rouge_lsum: mean F1.
        rouge_lsum_stderr: its standard error.
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
    """An answer that a model generated.

    Attributes:
        id: the prompt's, `line 3`.
        text: without the prompt.
        tokens: ids, without the end of text.
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
        common_prefix_mean: their mean.
        common_prefix_share: mean over the longer answer's length; 1 where identical.
        common_prefix_share_stderr: its standard error; None for one answer.
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
        prompts_sha256: hash of the prompts as the model got them.
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

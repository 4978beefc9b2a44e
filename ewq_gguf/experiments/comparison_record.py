"""Comparison: files of one model beside each other, and their tests in pairs."""

from __future__ import annotations

from typing import Literal

from ewq_gguf.records.base import Part, Record
from ewq_gguf.records.model import ModelIdentity
from ewq_gguf.records.result import Result
from ewq_gguf.records.scores import PairedAccuracy, PairedMean, PairedTest

Kind = Literal["base", "preset", "plan"]


class Estimate(Part):
    """A number and its 95 % interval.

    Attributes:
        value: mean over everything that was measured.
        low: lower end; None where one piece tells nothing of chance.
        high: upper end, likewise.
    """

    value: float
    low: float | None
    high: float | None


class ComparedFile(Part):
    """One row.

    Attributes:
        name: name of the version: `base`, a preset's, or a plan's.
        kind: base, preset or plan.
        plan_sha256: SHA-256 of its plan; None for the base.
        bpw: bits per weight of the whole file.
        brackets: names of the plans between whose nearest presets in size it is: the
            largest that is no larger, or the smallest that is larger.
        result: all that was measured.
        ppl: perplexity; interval by the bootstrap over windows.
        kld_mean_nats: divergence from the base, likewise; exactly 0 for the base.
        top1_agreement: share of tokens with the base's most likely one, likewise.
        accuracy: MMLU's; Wilson's interval.
        mmlu_perplexity: the paper's; interval of its logarithm, questions independent.
        rouge_l: F1 of answers beside references.
        fidelity: F1 of ROUGE-L of answers beside the base's.
        composite_score: the paper's ln(MMLU perplexity) - accuracy, lower is better.
        scores: the other tasks' measures, such as `arc acc`.
    """

    name: str
    kind: Kind
    plan_sha256: str | None
    bpw: float
    brackets: tuple[str, ...]
    result: Result
    ppl: Estimate | None = None
    kld_mean_nats: Estimate | None = None
    top1_agreement: Estimate | None = None
    accuracy: Estimate | None = None
    mmlu_perplexity: Estimate | None = None
    rouge_l: Estimate | None = None
    fidelity: Estimate | None = None
    composite_score: Estimate | None = None
    scores: dict[str, Estimate] = {}


class ComparedPair(Part):
    """A plan's file beside another one, on the same questions and windows.

    Attributes:
        first: the plan's name.
        second: the other row's name.
        accuracy: McNemar's test; None where no question was asked.
        composite_score: per question, by the bootstrap.
        mmlu_nats: mean -ln p of the right letter, likewise; exp of the difference is
            the ratio of the paper's MMLU perplexities.
        subjects: the composite scores of MMLU's subjects, by a paired t-test; None
            where there are fewer than two, or all differences are equal.
        nll_nats: mean negative log-likelihood of a token, windows resampled; exp of the
            difference is the perplexities' ratio.
        kld_nats: mean divergence from the base, likewise; None beside the base.
        scores: the other tasks' measures, questions resampled.
    """

    first: str
    second: str
    accuracy: PairedAccuracy | None
    composite_score: PairedMean | None
    mmlu_nats: PairedMean | None = None
    subjects: PairedTest | None
    nll_nats: PairedMean | None
    kld_nats: PairedMean | None
    scores: dict[str, PairedMean] = {}


class Comparison(Record):
    """Versions of one model, made and measured under the same conditions.

    Attributes:
        model: names and hashes of the model.
        imatrix_sha256: SHA-256 of the importance matrix of all files; None for none.
        n_turns: rounds in which the files' speeds were measured one after another; 0
            where they were not.
        rows: the base first, then by falling size.
        pairs: each plan beside every other row.
    """

    schema_name: Literal["ewq.comparison"] = "ewq.comparison"
    schema_version: Literal[1] = 1

    model: ModelIdentity
    imatrix_sha256: str | None
    n_turns: int
    rows: tuple[ComparedFile, ...]
    pairs: tuple[ComparedPair, ...]


class PairAcrossModels(Part):
    """Two versions over several models.

    Attributes:
        measure: name of the number; lower is better, but of accuracy.
        first: a version's name.
        second: another's.
        models: names of those with both.
        test: test over them; None for fewer than two, or equal differences.
    """

    measure: str
    first: str
    second: str
    models: tuple[str, ...]
    test: PairedTest | None

"""MMLU by letters: from one row of logits per question to scores with intervals.

Two numbers per question. Accuracy takes the likeliest of the four letters, as
lm-evaluation-harness does. The paper's perplexity takes their log-probabilities among
the 100 likeliest tokens, -100 for a letter that is not there, and a softmax of the
four; where none is there each gets 1/4.

Source: arXiv:2503.04704v2 section 5.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from math import exp, sqrt
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.questions.mmlu_data import MmluTask, Question
from ewq_gguf.bench.questions.mmlu_files import LETTERS
from ewq_gguf.bench.statistics import mcnemar, wilson
from ewq_gguf.errors import InputError, VerificationError
from ewq_gguf.records.scores import (
    MmluOutcome,
    MmluScores,
    MmluSubject,
    PairedAccuracy,
    TooLong,
)

N_TOP = 100
ABSENT_LOGPROB = -100.0
CHANCE = 0.25


def score_question(
    question: Question, logits: NDArray[np.float32], letters: Sequence[int]
) -> MmluOutcome:
    """The answer to a question by the logits after `Answer:`.

    Args:
        question: the one that was asked.
        logits: (n_vocab,), of the token after the prompt.
        letters: tokens of ` A` to ` D`.

    Raises:
        VerificationError: logits are not finite.
    """
    wide = logits.astype(np.float64)
    top, letter_logits = wide.max(), wide[list(letters)]
    if not np.isfinite([top, *letter_logits]).all():
        problem = "the model's logits are not finite"
        raise VerificationError(STAGE, question.id, problem, "make the file anew")
    logprobs = letter_logits - top - np.log(np.exp(wide - top).sum())
    # A letter is in the top 100 when fewer than 100 tokens are likelier than it.
    is_in_top = [np.count_nonzero(wide > logit) < N_TOP for logit in letter_logits]
    right = LETTERS.index(question.answer)
    seen = np.where(is_in_top, logprobs, ABSENT_LOGPROB)
    return MmluOutcome(
        id=question.id,
        answer=question.answer,
        chosen=LETTERS[int(logprobs.argmax())],
        letter_logprobs_nats=tuple(logprobs.tolist()),
        n_in_top=sum(map(int, is_in_top)),
        nll_nats=float(np.logaddexp.reduce(seen) - seen[right]),
    )


def mmlu_scores(
    task: MmluTask, outcomes: Sequence[MmluOutcome], skipped: Sequence[TooLong]
) -> MmluScores:
    """All numbers of a run, by subject and in total.

    Args:
        task: the prompts.
        outcomes: in the order of its prompts, without the skipped.
        skipped: prompts that were too long.

    Raises:
        InputError: no question was asked.
    """
    if not outcomes:
        problem = f"all {len(skipped)} prompts are longer than the context"
        raise InputError(STAGE, "mmlu", problem, "raise --ctx, or lower --shots")
    by_subject = groupby(outcomes, key=lambda outcome: outcome.id.rpartition("/")[0])
    (letter, n_letter), *_ = Counter(o.answer for o in outcomes).most_common(1)
    return MmluScores(
        **_numbers(outcomes),
        n_shots=task.n_shots,
        limit=task.limit,
        seed=task.seed,
        prompts_sha256=task.sha256,
        n_available=task.n_available,
        constant_letter=letter,
        constant_accuracy=n_letter / len(outcomes),
        n_without_letters=sum(o.n_in_top == 0 for o in outcomes),
        subjects=tuple(
            MmluSubject(subject=subject, **_numbers(list(found)))
            for subject, found in by_subject
        ),
        outcomes=tuple(outcomes),
        too_long=tuple(skipped),
        faults=task.faults,
    )


def compare_mmlu(
    first: Sequence[MmluOutcome], second: Sequence[MmluOutcome]
) -> PairedAccuracy:
    """McNemar's test over the questions that both models were asked.

    Raises:
        InputError: they share none.
    """
    ours, theirs = (
        {outcome.id: outcome.chosen == outcome.answer for outcome in outcomes}
        for outcomes in (first, second)
    )
    shared = [key for key in ours if key in theirs]
    if not shared:
        raise InputError(
            STAGE, "mmlu", "the results share no question", "run both anew"
        )
    return mcnemar(
        [ours[key] for key in shared],
        [theirs[key] for key in shared],
        n_unpaired=len(ours) + len(theirs) - 2 * len(shared),
    )


def _numbers(outcomes: Sequence[MmluOutcome]) -> dict[str, Any]:
    """The fields of MmluNumbers."""
    n = len(outcomes)
    n_right = sum(outcome.chosen == outcome.answer for outcome in outcomes)
    low, high = wilson(n_right, n)
    share = n_right / n
    nlls = [outcome.nll_nats for outcome in outcomes]
    perplexity = exp(fmean(nlls))
    return {
        "n": n,
        "n_right": n_right,
        "accuracy": share,
        "accuracy_stderr": sqrt(share * (1 - share) / (n - 1)) if n > 1 else None,
        "accuracy_low": low,
        "accuracy_high": high,
        "nll_mean_nats": fmean(nlls),
        "mmlu_perplexity": perplexity,
        "mmlu_perplexity_stderr": (
            perplexity * stdev(nlls) / sqrt(n) if n > 1 else None
        ),
        "is_at_chance": low <= CHANCE <= high,
    }

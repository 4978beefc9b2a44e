"""Log-likelihoods of continuations: several choices after one prompt, side by side.

The tokens that all choices of a question begin with are evaluated once; the choices
continue copies of them, those of several questions in one forward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ewq_gguf.bench.engines.forward import forward, groups_of
from ewq_gguf.bench.engines.scorer import (
    STAGE,
    Batch,
    FloatArray,
    IntArray,
    Model,
    Scorer,
)
from ewq_gguf.bench.questions.tokens import n_shared_tokens, too_long
from ewq_gguf.bench.texts.scoring import Float64Array, token_nll
from ewq_gguf.errors import VerificationError
from ewq_gguf.records.scores import TooLong

#: Sequences that are open at once: of eight questions with four choices.
N_SEQUENCES = 32
#: Tokens of one forward pass: the logits of all of them need not fit into memory.
_N_BATCH = 512


@dataclass(frozen=True)
class Continuations:
    """The choices of a question, each with the prompt before it.

    Attributes:
        id: name of the question.
        tokens: (n,) ids of each choice; at least one token is not given.
        n_given: tokens at the beginning of each that are not scored; at least one.
    """

    id: str
    tokens: tuple[IntArray, ...]
    n_given: int

    @property
    def n_shared(self) -> int:
        """Given tokens that all choices share."""
        return min(n_shared_tokens([t.tolist() for t in self.tokens]), self.n_given)

    @property
    def n_tokens(self) -> int:
        """Tokens that are evaluated."""
        n_shared = self.n_shared
        return n_shared + sum(len(tokens) - n_shared for tokens in self.tokens)


@dataclass(frozen=True)
class Likelihoods:
    """The choices of a question as a model finds them.

    Attributes:
        id: name of the question.
        nats: (n_choices,) log-likelihood of each choice's scored tokens.
        n_scored: (n_choices,) of them.
    """

    id: str
    nats: Float64Array
    n_scored: IntArray


def likelihoods(
    model: Model,
    questions: Sequence[Continuations],
    *,
    n_ctx: int,
    finished: Collection[str] = (),
) -> Iterator[Likelihoods | TooLong]:
    """Score the choices of all questions.

    Groups are the same whatever is finished, so that a run that was interrupted between
    two of them gives the numbers of one that was not.

    Args:
        model: any.
        questions: with choices of a number that N_SEQUENCES allows.
        n_ctx: tokens of context: of a question, and of a group's together.
        finished: ids of questions that are passed over.

    Yields:
        First the questions that do not fit the context; then the others in order.

    Raises:
        VerificationError: logits are not finite.
        ResourceError: memory ran out.
    """
    lengths = [question.n_tokens for question in questions]
    skipped = too_long([question.id for question in questions], lengths, n_ctx)
    yield from (one for one in skipped if one.id not in finished)
    fitting = [i for i, length in enumerate(lengths) if length <= n_ctx]
    most = max((len(question.tokens) for question in questions), default=1)
    with model.scorer(n_ctx, n_sequences=N_SEQUENCES, n_batch=_N_BATCH) as scorer:
        for members in groups_of(
            [lengths[i] for i in fitting], n_ctx, N_SEQUENCES // most
        ):
            group = [questions[fitting[member]] for member in members]
            group = [question for question in group if question.id not in finished]
            if group:
                yield from _score_group(scorer, group)


def _score_group(scorer: Scorer, group: Sequence[Continuations]) -> list[Likelihoods]:
    """Sequences are numbered by question and choice."""
    scorer.clear()
    counts = [len(question.tokens) for question in group]
    firsts = np.cumsum([0, *counts[:-1]]).tolist()
    begin = [
        Batch.of(question.tokens[0][: question.n_shared], 0, first)
        for question, first in zip(group, firsts, strict=True)
        if question.n_shared
    ]
    rows: Iterator[FloatArray]
    rows = iter(forward(scorer, Batch.join(begin)) if begin else ())
    first_nll: list[Float64Array] = []
    for question, first, count in zip(group, firsts, counts, strict=True):
        nll = np.zeros(count)
        if question.n_shared:
            row = next(rows)
            for sequence in range(first + 1, first + count):
                scorer.copy(first, sequence)
            if question.n_shared == question.n_given:
                targets = [tokens[question.n_given] for tokens in question.tokens]
                nll = token_nll(np.tile(row, (count, 1)), np.array(targets, np.int32))
        first_nll.append(nll)
    totals = _endings(scorer, group)
    return [
        _finite(question, -(first + rest))
        for question, first, rest in zip(group, first_nll, totals, strict=True)
    ]


def _endings(scorer: Scorer, group: Sequence[Continuations]) -> list[Float64Array]:
    """-ln p of what comes after the shared tokens and the next one; per choice."""
    parts, targets, owners = [], [], []
    choices = [(q, tokens) for q in group for tokens in q.tokens]
    for sequence, (question, tokens) in enumerate(choices):
        n_shared = question.n_shared
        ending = tokens[n_shared:-1]
        positions = np.arange(n_shared, len(tokens) - 1, dtype=np.int32)
        is_output = positions >= question.n_given - 1
        parts.append(
            Batch(
                ending, positions, np.full(len(ending), sequence, np.int32), is_output
            )
        )
        targets.append(tokens[n_shared + 1 :])
        owners.append(np.full(len(ending), sequence))
    batch, following = Batch.join(parts), np.concatenate(targets)
    owner, totals = np.concatenate(owners), np.zeros(len(choices))
    step = min(scorer.n_batch, _N_BATCH)
    for begin in range(0, len(batch), step):
        piece = slice(begin, begin + step)
        is_output = batch.is_output[piece]
        rows = scorer.evaluate(
            Batch(
                batch.tokens[piece],
                batch.positions[piece],
                batch.sequences[piece],
                is_output,
            )
        )
        if is_output.any():
            nll = token_nll(rows, following[piece][is_output])
            np.add.at(totals, owner[piece][is_output], nll)
    return np.split(totals, np.cumsum([len(q.tokens) for q in group])[:-1])


def _finite(question: Continuations, nats: Float64Array) -> Likelihoods:
    if not np.isfinite(nats).all():
        problem = "the model's logits are not finite"
        raise VerificationError(STAGE, question.id, problem, "make the file anew")
    counts = [len(tokens) - question.n_given for tokens in question.tokens]
    return Likelihoods(question.id, nats, np.array(counts, np.int32))

"""Text that a model writes itself, for calibration where there is none.

Each document begins another way and is sampled at one of several temperatures, so that
together they cover more of the model than its favourite sentences. Everything random
is seeded; the same file on the same build writes the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite, log

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.bench.engines.scorer import (
    STAGE,
    Batch,
    FloatArray,
    IntArray,
    Model,
    Scorer,
)
from ewq_gguf.errors import VerificationError

#: Sampled in turn: careful, the model's own distribution, and a little wild.
TEMPERATURES = (0.7, 1.0, 1.3)
#: Tokens less likely than this share of the likeliest one are left out: a single
#: nonsense token leads a document astray.
MIN_P = 0.02
#: Nats beyond that share, for what float32 cannot tell.
_MARGIN = 0.01
N_PARALLEL = 32
#: No text has them, but a model may write them.
_CONTROLS = dict.fromkeys(set(range(32)) - {ord("\n"), ord("\t")})
#: Of the tokens that documents could have, and as many documents at most.
_LEAST_SHARE, _MAX_TIMES = 0.25, 8


def self_text(
    model: Model,
    n_documents: int,
    n_tokens: int,
    seed: int,
    on_progress: Callable[[float], None] = lambda share: None,
) -> list[str]:
    """Documents that a model writes.

    Args:
        model: any.
        n_documents: how many; more where a model is so terse that they come to less
            than a quarter of their tokens, up to eight times as many; if that is too
            little still, as many again that it may not end.
        n_tokens: longest document; one ends where the model ends it.
        seed: start of everything random.
        on_progress: told the share done, 0 to 1.

    Raises:
        ResourceError: memory ran out.
        VerificationError: the model's logits are not finite.
    """
    texts: list[str] = []
    n_parallel = min(N_PARALLEL, n_documents)
    n_ctx = n_parallel * n_tokens
    with model.scorer(n_ctx, n_sequences=n_parallel, is_shared=False) as scorer:
        n_written, begin, end, may_end = 0, 0, n_documents, True
        while begin < end:
            numbers = range(begin, min(begin + n_parallel, end))
            tell = partial(_tell, on_progress, numbers, n_documents)
            seeds = [(seed, number) for number in numbers]
            written = _documents(model, scorer, seeds, n_tokens, may_end, tell)
            # Counted as they will be read: tokens may stand for no text at all.
            n_written += sum(len(model.tokenize(text)) for text in written)
            texts += written
            begin = numbers.stop
            if may_end and n_written < n_documents * n_tokens * _LEAST_SHARE:
                end = max(
                    n_documents, min(begin + n_parallel, _MAX_TIMES * n_documents)
                )
                if begin == end:
                    may_end, end = False, end + n_documents
    return texts


def _tell(
    on_progress: Callable[[float], None],
    numbers: range,
    n_documents: int,
    share: float,
) -> None:
    """Report how far all documents are, by the share of those that grow."""
    on_progress(min((numbers.start + len(numbers) * share) / n_documents, 1.0))


def _documents(
    model: Model,
    scorer: Scorer,
    seeds: Sequence[tuple[int, int]],
    n_tokens: int,
    may_end: bool,
    tell: Callable[[float], None],
) -> list[str]:
    """Documents side by side; the last number of a seed gives the temperature, too."""
    random = [np.random.default_rng(seed) for seed in seeds]
    scorer.clear()
    documents = [_start(model, scorer.n_vocab, rng) for rng in random]
    growing = list(range(len(documents)))
    batch = Batch.join([Batch.of(_array(documents[i]), 0, i) for i in growing])
    for length in range(1 + model.add_bos, n_tokens):
        rows = scorer.evaluate(batch)
        still = []
        for i, row in zip(growing, rows, strict=True):
            temperature = TEMPERATURES[seeds[i][-1] % len(TEMPERATURES)]
            token = _draw(row, temperature, random[i])
            while model.is_end(token) and not may_end:
                row[token] = -np.inf
                token = _draw(row, temperature, random[i])
            if model.is_end(token):
                continue
            documents[i].append(token)
            still.append(i)
        growing = still
        if not growing:
            break
        batch = Batch.join(
            [
                Batch.of(_array(documents[i][-1:]), len(documents[i]) - 1, i)
                for i in growing
            ]
        )
        tell(length / n_tokens)
    return [
        model.detokenize(_array(tokens[model.add_bos :])).translate(_CONTROLS)
        for tokens in documents
    ]


def _start(model: Model, n_vocab: int, random: np.random.Generator) -> list[int]:
    """How a document begins: as the model's texts do, then any token of its own."""
    begin = [model.bos] if model.add_bos else []
    while True:
        token = int(random.integers(n_vocab))
        if not model.is_end(token):
            return [*begin, token]


def _draw(row: FloatArray, temperature: float, random: np.random.Generator) -> int:
    """A token by its probability; (n_vocab,) logits.

    Raises:
        VerificationError: the logits are not finite.
    """
    most = float(row.max())
    if not isfinite(most):
        problem = "the model's logits are not finite"
        raise VerificationError(STAGE, "text", problem, "check the model's weights")
    # A large vocabulary is looked at twice, not raised to powers.
    near = np.flatnonzero(row > most + temperature * log(MIN_P) - _MARGIN)
    scaled: NDArray[np.float64] = row[near].astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    weights[weights < MIN_P] = 0
    cumulated = np.cumsum(weights)
    drawn = np.searchsorted(cumulated, random.random() * cumulated[-1], "right")
    return int(near[drawn])


def _array(tokens: list[int]) -> IntArray:
    return np.array(tokens, np.int32)

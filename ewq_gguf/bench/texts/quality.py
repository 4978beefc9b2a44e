"""Perplexity of a text, and the divergence from a base model in lockstep with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.bench.engines.scorer import STAGE, Batch, IntArray, Model, Scorer
from ewq_gguf.bench.texts.scoring import Divergence, divergence, token_nll
from ewq_gguf.bench.texts.windows import Window, Windows
from ewq_gguf.errors import InputError, VerificationError
from ewq_gguf.records import ChunkPart

#: Tokens of one forward pass: a whole window of the usual size, llama.cpp's own step.
N_BATCH = 512


@dataclass(frozen=True)
class Named:
    """A loaded model and the file it came from, for messages."""

    path: Path
    model: Model


def check_comparable(
    model: Named, base: Named, windows: Windows, base_windows: Windows
) -> None:
    """Refuse a base that reads a text differently.

    Raises:
        InputError: its tokens are others.
    """
    own, other = windows.windows, base_windows.windows
    is_same = len(own) == len(other) and all(
        np.array_equal(a.tokens, b.tokens) for a, b in zip(own, other, strict=True)
    )
    if not is_same:
        raise another_tokenizer(model, base)


def another_tokenizer(model: Named, base: Named) -> InputError:
    """The error for a base whose tokens are others."""
    return InputError(
        STAGE,
        base.path,
        f"has another tokenizer than {model.path.name}",
        "compare files of one model",
    )


def check_stored(model: Named, base: Named, windows: Windows, stored: Windows) -> None:
    """Refuse a reference that has not the windows that are asked; more are fine.

    Raises:
        InputError: its tokens are others, or it has fewer windows.
    """
    n_asked, n_stored = len(windows.windows), len(stored.windows)
    n_both = min(n_asked, n_stored)
    own, other = (Windows(w.windows[:n_both]) for w in (windows, stored))
    check_comparable(model, base, own, other)
    if n_stored < n_asked:
        raise InputError(
            STAGE,
            base.path,
            f"has {n_stored} windows of the text, {n_asked} are asked",
            f"use --chunks {n_stored}, or make it anew with more",
        )


def score_text(
    model: Named,
    base: Named | None,
    windows: Windows,
    n_ctx: int,
    is_done: Callable[[int], bool],
) -> Iterator[tuple[int, ChunkPart | None]]:
    """Score a text's batches, with the base in lockstep where there is one.

    Args:
        model: the model that is scored.
        base: model or reference to compare with, or None.
        windows: the text.
        n_ctx: tokens of the longest window.
        is_done: whether a batch was finished before; its part is None then.

    Yields:
        (number of the batch, what it gave); the part's name is the caller's to set.

    Raises:
        VerificationError: a model's logits are no distribution.
    """
    n_tokens = max(n_ctx, N_BATCH)
    batches = windows.batches(n_tokens)
    n_sequences = max(len(batch) for batch in batches)
    with ExitStack() as stack:
        scorers = [
            stack.enter_context(
                named.model.scorer(n_tokens, n_sequences=n_sequences, n_batch=N_BATCH)
            )
            for named in (model, base)
            if named is not None
        ]
        if base is not None:
            _check_vocabularies(model, base, scorers)
        for i, batch in enumerate(batches):
            yield i, None if is_done(i) else _score(model, base, scorers, batch)


def _check_vocabularies(model: Named, base: Named, scorers: Sequence[Scorer]) -> None:
    """Refuse a base whose tokens are as many as they are by padding alone.

    Raises:
        InputError: the models have logits of different numbers.
    """
    own, other = (scorer.n_vocab for scorer in scorers)
    if own != other:
        raise InputError(
            STAGE,
            base.path,
            f"has {other} logits per token, {model.path.name} has {own}",
            "compare files of one model",
        )


def _score(
    model: Named, base: Named | None, scorers: Sequence[Scorer], batch: Sequence[Window]
) -> ChunkPart:
    for scorer in scorers:
        scorer.clear()
    nll: list[float] = []
    compared: list[Divergence] = []
    for piece, is_output in pieces(batch):
        rows = [scorer.evaluate(piece) for scorer in scorers]
        if not len(is_output):
            continue
        if base is None:
            nll += _finite(token_nll(rows[0], is_output), model)
        else:
            both = divergence(rows[0], rows[1], is_output)
            _finite(both.base_nll_nats, base)
            nll += _finite(both.nll_nats, model)
            _finite(both.kld_nats, model)
            compared.append(both)
    return ChunkPart(
        name="",
        lengths=tuple(window.n_scored for window in batch),
        nll_nats=tuple(nll),
        base_nll_nats=tuple(x for d in compared for x in d.base_nll_nats.tolist()),
        kld_nats=tuple(x for d in compared for x in d.kld_nats.tolist()),
        is_same_top=tuple(x for d in compared for x in d.is_same_top.tolist()),
    )


def pieces(batch: Sequence[Window]) -> Iterator[tuple[Batch, IntArray]]:
    """A batch of windows as forward passes, and the scored tokens of each.

    The logits of a long window need not fit into memory.
    """
    joined, targets = _joined(batch)
    for begin in range(0, len(joined), N_BATCH):
        piece = _slice(joined, slice(begin, begin + N_BATCH))
        yield piece, targets[begin : begin + N_BATCH][piece.is_output]


def _joined(batch: Sequence[Window]) -> tuple[Batch, IntArray]:
    """The windows as sequences 0, 1, ...; and the token that follows each token."""
    parts, targets = [], []
    for i, window in enumerate(batch):
        count = len(window.tokens)
        indices = np.arange(count, dtype=np.int32)
        parts.append(
            Batch(
                tokens=window.tokens,
                positions=indices,
                sequences=np.full(count, i, np.int32),
                is_output=(indices >= window.first - 1) & (indices < count - 1),
            )
        )
        targets.append(np.roll(window.tokens, -1))
    return Batch.join(parts), np.concatenate(targets)


def _slice(batch: Batch, piece: slice) -> Batch:
    return Batch(
        batch.tokens[piece],
        batch.positions[piece],
        batch.sequences[piece],
        batch.is_output[piece],
    )


def _finite(values: NDArray[np.float64], named: Named) -> list[float]:
    """The values of a model that computes.

    Raises:
        VerificationError: one is NaN or infinite.
    """
    if not np.isfinite(values).all():
        raise VerificationError(
            STAGE,
            named.path,
            "is numerically broken: its logits hold NaN or infinity",
            "do not use it",
        )
    found: list[float] = values.tolist()
    return found

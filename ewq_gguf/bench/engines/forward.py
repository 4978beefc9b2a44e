"""Forward passes of many sequences, within what a context can do at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ewq_gguf.bench.engines.scorer import Batch, FloatArray, IntArray, Model, Scorer


def prompt_tokens(model: Model, text: str) -> IntArray:
    """A whole prompt, with the token that begins texts where the model has it."""
    tokens = model.tokenize(text)
    begin = [model.bos] if model.add_bos else []
    return np.concatenate([np.array(begin, np.int32), tokens])


def forward(scorer: Scorer, batch: Batch) -> FloatArray:
    """Run a batch of any length, in one pass where it fits.

    Returns:
        (n_outputs, n_vocab), in the batch's order.
    """
    rows = []
    for begin in range(0, len(batch), scorer.n_batch):
        piece = slice(begin, begin + scorer.n_batch)
        part = Batch(
            batch.tokens[piece],
            batch.positions[piece],
            batch.sequences[piece],
            batch.is_output[piece],
        )
        rows.append(scorer.evaluate(part))
    return np.concatenate(rows)


def groups_of(lengths: Sequence[int], n_tokens: int, n_most: int) -> Iterator[range]:
    """Neighbours that go together; what does not fit with others goes alone.

    Args:
        lengths: tokens of each.
        n_tokens: most tokens of a group.
        n_most: members of a group.
    """
    begin = total = 0
    for i, length in enumerate(lengths):
        if i > begin and (total + length > n_tokens or i - begin == n_most):
            yield range(begin, i)
            begin, total = i, 0
        total += length
    if lengths:
        yield range(begin, len(lengths))

"""Texts as windows of tokens: llama-perplexity's chunks, or one document per line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ewq_gguf.bench.engines.scorer import STAGE, IntArray, Model
from ewq_gguf.errors import InputError

#: Documents of one forward pass; llama.cpp allows 256.
_MAX_DOCUMENTS = 64


@dataclass(frozen=True)
class Window:
    """Tokens that are scored together, in a sequence of their own.

    Attributes:
        tokens: (n,) ids.
        first: index of the first token that is scored.
    """

    tokens: IntArray
    first: int

    @property
    def n_scored(self) -> int:
        """Tokens that are scored."""
        return len(self.tokens) - self.first


@dataclass(frozen=True)
class Windows:
    """A text's windows.

    Attributes:
        windows: in its order.
        n_skipped: documents longer than the context, left out.
    """

    windows: tuple[Window, ...]
    n_skipped: int = 0

    def batches(self, n_tokens: int) -> list[tuple[Window, ...]]:
        """Windows that are evaluated together: as many as fit into `n_tokens`.

        The batches depend on the text alone, so that a run that goes on where another
        was killed computes the same bits.
        """
        batches: list[tuple[Window, ...]] = []
        current: list[Window] = []
        for window in self.windows:
            used = sum(len(other.tokens) for other in current)
            is_full = used + len(window.tokens) > n_tokens
            if current and (is_full or len(current) == _MAX_DOCUMENTS):
                batches.append(tuple(current))
                current = []
            current.append(window)
        return [*batches, tuple(current)] if current else batches


def chunks_of(model: Model, text: str, n_ctx: int, path: Path) -> Windows:
    """A text cut as llama-perplexity cuts it; the second half of each piece is scored.

    Each piece begins with BOS in the place of its own first token where the model's
    texts begin with one. What is left at the end is not scored, nor is a last newline
    tokenised (common/arg.cpp, tools/perplexity/perplexity.cpp).

    Raises:
        InputError: the text is shorter than one context.
    """
    tokens = model.tokenize(text.removesuffix("\n"))
    if model.add_bos:
        tokens = np.concatenate([np.array([model.bos], np.int32), tokens])
    count = len(tokens) // n_ctx
    if not count:
        raise InputError(
            STAGE,
            path,
            f"has {len(tokens)} tokens, one context needs {n_ctx}",
            "give a longer text, a smaller --ctx, or --lines",
        )
    pieces = tokens[: count * n_ctx].reshape(count, n_ctx)
    if model.add_bos:
        pieces[:, 0] = model.bos
    # The first token of the second half is not scored either.
    return Windows(tuple(Window(piece, n_ctx // 2 + 1) for piece in pieces))


def lines_of(model: Model, text: str, n_ctx: int, path: Path) -> Windows:
    """Each line as a document: all of its tokens are scored.

    Its first token has nothing before it where the model's texts begin without BOS,
    and is not scored then. Lines longer than the context are counted, never cut.

    Raises:
        InputError: no line has a token to score.
    """
    begin = np.array([model.bos] if model.add_bos else [], np.int32)
    windows, n_skipped = [], 0
    for line in text.splitlines():
        if line.strip():
            tokens = np.concatenate([begin, model.tokenize(line)])
            n_skipped += len(tokens) > n_ctx
            if 1 < len(tokens) <= n_ctx:
                windows.append(Window(tokens, 1))
    if not windows:
        raise InputError(
            STAGE,
            path,
            f"has no line of 2 to {n_ctx} tokens",
            "give longer lines, or a larger --ctx",
        )
    return Windows(tuple(windows), n_skipped)

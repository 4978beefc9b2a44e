"""Prompts as tokens: what they share, and which do not fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ewq_gguf.records.scores import TooLong


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    pairs = enumerate(zip(first, second, strict=False))
    shorter = min(len(first), len(second))
    return next((n for n, (one, other) in pairs if one != other), shorter)


def n_shared_tokens(prompts: Iterable[Sequence[int]]) -> int:
    """How many tokens at their beginning all prompts share; there is at least one.

    The last token of each is never counted: its logits are asked for.
    """
    token_lists = [list(tokens) for tokens in prompts]
    first, last = min(token_lists), max(token_lists)  # all others lie between them
    n_room = min(len(tokens) for tokens in token_lists) - 1
    return min(common_prefix(first, last), max(n_room, 0))


def too_long(ids: Sequence[str], n_tokens: Sequence[int], n_ctx: int) -> list[TooLong]:
    """The prompts that a context cannot hold; they must not be asked, nor cut.

    Args:
        ids: one of each question or prompt.
        n_tokens: tokens of each, those to be generated included.
        n_ctx: tokens of context.
    """
    return [
        TooLong(id=one, n_tokens=n, n_ctx=n_ctx)
        for one, n in zip(ids, n_tokens, strict=True)
        if n > n_ctx
    ]

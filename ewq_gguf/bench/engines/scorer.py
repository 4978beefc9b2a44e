"""The model as tasks see it, whichever engine computes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.records import Engine

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

STAGE = "bench"


@dataclass(frozen=True)
class Batch:
    """Tokens for one forward pass; all arrays are (n,).

    Attributes:
        tokens: ids.
        positions: in their sequences; each sequence's rise by one.
        sequences: number of each token's sequence, from 0.
        is_output: whether the logits after each token are needed.
    """

    tokens: IntArray
    positions: IntArray
    sequences: IntArray
    is_output: BoolArray

    def __len__(self) -> int:
        """Tokens."""
        return len(self.tokens)

    @classmethod
    def of(
        cls, tokens: IntArray, begin: int, sequence: int = 0, n_outputs: int = 1
    ) -> Batch:
        """Consecutive tokens of a sequence, with logits after the last `n_outputs`."""
        count = len(tokens)
        return cls(
            tokens=tokens.astype(np.int32),
            positions=np.arange(begin, begin + count, dtype=np.int32),
            sequences=np.full(count, sequence, np.int32),
            is_output=np.arange(count) >= count - n_outputs,
        )

    @classmethod
    def join(cls, parts: list[Batch]) -> Batch:
        """Several, one after the other."""
        return cls(
            tokens=np.concatenate([part.tokens for part in parts]),
            positions=np.concatenate([part.positions for part in parts]),
            sequences=np.concatenate([part.sequences for part in parts]),
            is_output=np.concatenate([part.is_output for part in parts]),
        )


@dataclass(frozen=True)
class Buffers:
    """Where a loaded model's memory goes, bytes.

    Attributes:
        weights_bytes: on the CPU and on devices.
        kv_bytes: size of the KV cache, and of recurrent states.
        compute_bytes: size of intermediate results and outputs.
        device_bytes: part of all these that is on devices.
    """

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    device_bytes: int


class Scorer(Protocol):
    """A model with a context for some sequences."""

    @property
    def n_ctx(self) -> int:
        """Tokens that all sequences together can hold."""

    @property
    def n_batch(self) -> int:
        """Tokens of one forward pass, at most."""

    @property
    def n_sequences(self) -> int:
        """Sequences that can be open at once."""

    @property
    def n_vocab(self) -> int:
        """Logits per token."""

    def evaluate(self, batch: Batch) -> FloatArray:
        """Run the model over a batch, whose tokens its sequences then hold.

        Returns:
            (n_outputs, n_vocab), in the batch's order; the caller's own.

        Raises:
            ResourceError: the context is full, or memory ran out.
        """

    def copy(self, source: int, target: int) -> None:
        """Let a sequence begin as another is now; shared, not computed again."""

    def remove(self, sequence: int, begin: int = 0) -> None:
        """Forget a sequence from a position on."""

    def clear(self) -> None:
        """Forget all sequences."""

    def buffers(self) -> Buffers:
        """The memory of the model and of this context."""


class Model(Protocol):
    """Loaded weights and their tokenizer."""

    @property
    def engine(self) -> Engine:
        """The library that computes."""

    @property
    def load_seconds(self) -> float:
        """Seconds for loading the weights."""

    @property
    def add_bos(self) -> bool:
        """Whether texts begin with the token `bos`."""

    @property
    def add_eos(self) -> bool:
        """Whether texts end with the token `eos`."""

    @property
    def bos(self) -> int:
        """The token that begins texts; -1 where there is none."""

    @property
    def eos(self) -> int:
        """The token that ends texts; -1 where there is none."""

    @property
    def chat_template(self) -> str:
        """Jinja source of the model's own; empty where it has none."""

    def tokenize(self, text: str, *, special: bool = False) -> IntArray:
        """Token ids of a text, without the ones that begin and end it.

        Args:
            text: any.
            special: read the names of special tokens as these tokens.
        """

    def detokenize(self, tokens: IntArray) -> str:
        """The text of tokens; what is no UTF-8 is replaced."""

    def is_end(self, token: int) -> bool:
        """Whether a token ends an answer."""

    def scorer(
        self,
        n_ctx: int,
        *,
        n_sequences: int = 1,
        n_batch: int | None = None,
        is_shared: bool = True,
    ) -> AbstractContextManager[Scorer]:
        """Make a context for sequences, until the block ends.

        Args:
            n_ctx: tokens of all sequences together; a shared prefix counts once.
            n_sequences: sequences that can be open at once.
            n_batch: tokens of one forward pass; None for as many as are usual.
            is_shared: whether sequences may begin as others do. Without it each has
                an equal part of the context, and none computes with the others' tokens.
        """

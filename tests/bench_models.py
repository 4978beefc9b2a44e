"""A model that is a table: its next token depends on the last one only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ewq_gguf.bench.scorer import Batch, Buffers, FloatArray, IntArray
from ewq_gguf.records import Engine

BOS = 0
N_VOCAB = 128


class Table:
    """Characters as tokens; row t of `logits` follows token t."""

    load_seconds = 0.5
    bos = BOS

    def __init__(self, seed: int = 0, *, add_bos: bool = True, shift: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.logits = random.standard_normal((N_VOCAB, N_VOCAB)).astype(np.float32)
        self.add_bos = add_bos
        self.shift = shift
        self.evaluated = 0

    @property
    def engine(self) -> Engine:
        return Engine(
            name="table",
            version="1",
            commit="none",
            system="",
            devices={},
            n_layers_offloaded=0,
        )

    def tokenize(self, text: str, *, special: bool = False) -> IntArray:
        return np.array([(ord(c) + self.shift) % N_VOCAB for c in text], np.int32)

    def detokenize(self, tokens: IntArray) -> str:
        return "".join(chr(token) for token in tokens)

    def is_end(self, token: int) -> bool:
        return token == BOS

    @contextmanager
    def scorer(
        self, n_ctx: int, *, n_sequences: int = 1, n_batch: int | None = None
    ) -> Iterator[TableScorer]:
        yield TableScorer(self, n_ctx, n_sequences, n_batch or n_ctx)


class TableScorer:
    """Remembers what each sequence holds, and refuses what is not its next token."""

    n_vocab = N_VOCAB

    def __init__(self, table: Table, n_ctx: int, n_sequences: int, n_batch: int):
        self.table = table
        self.n_ctx = n_ctx
        self.n_batch = n_batch
        self.n_sequences = n_sequences
        self.held: dict[int, list[int]] = {}

    def evaluate(self, batch: Batch) -> FloatArray:
        assert len(batch) <= self.n_batch
        for token, position, sequence in zip(
            batch.tokens, batch.positions, batch.sequences, strict=True
        ):
            held = self.held.setdefault(int(sequence), [])
            assert position == len(held)
            held.append(int(token))
        assert len(self.held) <= self.n_sequences
        assert sum(map(len, self.held.values())) <= self.n_ctx
        self.table.evaluated += len(batch)
        return self.table.logits[batch.tokens[batch.wanted]]

    def copy(self, source: int, target: int) -> None:
        self.held[target] = list(self.held[source])

    def remove(self, sequence: int, begin: int = 0) -> None:
        del self.held[sequence][begin:]

    def clear(self) -> None:
        self.held.clear()

    def buffers(self) -> Buffers:
        return Buffers(
            weights_bytes=self.table.logits.nbytes,
            kv_bytes=4 * self.n_ctx,
            compute_bytes=0,
            device_bytes=0,
        )

"""A model that is a table: its next token depends on the last one only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ewq_gguf.bench.engines.scorer import Batch, Buffers, FloatArray, IntArray, Model
from ewq_gguf.records import Engine

BOS = 0
N_VOCAB = 128


class Table:
    """Characters as tokens; row t of `logits` follows token t."""

    load_seconds = 0.5
    bos = BOS
    eos = ord("$")
    chat_template = ""

    def __init__(self, seed: int = 0, *, add_bos: bool = True, shift: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.logits = random.standard_normal((N_VOCAB, N_VOCAB)).astype(np.float32)
        self.add_bos = add_bos
        self.add_eos = False
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
        self,
        n_ctx: int,
        *,
        n_sequences: int = 1,
        n_batch: int | None = None,
        is_shared: bool = True,
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
        return self.table.logits[batch.tokens[batch.is_output]]

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


def check_protocol(model: Model, tolerance: float) -> None:
    """What every engine's scorer must do, whatever it computes.

    Sequences are followed in every way that tasks use, and each row of logits compared
    with those of the same tokens evaluated alone and at once.
    """
    tokens = np.random.default_rng(5).integers(3, 99, 40, dtype=np.int32)

    def alone(*parts: IntArray) -> FloatArray:
        with model.scorer(96) as scorer:
            joined = np.concatenate(parts)
            return scorer.evaluate(Batch.of(joined, 0, n_outputs=len(joined)))

    def same(found: FloatArray, expected: FloatArray) -> None:
        assert found.shape == expected.shape
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=tolerance)

    first, second, third = tokens[:12], tokens[12:17], tokens[17:25]
    with model.scorer(96, n_sequences=4) as scorer:
        assert (scorer.n_sequences, scorer.n_ctx >= 96) == (4, True)
        # Several sequences of different lengths, and wanted tokens in the middle.
        parts = [
            Batch.of(first, 0, 0, n_outputs=3),
            Batch.of(second, 0, 1, n_outputs=0),
            Batch.of(third, 0, 2, n_outputs=8),
        ]
        expected = np.concatenate([alone(first)[-3:], alone(third)])
        same(scorer.evaluate(Batch.join(parts)), expected)
        # They go on with different numbers of tokens held, in another order.
        parts = [Batch.of(first[:4], 8, 2), Batch.of(third[:2], 5, 1, n_outputs=2)]
        expected = np.concatenate(
            [alone(third, first[:4])[-1:], alone(second, third[:2])[-2:]]
        )
        same(scorer.evaluate(Batch.join(parts)), expected)
        # Copies go on apart, and what they share stays as it was.
        scorer.copy(0, 1)
        scorer.copy(0, 3)
        parts = [Batch.of(second, 12, 1), Batch.of(third, 12, 3)]
        expected = np.concatenate([alone(first, x)[-1:] for x in (second, third)])
        same(scorer.evaluate(Batch.join(parts)), expected)
        same(scorer.evaluate(Batch.of(third, 12, 0)), alone(first, third)[-1:])
        # What is forgotten is forgotten.
        scorer.remove(3, 7)
        same(scorer.evaluate(Batch.of(second, 7, 3)), alone(first[:7], second)[-1:])
        scorer.remove(1)
        same(scorer.evaluate(Batch.of(third, 0, 1)), alone(third)[-1:])
        scorer.clear()
        same(scorer.evaluate(Batch.of(second, 0, 2)), alone(second)[-1:])
        assert scorer.buffers().weights_bytes > 0
        assert scorer.buffers().kv_bytes > 0
    # More tokens than one pass takes are passed one piece after the other.
    with model.scorer(96, n_batch=16) as scorer:
        rows = [
            scorer.evaluate(Batch.of(tokens[i : i + 16], i, n_outputs=16))
            for i in (0, 16)
        ]
        same(np.concatenate(rows), alone(tokens[:32]))

"""A reference file in the place of the base model: `Model` and `Scorer` without one.

A hidden state depends on the tokens up to its own, so that it is found by their hash:
whatever is evaluated, in whichever order, gets the answers to these very tokens.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from ewq_gguf.bench.engines.head import Head, Weights, open_head
from ewq_gguf.bench.engines.scorer import STAGE, Batch, Buffers, FloatArray, IntArray
from ewq_gguf.bench.reference_file import (
    BIAS,
    OUTPUT,
    ReferenceFile,
    read_reference,
    states_type,
    unpack,
)
from ewq_gguf.bench.texts.windows import Windows
from ewq_gguf.errors import InputError
from ewq_gguf.records import Engine


@dataclass(frozen=True)
class _Row:
    """Where a hidden state lies: the number of its text, and its own in it."""

    text: int
    index: int


class ReferenceModel:
    """A base's hidden states for texts, and its output matrix.

    Args:
        path: the reference.
        n_threads: threads for the product with the matrix.

    Raises:
        VerificationError: it is not a sound file.
        InputError: it is no reference, or one with other contents than it says.
    """

    add_bos = False
    add_eos = False
    bos = eos = -1
    chat_template = ""

    def __init__(self, path: Path, n_threads: int) -> None:
        """Read all but the hidden states."""
        started = time.perf_counter()
        self.path = path
        self._n_threads = n_threads
        self._file = read_reference(path)
        output = self._file.tensors[OUTPUT]
        has_bias = BIAS in self._file.tensors
        self._weights = Weights(
            ggml_type=output.ggml_type,
            matrix=self._file.array(OUTPUT, np.uint8).reshape(output.shape[0], -1),
            bias=self._file.array(BIAS, np.float32) if has_bias else None,
        )
        self._windows = [
            self._file.windows(i) for i in range(len(self._file.record.texts))
        ]
        self._rows = _rows(self._windows)
        self.load_seconds = time.perf_counter() - started

    @property
    def engine(self) -> Engine:
        """The library that computed the hidden states."""
        return self._file.record.engine

    def windows(self, text_sha256: str) -> Windows:
        """The stored windows of a text that it has.

        Raises:
            InputError: it does not have it.
        """
        hashes = [text.sha256 for text in self._file.record.texts]
        if text_sha256 not in hashes:
            problem = f"has no text with SHA-256 {text_sha256}"
            raise InputError(STAGE, self.path, problem, "give the base GGUF")
        return self._windows[hashes.index(text_sha256)]

    def tokenize(self, text: str, *, special: bool = False) -> IntArray:
        """Refuse: only the tokens of the stored texts are known.

        Raises:
            InputError: always.
        """
        self._refuse()

    def detokenize(self, tokens: IntArray) -> str:
        """Refuse, likewise.

        Raises:
            InputError: always.
        """
        self._refuse()

    def is_end(self, token: int) -> bool:
        """Refuse, likewise.

        Raises:
            InputError: always.
        """
        self._refuse()

    def _refuse(self) -> NoReturn:
        problem = "is a reference of scored texts, without a tokenizer"
        raise InputError(STAGE, self.path, problem, "give the base GGUF")

    @contextmanager
    def scorer(
        self,
        n_ctx: int,
        *,
        n_sequences: int = 1,
        n_batch: int | None = None,
        is_shared: bool = True,
    ) -> Iterator[ReferenceScorer]:
        """Put the output matrix into memory, until the block ends.

        Raises:
            ResourceError: it does not fit.
        """
        shape = self._file.record.head
        with (
            self.path.open("rb") as data,
            open_head(self._weights, shape, self._file.n_embd, self._n_threads) as head,
        ):
            scorer = ReferenceScorer(self._file, data, self._rows, head)
            scorer.n_ctx = n_ctx
            scorer.n_batch = min(n_batch or n_ctx, n_ctx)
            scorer.n_sequences = n_sequences
            yield scorer


class ReferenceScorer:
    """Hidden states from the file, logits from the matrix."""

    n_ctx: int
    n_batch: int
    n_sequences: int

    def __init__(
        self, file: ReferenceFile, data: BinaryIO, rows: dict[bytes, _Row], head: Head
    ) -> None:
        """Wrap what ReferenceModel.scorer opened."""
        self._file = file
        self._data = data
        self._rows = rows
        self._head = head
        self._held: dict[int, list[int]] = {}
        self.n_vocab = head.n_vocab

    def evaluate(self, batch: Batch) -> FloatArray:
        """The base's logits after the output tokens.

        Returns:
            (n_outputs, n_vocab), in the batch's order; the caller's own.

        Raises:
            InputError: the base was never asked about such a sequence.
        """
        found: dict[int, _Row] = {}
        for sequence in dict.fromkeys(batch.sequences.tolist()):
            held = self._held.setdefault(sequence, [])
            places = np.flatnonzero(batch.sequences == sequence)
            is_output = np.flatnonzero(batch.is_output[places])
            ends = set((len(held) + is_output).tolist())
            held += batch.tokens[places].tolist()
            digests = _digests(np.array(held, np.int32), ends)
            rows = map(self._find, digests)
            found |= dict(zip(places[is_output].tolist(), rows, strict=True))
        # Sequences may alternate in a batch; its order is the caller's.
        return self._head.logits(self._states([found[i] for i in sorted(found)]))

    def _find(self, digest: bytes) -> _Row:
        if digest not in self._rows:
            problem = "was made of other tokens than these"
            raise InputError(STAGE, self._file.path, problem, "give the base GGUF")
        return self._rows[digest]

    def _states(self, rows: list[_Row]) -> FloatArray:
        """Read from the file; (n, n_embd)."""
        data = []
        for row in rows:
            tensor = self._file.tensors[f"text.{row.text}.states"]
            size = tensor.size_bytes // tensor.shape[0]
            self._data.seek(tensor.offset + row.index * size)
            data.append(self._data.read(size))
            if len(data[-1]) < size:
                problem = "ended while it was read"
                raise InputError(STAGE, self._file.path, problem, "copy it again")
        ggml_type = states_type(self._file.tensors[OUTPUT].ggml_type)
        return unpack(b"".join(data), ggml_type, self._file.n_embd)

    def copy(self, source: int, target: int) -> None:
        """Let a sequence begin as another is now."""
        self._held[target] = list(self._held.get(source, []))

    def remove(self, sequence: int, begin: int = 0) -> None:
        """Forget a sequence from a position on."""
        del self._held.get(sequence, [])[begin:]

    def clear(self) -> None:
        """Forget all sequences."""
        self._held.clear()

    def buffers(self) -> Buffers:
        """The matrix, and the logits of one product."""
        return Buffers(
            weights_bytes=self._head.weights_bytes,
            kv_bytes=0,
            compute_bytes=self._head.n_bytes - self._head.weights_bytes,
            device_bytes=0,
        )


def _rows(texts: list[Windows]) -> dict[bytes, _Row]:
    """Each stored hidden state by the hash of the tokens up to its own."""
    rows = {}
    for number, windows in enumerate(texts):
        index = 0
        for window in windows.windows:
            scored = range(window.first - 1, len(window.tokens) - 1)
            for digest in _digests(window.tokens, scored):
                rows[digest] = _Row(number, index)
                index += 1
    return rows


def _digests(tokens: IntArray, ends: range | set[int]) -> Iterator[bytes]:
    """Hashes of a sequence up to some of its tokens, these included."""
    digest = hashlib.blake2b(digest_size=16)
    data = tokens.astype("<i4").tobytes()
    for i in range(len(tokens)):
        digest.update(data[4 * i : 4 * i + 4])
        if i in ends:
            yield digest.digest()

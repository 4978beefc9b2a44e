"""Run a base over texts and keep what enters its output matrix; in a child process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import product
from math import isnan
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ewq_gguf.bench.engines.head import Head, Weights, open_head
from ewq_gguf.bench.engines.llama import LlamaModel, LlamaScorer
from ewq_gguf.bench.engines.scorer import STAGE, FloatArray
from ewq_gguf.bench.files import parts_of
from ewq_gguf.bench.job import ReferenceRequest
from ewq_gguf.bench.reference_file import (
    BIAS,
    OUTPUT,
    ReferenceFile,
    pack,
    states_type,
    table,
    unpack,
    write_header,
)
from ewq_gguf.bench.texts.quality import N_BATCH, pieces
from ewq_gguf.bench.texts.scoring import largest_error
from ewq_gguf.bench.texts.windows import Window, Windows
from ewq_gguf.checkpoint.gguf_file import KV_OFFSET, GgufTensor, read_gguf
from ewq_gguf.errors import InputError, VerificationError
from ewq_gguf.records import BenchParameters, HeadShape, Reference, ReferenceText

#: Of log-probabilities, nats: the divergence that it leaves is below half its square.
MAX_ERROR_NATS = 1e-3
_ALIGNMENT = 32
_TIED = "token_embd.weight"


def write_reference(
    model: LlamaModel,
    request: ReferenceRequest,
    parameters: BenchParameters,
    texts: Sequence[Windows],
    tell: Callable[[float], None],
) -> None:
    """Write the reference of a base and some texts.

    Args:
        model: the base.
        request: the file, and the base's identity.
        parameters: with the texts' names and hashes.
        texts: their windows.
        tell: told the share done.

    Raises:
        InputError: its logits are not its output matrix times its hidden states.
        VerificationError: it computes NaN.
        ResourceError: disk or memory is full.
    """
    weights, n_embd = _weights(model.path)
    n_ctx = max(parameters.n_ctx, N_BATCH)
    batches = [windows.batches(n_ctx) for windows in texts]
    n_sequences = max(len(batch) for text in batches for batch in text)
    with ExitStack() as stack:
        scorer = stack.enter_context(
            model.scorer(
                n_ctx, n_sequences=n_sequences, n_batch=N_BATCH, has_states=True
            )
        )
        maker = _Maker(model.path, scorer, n_embd, states_type(weights.ggml_type))
        shape = _shape(maker, weights, parameters.setup.n_threads, batches[0][0])
        record = _record(model, request, parameters, texts, shape)
        has_bias = weights.bias is not None
        matrix_shape = (len(weights.matrix), n_embd)
        rows = table(record, weights.ggml_type, matrix_shape, has_bias=has_bias)
        reference = write_header(Path(request.out), record, rows)
        head = stack.enter_context(
            open_head(weights, shape, n_embd, parameters.setup.n_threads)
        )
        out = stack.enter_context(reference.path.open("r+b"))
        _write_weights(out, reference, weights)
        n_all = sum(len(windows.windows) for windows in texts)
        n_done = 0
        for number, windows in enumerate(texts):
            _write_tokens(out, reference, number, windows)
            for batch in batches[number]:
                for states in maker.checked(batch, head):
                    out.write(states)
                n_done += len(batch)
                tell(n_done / n_all)
        out.write(bytes(-out.tell() % _ALIGNMENT))


def _record(
    model: LlamaModel,
    request: ReferenceRequest,
    parameters: BenchParameters,
    texts: Sequence[Windows],
    shape: HeadShape,
) -> Reference:
    return Reference(
        model=request.model,
        tokenizer_sha256=_tokenizer_sha256(model.path),
        engine=model.engine,
        setup=parameters.setup,
        n_ctx=parameters.n_ctx,
        n_chunks=parameters.n_chunks,
        is_lines=parameters.is_lines,
        head=shape,
        max_error_nats=MAX_ERROR_NATS,
        texts=tuple(
            _text(text.name, text.sha256, windows)
            for text, windows in zip(parameters.texts, texts, strict=True)
        ),
    )


class _Maker:
    """Hidden states of a base as they are kept, compared with its own logits."""

    def __init__(
        self, path: Path, scorer: LlamaScorer, n_embd: int, ggml_type: str
    ) -> None:
        self.path = path
        self._scorer = scorer
        self.n_embd = n_embd
        self._ggml_type = ggml_type

    def checked(self, batch: Sequence[Window], head: Head) -> Iterator[bytes]:
        """Kept states of a batch, pass by pass.

        Raises:
            InputError: they do not give the base's logits.
            VerificationError: it computes NaN.
        """
        for states, error in self.errors(batch, head):
            if error > MAX_ERROR_NATS:
                raise self.refusal(error)
            yield states

    def errors(
        self, batch: Sequence[Window], head: Head
    ) -> Iterator[tuple[bytes, float]]:
        """Kept states, and the most by which their log-probabilities are off.

        Raises:
            InputError: the states do not fit the matrix.
            VerificationError: the base computes NaN.
        """
        self._scorer.clear()
        for piece, targets in pieces(batch):
            logits, states = self._scorer.evaluate_with_states(piece)
            if not len(targets):
                continue
            if states.shape[1] != self.n_embd:
                raise self.refusal(float("inf"))
            kept = pack(states, self._ggml_type)
            error = self._error(logits, head.logits(self._unpacked(kept)))
            yield kept, error

    def _unpacked(self, kept: bytes) -> FloatArray:
        return unpack(kept, self._ggml_type, self.n_embd)

    def _error(self, logits: FloatArray, again: FloatArray) -> float:
        if not np.isfinite(logits).all():
            raise VerificationError(
                STAGE,
                self.path,
                "is numerically broken: its logits hold NaN or infinity",
                "do not use it",
            )
        if np.array_equal(logits, again):
            return 0.0
        error = largest_error(again, logits)
        return float("inf") if isnan(error) else error

    def refusal(self, error: float) -> InputError:
        """The error for a base that a reference cannot stand for."""
        return InputError(
            STAGE,
            self.path,
            f"its output matrix times its hidden states is {error:.2g} nats off its "
            f"log-probabilities, {MAX_ERROR_NATS:g} are allowed",
            "compare in lockstep: ewq bench FILE --base with this GGUF",
        )


def _shape(
    maker: _Maker, weights: Weights, n_threads: int, batch: Sequence[Window]
) -> HeadShape:
    """How logits come from the product: what of the metadata fits the first batch.

    Families multiply by `logit_scale` or divide by it, and not all that name a
    `final_logit_softcapping` use it: the engine's own logits tell.

    Raises:
        InputError: nothing fits.
    """
    kv = read_gguf(maker.path).kv
    family = kv.get("general.architecture")
    scale = float(kv.get(f"{family}.logit_scale", 1.0)) or 1.0
    softcap = float(kv.get(f"{family}.final_logit_softcapping", 0.0))
    best = float("inf")
    for factor, cap in product(
        dict.fromkeys((scale, 1 / scale, 1.0)),
        dict.fromkeys((softcap if softcap > 0 else None, None)),
    ):
        shape = HeadShape(scale=factor, softcap=cap)
        with open_head(weights, shape, maker.n_embd, n_threads) as head:
            error = max(error for _, error in maker.errors(batch, head))
        if error <= MAX_ERROR_NATS:
            return shape
        best = min(best, error)
    raise maker.refusal(best)


def _weights(path: Path) -> tuple[Weights, int]:
    """The output matrix of a model, and the numbers in a hidden state.

    Raises:
        InputError: it has none.
    """
    found = {
        tensor.name: (part, tensor)
        for part in parts_of(path)
        for tensor in read_gguf(part).tensors
    }
    matrix = found.get(OUTPUT) or found.get(_TIED)
    if matrix is None:
        problem = f"has neither {OUTPUT} nor {_TIED}"
        raise InputError(STAGE, path, problem, "compare in lockstep with it")
    part, tensor = matrix
    n_vocab, n_embd = tensor.shape
    bias = found.get(BIAS)
    return Weights(
        ggml_type=tensor.ggml_type,
        matrix=_read(part, tensor).reshape(n_vocab, -1),
        bias=None if bias is None else _read(*bias).view(np.float32),
    ), n_embd


def _read(path: Path, tensor: GgufTensor) -> np.ndarray:
    return np.fromfile(path, np.uint8, tensor.size_bytes, offset=tensor.offset)


def _text(name: str, sha256: str, windows: Windows) -> ReferenceText:
    return ReferenceText(
        name=name,
        sha256=sha256,
        n_windows=len(windows.windows),
        n_tokens=sum(len(window.tokens) for window in windows.windows),
        n_scored=sum(window.n_scored for window in windows.windows),
        first=windows.windows[0].first,
    )


def _write_weights(out: BinaryIO, reference: ReferenceFile, weights: Weights) -> None:
    out.seek(reference.tensors[OUTPUT].offset)
    out.write(weights.matrix.data)
    if weights.bias is not None:
        out.seek(reference.tensors[BIAS].offset)
        out.write(weights.bias.data)


def _write_tokens(
    out: BinaryIO, reference: ReferenceFile, number: int, windows: Windows
) -> None:
    """The tokens of a text; the file stands where its states begin then."""
    lengths = [len(window.tokens) for window in windows.windows]
    tokens = [window.tokens for window in windows.windows]
    for name, values in (
        ("lengths", np.array(lengths, np.int32)),
        ("tokens", np.concatenate(tokens).astype(np.int32)),
    ):
        out.seek(reference.tensors[f"text.{number}.{name}"].offset)
        out.write(values.data)
    out.seek(reference.tensors[f"text.{number}.states"].offset)


def _tokenizer_sha256(path: Path) -> str:
    """Hash of the key-value pairs that say how text becomes tokens, as stored."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(KV_OFFSET)
        for key, size in read_gguf(path).kv_sizes.items():
            data = file.read(size)
            if key.startswith("tokenizer.ggml."):
                digest.update(data)
    return digest.hexdigest()

"""llama.cpp behind `Model` and `Scorer`, through llama-cpp-python's low-level calls.

Only child processes import this: a file or an RPC worker can end the process.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType

from ewq_gguf.bench.engines.devices import check_offloaded, devices_for, gpu_names
from ewq_gguf.bench.engines.llama_log import Log, buffers_in, context_error, load_error
from ewq_gguf.bench.engines.scorer import STAGE, Batch, Buffers, FloatArray, IntArray
from ewq_gguf.errors import ChildError, ResourceError, UsageError
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.records import BenchSetup, Engine

_N_BATCH = 2048
_N_UBATCH = 512
_INTS = ctypes.POINTER(ctypes.c_int32)
_LISTS = ctypes.POINTER(_INTS)
_BYTES = ctypes.POINTER(ctypes.c_int8)
_NO_SLOT, _NO_MEMORY = 1, -2

_OFFLOADED = re.compile(r"offloaded (\d+)/\d+ layers to GPU")


class LlamaModel:
    """A GGUF file in memory.

    Args:
        path: the file, or the first part of a split one.
        setup: where it goes.
        log: listener of this process.

    Raises:
        ToolError: a device was asked for and there is none, or none was used.
        UsageError: there is no such device, or one layer too few for the devices.
        ResourceError: it does not fit.
        ChildError: it does not load.
    """

    def __init__(self, path: Path, setup: BenchSetup, log: Log) -> None:
        """Load it."""
        self.path = path
        self._setup = setup
        self._log = log
        begin, started = len(log.text), time.perf_counter()
        params = llama_cpp.llama_model_default_params()
        self._devices = devices_for(setup)
        params.devices = ctypes.cast(self._devices, ctypes.c_void_p)
        params.n_gpu_layers = -1 if setup.n_gpu_layers is None else setup.n_gpu_layers
        if setup.tensor_split:
            shares = (ctypes.c_float * llama_cpp.llama_max_devices())(
                *setup.tensor_split
            )
            params.tensor_split = shares
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        self._said = log.text[begin:]
        if not self._model:
            raise load_error(path, self._said)
        self.load_seconds = time.perf_counter() - started
        # Without devices it says that all layers were offloaded, too.
        found = _OFFLOADED.search(self._said) if gpu_names(self._devices) else None
        self._n_offloaded = int(found[1]) if found else 0
        check_offloaded(path, setup, self._n_offloaded)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self.add_bos = bool(llama_cpp.llama_vocab_get_add_bos(self._vocab))
        self.add_eos = bool(llama_cpp.llama_vocab_get_add_eos(self._vocab))
        self.bos = int(llama_cpp.llama_vocab_bos(self._vocab))
        self.eos = int(llama_cpp.llama_vocab_eos(self._vocab))
        template = llama_cpp.llama_model_chat_template(self._model, None) or b""
        self.chat_template = template.decode(errors="replace")

    def close(self) -> None:
        """Free the weights; nothing of it can be used any more."""
        llama_cpp.llama_model_free(self._model)

    @property
    def engine(self) -> Engine:
        """The build, its CPU features, and the devices in use."""
        return Engine(
            name="llama.cpp",
            version=f"llama-cpp-python {llama_cpp.__version__}",
            commit=LLAMA_CPP_COMMIT,
            system=llama_cpp.llama_print_system_info().decode(errors="replace"),
            devices=gpu_names(self._devices),
            n_layers_offloaded=self._n_offloaded,
        )

    def tokenize(self, text: str, *, special: bool = False) -> IntArray:
        """Token ids of a text, without the ones that begin and end it."""
        data = text.encode()
        size = len(data) + 8
        while True:
            tokens = np.empty(size, np.int32)
            pointer = tokens.ctypes.data_as(_INTS)
            count = llama_cpp.llama_tokenize(
                self._vocab, data, len(data), pointer, size, False, special
            )
            if count >= 0:
                return tokens[:count].copy()
            size = -count

    def detokenize(self, tokens: IntArray) -> str:
        """The text of tokens; what is no UTF-8 is replaced."""
        pieces = []
        for token in tokens:
            buffer = ctypes.create_string_buffer(64)
            size = llama_cpp.llama_token_to_piece(
                self._vocab, int(token), buffer, len(buffer), 0, True
            )
            if size < 0:
                buffer = ctypes.create_string_buffer(-size)
                size = llama_cpp.llama_token_to_piece(
                    self._vocab, int(token), buffer, len(buffer), 0, True
                )
            pieces.append(buffer.raw[:size])
        return b"".join(pieces).decode(errors="replace")

    def is_end(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    @contextmanager
    def scorer(
        self,
        n_ctx: int,
        *,
        n_sequences: int = 1,
        n_batch: int | None = None,
        is_shared: bool = True,
        has_states: bool = False,
    ) -> Iterator[LlamaScorer]:
        """Make a context for sequences, as `Model.scorer` does.

        With `has_states` it is for `evaluate_with_states` instead of `evaluate`.

        Raises:
            ResourceError: there is none.
            UsageError: more sequences than llama.cpp allows.
        """
        limit = int(llama_cpp.llama_max_parallel_sequences())
        if n_sequences > limit:
            problem = f"{n_sequences} sequences are more than llama.cpp's {limit}"
            raise UsageError(STAGE, self.path, problem, "use fewer")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = min(n_batch or _N_BATCH, n_ctx)
        params.n_ubatch = min(_N_UBATCH, params.n_batch)
        params.n_seq_max = n_sequences
        # Sequences share one buffer, so that a copied prefix takes no memory.
        params.kv_unified = is_shared
        params.embeddings = has_states
        params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
        params.n_threads = params.n_threads_batch = self._setup.n_threads
        params.type_k = _ggml_type(self._setup.cache_type_k)
        params.type_v = _ggml_type(self._setup.cache_type_v)
        begin = len(self._log.text)
        context = llama_cpp.llama_init_from_model(self._model, params)
        said = self._log.text[begin:]
        if not context:
            raise context_error(self.path, said)
        try:
            buffers = buffers_in(self._said + said, set(gpu_names(self._devices)))
            yield LlamaScorer(self.path, context, self.n_vocab, buffers)
        finally:
            llama_cpp.llama_free(context)


class LlamaScorer:
    """A context of llama.cpp."""

    def __init__(
        self, path: Path, context: Any, n_vocab: int, buffers: Buffers
    ) -> None:
        """Wrap it; LlamaModel.scorer frees it."""
        self._path = path
        self._context = context
        self._memory = llama_cpp.llama_get_memory(context)
        self._buffers = buffers
        self.n_vocab = n_vocab
        self.n_ctx = int(llama_cpp.llama_n_ctx(context))
        self.n_batch = int(llama_cpp.llama_n_batch(context))
        self.n_sequences = int(llama_cpp.llama_n_seq_max(context))

    def evaluate(self, batch: Batch) -> FloatArray:
        """Run the model over a batch, as `Scorer.evaluate`.

        Raises:
            ResourceError, ChildError: memory ran out, or the engine failed.
        """
        rows = np.empty((int(batch.is_output.sum()), self.n_vocab), np.float32)
        done = 0
        for begin in range(0, len(batch), self.n_batch):
            piece = slice(begin, begin + self.n_batch)
            count = int(batch.is_output[piece].sum())
            self._decode(batch, piece)
            if count:
                pointer = llama_cpp.llama_get_logits(self._context)
                logits = np.ctypeslib.as_array(pointer, (count, self.n_vocab))
                rows[done : done + count] = logits
                done += count
            else:
                llama_cpp.llama_synchronize(self._context)
        return rows

    def evaluate_with_states(self, batch: Batch) -> tuple[FloatArray, FloatArray]:
        """The same, with what enters the output matrix; only of a context made for it.

        Returns:
            (n_outputs, n_vocab) logits, (n_outputs, n_embd) normed final hidden states.

        Raises:
            ResourceError, ChildError: as of `evaluate`.
        """
        model = llama_cpp.llama_get_model(self._context)
        n_embd = int(llama_cpp.llama_model_n_embd_out(model))
        # Such a context gives both for every token, wanted or not.
        everything = replace(batch, is_output=np.ones_like(batch.is_output))
        found = []
        for begin in range(0, len(batch), self.n_batch):
            piece = slice(begin, begin + self.n_batch)
            self._decode(everything, piece)
            is_output = batch.is_output[piece]
            logits = llama_cpp.llama_get_logits(self._context)
            states = llama_cpp.llama_get_embeddings(self._context)
            found.append(
                (
                    np.ctypeslib.as_array(logits, (len(is_output), self.n_vocab))[
                        is_output
                    ],
                    np.ctypeslib.as_array(states, (len(is_output), n_embd))[is_output],
                )
            )
        parts = zip(*found, strict=True)
        rows, inputs = (np.concatenate(part) for part in parts)
        return rows, inputs

    def copy(self, source: int, target: int) -> None:
        """Let a sequence begin as another is now; shared, not computed again."""
        llama_cpp.llama_memory_seq_rm(self._memory, target, -1, -1)
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def remove(self, sequence: int, begin: int = 0) -> None:
        """Forget a sequence from a position on."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, begin, -1)

    def clear(self) -> None:
        """Forget all sequences."""
        llama_cpp.llama_memory_clear(self._memory, False)

    def buffers(self) -> Buffers:
        """The memory of the model and of this context."""
        return self._buffers

    def _decode(self, batch: Batch, piece: slice) -> None:
        tokens = np.ascontiguousarray(batch.tokens[piece], np.int32)
        positions = np.ascontiguousarray(batch.positions[piece], np.int32)
        sequences = np.ascontiguousarray(batch.sequences[piece], np.int32)
        is_output = np.ascontiguousarray(batch.is_output[piece], np.int8)
        counts = np.ones(len(tokens), np.int32)
        # Each token's list of sequences has one entry: its own in `sequences`.
        lists = sequences.ctypes.data + 4 * np.arange(len(tokens), dtype=np.uintp)
        fields = llama_cpp.llama_batch(
            n_tokens=len(tokens),
            token=tokens.ctypes.data_as(_INTS),
            pos=positions.ctypes.data_as(_INTS),
            n_seq_id=counts.ctypes.data_as(_INTS),
            seq_id=lists.ctypes.data_as(_LISTS),
            logits=is_output.ctypes.data_as(_BYTES),
        )
        code = llama_cpp.llama_decode(self._context, fields)
        if code in {_NO_SLOT, _NO_MEMORY}:
            problem = (
                f"{len(tokens)} tokens do not fit into what is left of the context "
                f"of {self.n_ctx}"
                if code == _NO_SLOT
                else "memory ran out while it computed"
            )
            remedy = "use another --ctx, or a smaller -ngl"
            raise ResourceError(STAGE, self._path, problem, remedy)
        if code:
            raise ChildError(STAGE, self._path, f"llama_decode failed with {code}")


def _ggml_type(name: str) -> int:
    return int(GGMLQuantizationType[name.upper()])

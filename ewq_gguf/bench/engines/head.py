"""A base's output matrix in ggml: final hidden states to logits, by its own kernels.

llama.cpp rounds what enters a product to the type that the matrix's kernel takes: BF16
for BF16, blocks of 8 bits for the quantised types. The same kernel gives the same
logits, which a product in float32 does not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from ewq_gguf.bench.engines.scorer import STAGE, FloatArray
from ewq_gguf.errors import ChildError, ResourceError
from ewq_gguf.records import HeadShape

#: Rows of one product: their logits stay small beside the matrix.
_N_ROWS = 128
#: Bytes for the descriptions of tensors and the graph, not for what they hold.
_N_BYTES = 1 << 20
_CPU = 0


class _InitParams(ctypes.Structure):
    """ggml_init_params (ggml/include/ggml.h)."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


def _function(name: str, result: type | None, *arguments: type) -> Any:
    # A prototype of its own: the library's shared one has other users.
    kind = ctypes.CFUNCTYPE(result, *arguments)
    return kind((name, llama_cpp.llama_cpp._lib))


_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float
_INT, _INT64 = ctypes.c_int, ctypes.c_int64
_init = _function("ggml_init", _POINTER, _InitParams)
_free = _function("ggml_free", None, _POINTER)
_new_2d = _function("ggml_new_tensor_2d", _POINTER, _POINTER, _INT, _INT64, _INT64)
_mul_mat = _function("ggml_mul_mat", _POINTER, _POINTER, _POINTER, _POINTER)
_add = _function("ggml_add_inplace", _POINTER, _POINTER, _POINTER, _POINTER)
_scale = _function("ggml_scale_inplace", _POINTER, _POINTER, _POINTER, _FLOAT)
_tanh = _function("ggml_tanh_inplace", _POINTER, _POINTER, _POINTER)
_new_graph = _function("ggml_new_graph", _POINTER, _POINTER)
_expand = _function("ggml_build_forward_expand", None, _POINTER, _POINTER)
_new_backend = _function("ggml_backend_init_by_type", _POINTER, _INT, ctypes.c_char_p)
_free_backend = _function("ggml_backend_free", None, _POINTER)
_device_of = _function("ggml_backend_get_device", _POINTER, _POINTER)
_registry_of = _function("ggml_backend_dev_backend_reg", _POINTER, _POINTER)
_address = _function(
    "ggml_backend_reg_get_proc_address", _POINTER, _POINTER, ctypes.c_char_p
)
_allocate = _function("ggml_backend_alloc_ctx_tensors", _POINTER, _POINTER, _POINTER)
_free_buffer = _function("ggml_backend_buffer_free", None, _POINTER)
_buffer_bytes = _function("ggml_backend_buffer_get_size", _SIZE, _POINTER)
_compute = _function("ggml_backend_graph_compute", _INT, _POINTER, _POINTER)
_set = _function("ggml_backend_tensor_set", None, _POINTER, _POINTER, _SIZE, _SIZE)
_get = _function("ggml_backend_tensor_get", None, _POINTER, _POINTER, _SIZE, _SIZE)


@dataclass(frozen=True)
class Weights:
    """The output matrix as it lies in a file.

    Attributes:
        ggml_type: type of the matrix.
        matrix: its bytes, (n_vocab, bytes of a row).
        bias: (n_vocab,) or None.
    """

    ggml_type: str
    matrix: NDArray[np.uint8]
    bias: FloatArray | None

    @property
    def n_bytes(self) -> int:
        """Bytes of both."""
        return self.matrix.nbytes + (0 if self.bias is None else self.bias.nbytes)


class Head:
    """Logits of final hidden states; `open_head` makes one."""

    def __init__(self, backend: int, context: int, tensors: _Tensors) -> None:
        """Wrap what `open_head` frees."""
        self._backend = backend
        self._graph = _new_graph(context)
        self._tensors = tensors
        _expand(self._graph, tensors.logits)
        self.n_vocab = tensors.n_vocab
        self.n_bytes = tensors.n_bytes
        self.weights_bytes = tensors.weights_bytes

    def logits(self, states: FloatArray) -> FloatArray:
        """The matrix times each state, then scaled and capped; (n, E) -> (n, V).

        Raises:
            ChildError: ggml failed.
        """
        tensors = self._tensors
        rows = np.empty((len(states), tensors.n_vocab), np.float32)
        for begin in range(0, len(states), _N_ROWS):
            piece = np.zeros((_N_ROWS, states.shape[1]), np.float32)
            out = rows[begin : begin + _N_ROWS]
            piece[: len(out)] = states[begin : begin + _N_ROWS]
            _set(tensors.states, piece.ctypes.data, 0, piece.nbytes)
            if code := _compute(self._backend, self._graph):
                raise ChildError(STAGE, "ggml", f"the product failed with {code}")
            _get(tensors.logits, out.ctypes.data, 0, out.nbytes)
        return rows


@dataclass(frozen=True)
class _Tensors:
    """Pointers to the graph's ends; and bytes, of all and of the weights."""

    states: int
    logits: int
    n_vocab: int
    n_bytes: int
    weights_bytes: int


@contextmanager
def open_head(
    weights: Weights, shape: HeadShape, n_embd: int, n_threads: int
) -> Iterator[Head]:
    """Put a matrix into memory, until the block ends.

    Raises:
        ResourceError: it does not fit.
    """
    backend = _new_backend(_CPU, None)
    context = _init(_InitParams(_N_BYTES, None, True))
    buffer = None
    try:
        registry = _registry_of(_device_of(backend))
        set_threads = ctypes.CFUNCTYPE(None, _POINTER, _INT)
        set_threads(_address(registry, b"ggml_backend_set_n_threads"))(
            backend, n_threads
        )
        n_vocab = len(weights.matrix)
        number = int(GGMLQuantizationType[weights.ggml_type])
        matrix = _new_2d(context, number, n_embd, n_vocab)
        states = _new_2d(context, int(GGMLQuantizationType.F32), n_embd, _N_ROWS)
        logits = _mul_mat(context, matrix, states)
        if weights.bias is not None:
            bias = _new_2d(context, int(GGMLQuantizationType.F32), n_vocab, 1)
            logits = _add(context, logits, bias)
        logits = _shaped(context, logits, shape)
        buffer = _allocate(context, backend)
        if not buffer:
            problem = (
                f"its output matrix of {weights.matrix.nbytes:,} bytes does not fit"
            )
            raise ResourceError(STAGE, "reference", problem, "free some memory")
        _set(matrix, weights.matrix.ctypes.data, 0, weights.matrix.nbytes)
        if weights.bias is not None:
            _set(bias, weights.bias.ctypes.data, 0, weights.bias.nbytes)
        tensors = _Tensors(
            states, logits, n_vocab, _buffer_bytes(buffer), weights.n_bytes
        )
        yield Head(backend, context, tensors)
    finally:
        if buffer:
            _free_buffer(buffer)
        _free(context)
        _free_backend(backend)


def _shaped(context: int, logits: int, shape: HeadShape) -> int:
    """Scaled, then capped, as llama.cpp's graphs do it (src/models)."""
    if shape.scale != 1.0:
        logits = _scale(context, logits, shape.scale)
    if shape.softcap is not None:
        capped = _tanh(context, _scale(context, logits, 1.0 / shape.softcap))
        logits = _scale(context, capped, shape.softcap)
    return logits

"""ggml's own quantisers, called in this process: rows to blocks and back.

The library is the one that llama-quantize uses, so an error measured here is the
error of the file. Its calls release Python's lock: threads work side by side.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.ggml_types import row_bytes, type_number

Float32Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_FLOATS = ctypes.POINTER(ctypes.c_float)
_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _Traits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h, as far as it is needed."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _TO_FLOAT),
    )


class Ggml:
    """The quantisers of one build.

    Args:
        lib_dir: holds libggml-base.

    Raises:
        OSError: there is no such library.
    """

    def __init__(self, lib_dir: Path) -> None:
        """Load it."""
        suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
        self._library = ctypes.CDLL(str(lib_dir / f"libggml-base.{suffix}"))
        self._library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._library.ggml_quantize_chunk.argtypes = (
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
            ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
        )  # fmt: skip
        self._library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
        self._library.ggml_get_type_traits.argtypes = (ctypes.c_int,)

    def quantize(
        self, rows: Float32Array, ggml_type: str, importance: Float32Array | None = None
    ) -> Bytes:
        """Rows as blocks.

        Args:
            rows: (n, columns), finite, C-contiguous.
            ggml_type: whose block divides the columns.
            importance: (columns,), mean squared activations; None for equal ones.

        Returns:
            (n, bytes of a row).
        """
        n_rows, n_columns = rows.shape
        blocks = np.empty((n_rows, row_bytes(ggml_type, n_columns)), np.uint8)
        number = type_number(ggml_type)
        self._library.ggml_quantize_chunk(
            number,
            rows.ctypes.data,
            blocks.ctypes.data,
            0,
            n_rows,
            n_columns,
            None if importance is None else importance.ctypes.data,
        )
        return blocks

    def dequantize(self, blocks: Bytes, ggml_type: str, n_columns: int) -> Float32Array:
        """Blocks as rows; (n, bytes of a row) -> (n, n_columns)."""
        rows = np.empty((len(blocks), n_columns), np.float32)
        to_float = self._to_float(ggml_type)
        to_float(blocks.ctypes.data, rows.ctypes.data, rows.size)
        return rows

    def _to_float(self, ggml_type: str) -> Callable[[int, int, int], None]:
        traits = self._library.ggml_get_type_traits(type_number(ggml_type))[0]
        to_float: Callable[[int, int, int], None] = traits.to_float
        return to_float

"""Floats of a base GGUF as float32, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.llamacpp.ggml import Float32Array

#: As they lie in a file.
FLOATS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


def as_float(data: bytes, ggml_type: str) -> Float32Array:
    """Floats of a file as float32."""
    found = np.frombuffer(data, FLOATS[ggml_type])
    if ggml_type == "BF16":  # the upper half of a float32
        found = (found.astype(np.uint32) << 16).view(np.float32)
    values: Float32Array = found.astype(np.float32, copy=False)
    return values


def as_bytes(values: Float32Array, ggml_type: str) -> bytes:
    """Finite float32 as floats of a file, rounded to the nearest, ties to even."""
    if ggml_type != "BF16":
        return values.astype(FLOATS[ggml_type]).tobytes()
    bits: NDArray[np.uint32] = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + (0x7FFF + ((bits >> 16) & 1))
    return (rounded >> 16).astype("<u2").tobytes()

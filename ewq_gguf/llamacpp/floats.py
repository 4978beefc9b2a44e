"""Floats of a base GGUF as float32, and back; gguf-py converts."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from ewq_gguf.llamacpp.ggml import Float32Array


def as_float(data: bytes, ggml_type: str) -> Float32Array:
    """Floats of a file as float32."""
    raw = np.frombuffer(data, np.uint8)
    found = dequantize(raw, GGMLQuantizationType[ggml_type])
    return np.ascontiguousarray(found, np.float32)


def as_bytes(values: Float32Array, ggml_type: str) -> bytes:
    """Finite float32 as floats of a file, rounded to the nearest, ties to even."""
    return bytes(quantize(values, GGMLQuantizationType[ggml_type]).tobytes())

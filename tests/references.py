"""Slow float64 references: every formula as it is defined, every sum by fsum."""

from __future__ import annotations

from math import fsum, isclose, log, sqrt

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def decode(data: bytes, dtype: str) -> Floats:
    """The weights a file's bytes stand for, in float64."""
    if dtype == "BF16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)
    if dtype == "F8_E5M2":  # the upper byte of F16
        bits = np.frombuffer(data, np.uint8).astype("<u2") << 8
        return bits.view("<f2").astype(np.float64)
    if dtype == "F8_E4M3":
        return _e4m3(np.frombuffer(data, np.uint8).astype(np.int64))
    kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]
    return np.frombuffer(data, kind).astype(np.float64)


def _e4m3(codes: NDArray[np.int64]) -> Floats:
    """Bias 7, subnormals, no infinity; all ones is NaN (arXiv:2209.05433, table 1)."""
    exponent, mantissa = codes >> 3 & 15, codes & 7
    normal = (8 + mantissa) * 2.0 ** (exponent - 10)
    value = np.where(exponent > 0, normal, mantissa * 2.0**-9)
    value = np.where(codes & 127 == 127, np.nan, value)
    return np.where(codes > 127, -value, value)


def softmax_entropy(weights: Floats, epsilon: float) -> float:
    """-sum p ln(p + epsilon), straight from the definition, every term by fsum."""
    high = float(weights.max())
    exponentials = np.exp(weights - high)
    total = fsum(exponentials)
    if epsilon:
        p = exponentials / total
        return -fsum(p * np.log(p + epsilon))
    # ln p = (w - high) - ln total, exact where p underflows
    return log(total) - fsum(exponentials * (weights - high)) / total


def histogram_entropy(weights: Floats, n_bins: int) -> float:
    counts, _ = np.histogram(weights, n_bins)
    q = counts[counts > 0] / weights.size
    return -fsum(q * np.log2(q))


def reference(weights: Floats, epsilon: float = 0.01, n_bins: int = 256):
    """What a TensorScan must say of finite weights."""
    mean = fsum(weights) / weights.size
    return {
        "softmax_entropy_nats": softmax_entropy(weights, epsilon),
        "histogram_entropy_bits": histogram_entropy(weights, n_bins),
        "mean": mean,
        "std": sqrt(fsum((weights - mean) ** 2) / weights.size),
        "min": float(weights.min()),
        "max": float(weights.max()),
    }


def assert_agrees(entry, expected, rel: float = 1e-12) -> None:
    """An entry's numbers; those that may cancel relative to what is taken away.

    That is the spread for the mean, and for an entropy of almost nothing the logarithms
    it is the difference of, which are 15 at most.
    """
    scales = {
        "mean": max(-expected["min"], expected["max"]) * rel,
        "softmax_entropy_nats": 1e-14,
    }
    for name, value in expected.items():
        assert isclose(
            getattr(entry, name), value, rel_tol=rel, abs_tol=scales.get(name, 0.0)
        ), name

"""Scan: statistics from one pass over a checkpoint's weights."""

from __future__ import annotations

import hashlib
from typing import Literal

from ewq_gguf.records.base import Part, Record
from ewq_gguf.records.model import ModelIdentity


class Measures(Part):
    """Parameters of the measures.

    Attributes:
        epsilon: epsilon of the softmax entropy; 0.01 in the paper.
        n_bins: bins of the histogram entropy.
    """

    epsilon: float = 0.01
    n_bins: int = 256


class Statistics(Part):
    """Statistics of some weights; non-finite ones are only counted.

    Attributes:
        n_weights: how many.
        n_nonfinite: NaN and infinities among them.
        softmax_entropy_nats: -sum p ln(p + epsilon), p = softmax(weights).
        histogram_entropy_bits: entropy of `n_bins` equal bins between min and max.
        mean: mean weight.
        std: population standard deviation.
        min: smallest.
        max: largest.
        excess_kurtosis: 0 for a normal distribution.
        outlier_share: share of weights farther than 6 sigma from the mean.
        zero_share: share of weights that are exactly zero.
        exponent_entropy_bits: entropy of the floats' exponents.
        code_entropy_bits: entropy of the whole codes: the bits that a weight could be
            compressed without loss, each on its own; None for 32- and 64-bit ones.
        n_distinct: codes that occur; None for 32- and 64-bit ones.
    """

    n_weights: int
    n_nonfinite: int
    softmax_entropy_nats: float
    histogram_entropy_bits: float
    mean: float
    std: float
    min: float
    max: float
    excess_kurtosis: float
    outlier_share: float
    zero_share: float
    exponent_entropy_bits: float
    code_entropy_bits: float | None
    n_distinct: int | None

    @classmethod
    def nonfinite(cls, n_weights: int) -> Statistics:
        """Statistics of weights that are all NaN or infinite."""
        zero = 0.0
        return cls(
            n_weights=n_weights, n_nonfinite=n_weights, softmax_entropy_nats=zero,
            histogram_entropy_bits=zero, mean=zero, std=zero, min=zero, max=zero,
            excess_kurtosis=zero, outlier_share=zero, zero_share=zero,
            exponent_entropy_bits=zero, code_entropy_bits=None, n_distinct=None,
        )  # fmt: skip


class TensorScan(Statistics):
    """One GGUF tensor's weights, as the checkpoint holds them.

    Attributes:
        name: in the GGUF.
        hf_names: names of the checkpoint's tensors that it is made of.
        role: such as `attn_q`; see tensor_names.
        layer_idx: None outside the layers.
        shape: slowest dimension first, as safetensors writes it.
        dtype: as safetensors writes it: `BF16`, `F16`, `F32`.
        weights_crc32: over the code counts (8- and 16-bit) or over the bytes: another
            value means other weights.
        lattice: ggml types that hold every weight exactly, small to large; empty where
            none does, as of nearly all checkpoints that are not quantised already.
    """

    name: str
    hf_names: tuple[str, ...]
    role: str
    layer_idx: int | None
    shape: tuple[int, ...]
    dtype: str
    weights_crc32: int
    lattice: tuple[str, ...] = ()


class LayerScan(Part):
    """One layer: its linear matrices' entropies, weighted by their sizes.

    Attributes:
        layer_idx: from 0.
        n_weights: weights of the linear matrices.
        softmax_entropy_nats: weighted mean.
        histogram_entropy_bits: weighted mean.
    """

    layer_idx: int
    n_weights: int
    softmax_entropy_nats: float
    histogram_entropy_bits: float


class Scan(Record):
    """A whole checkpoint.

    Attributes:
        model: the scanned checkpoint.
        measures: the parameters.
        tensors: in the order of the GGUF names, layers numerically.
        layers: in order; empty where no layer has a linear matrix.
        dropped: checkpoint tensors that no GGUF tensor is made of.
        part: `i/n` of a scan that `ewq scan merge` makes whole; None for a whole one.
    """

    schema_name: Literal["ewq.scan"] = "ewq.scan"
    schema_version: Literal[2] = 2

    model: ModelIdentity
    measures: Measures
    tensors: tuple[TensorScan, ...]
    layers: tuple[LayerScan, ...]
    dropped: tuple[str, ...]
    part: str | None = None

    @property
    def weights_sha256(self) -> str:
        """SHA-256 over every tensor's name and weights_crc32: which weights these are.

        It rests on integers alone, so every machine finds the same.
        """
        text = repr([(tensor.name, tensor.weights_crc32) for tensor in self.tensors])
        return hashlib.sha256(text.encode()).hexdigest()

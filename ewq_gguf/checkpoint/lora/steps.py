"""The change of one matrix by an adapter, before its weights are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ewq_gguf.checkpoint.header import TensorHeader
from ewq_gguf.checkpoint.lora.adapter import Adapter
from ewq_gguf.checkpoint.lora.low_rank import Change, FloatArray, LowRank, ReplacedRows

#: Parts of a module, as the adapter's file calls them.
LINEAR = ("lora_A", "lora_B")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE, BIAS, ROWS = (
    "lora_magnitude_vector",
    "lora_B.bias",
    "trainable_tokens_delta",
)

Parts = Mapping[str, TensorHeader]
#: Makes a change out of the adapter's arrays, which are read first.
Maker = Callable[[Mapping[str, FloatArray]], Change]


@dataclass(frozen=True)
class Step:
    """One adapter's change to one matrix; its weights are not read yet.

    Attributes:
        adapter: whose it is.
        parts: the adapter's tensors that it takes, by part.
        make: makes the change out of them.
        matrix: The index of the changed matrix in a three-dimensional tensor.
    """

    adapter: Adapter
    parts: Parts
    make: Maker
    matrix: int = 0


def low_rank_step(adapter: Adapter, parts: Parts, scale: float, *, turn: bool) -> Step:
    """W + scale B A, with DoRA's magnitudes where there are any.

    Args:
        adapter: whose it is.
        parts: A, B and perhaps the magnitudes.
        scale: The factor of the product.
        turn: the matrix is stored as (in, out), so that (B A) transposed is added.
    """
    ends = EMBEDDING if EMBEDDING[0] in parts else LINEAR

    def make(arrays: Mapping[str, FloatArray]) -> Change:
        a, b = (arrays[end] for end in ends)
        left, right = (a.T, b.T) if turn else (b, a)
        return LowRank(left, right, scale, arrays.get(MAGNITUDE))

    return Step(adapter, {key: parts[key] for key in parts if key != BIAS}, make)


def bias_step(adapter: Adapter, bias: TensorHeader, scale: float) -> Step:
    """The bias of B (lora_bias): scale times it is added to the module's own."""

    def make(arrays: Mapping[str, FloatArray]) -> Change:
        return LowRank(arrays[BIAS][:, None], np.ones((1, 1)), scale)

    return Step(adapter, {BIAS: bias}, make)


def rows_step(adapter: Adapter, rows: TensorHeader, indices: list[int]) -> Step:
    """Rows of single tokens (trainable_token_indices), in place of the base's."""

    def make(arrays: Mapping[str, FloatArray]) -> Change:
        return ReplacedRows(np.array(indices, np.int64), arrays[ROWS])

    return Step(adapter, {ROWS: rows}, make)

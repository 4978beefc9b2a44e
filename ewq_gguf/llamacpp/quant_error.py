"""Errors of tensors in quantised types: sampled rows, and ggml's own quantisers."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from math import prod, sqrt
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.checkpoint.gguf_file import GgufTensor
from ewq_gguf.errors import InputError
from ewq_gguf.ggml_types import TYPES, row_bytes
from ewq_gguf.llamacpp.floats import as_float
from ewq_gguf.llamacpp.ggml import Float32Array, Ggml
from ewq_gguf.records.quant_error import QuantError

STAGE = "plan"
#: Rows that are sampled at least: the error is then known to a few percent.
_MIN_ROWS = 64
#: Share of the sampled rows that types with a slow quantiser are tried on.
_SLOW_SHARE = 0.25


@dataclass(frozen=True)
class Sample:
    """Sampled rows of a tensor.

    Attributes:
        rows: (n, columns).
        matrices: (n,), number of each row's expert; 0 without experts.
        importance: (experts, columns), or None.
        n_all: number of the tensor's rows.
    """

    rows: Float32Array
    matrices: NDArray[np.int64]
    importance: Float32Array | None
    n_all: int


def quant_errors(
    base: Path,
    types: Sequence[tuple[GgufTensor, Sequence[str]]],
    ggml: Ggml,
    *,
    share: float,
    importance: Mapping[str, Float32Array] | None = None,
    n_threads: int = 1,
    on_begin: Callable[[str, str], None] = lambda _name, _type: None,
) -> Iterator[QuantError]:
    """Measure tensors in types, the largest tensor first.

    Args:
        base: base GGUF, 16- or 32-bit.
        types: the tensors, and types of each whose blocks divide its rows.
        ggml: ggml's quantisers.
        share: share of the rows that is sampled; 64 rows of a tensor at least.
        importance: (matrices, columns) mean squared activations by tensor.
        n_threads: tensors side by side.
        on_begin: called with a tensor's name and a type before its quantiser runs.

    Yields:
        Each error as soon as it is measured.

    Raises:
        InputError: the file ends before a tensor does.
    """
    weights = importance or {}
    order = sorted(types, key=lambda pair: -pair[0].size_bytes)
    with base.open("rb") as file, ThreadPoolExecutor(n_threads) as pool:
        futures = [
            pool.submit(
                _tensor_errors,
                partial(
                    sample,
                    file.fileno(),
                    base,
                    tensor,
                    share,
                    by_matrix(weights.get(tensor.name), tensor),
                ),
                tensor.name,
                of_tensor,
                ggml,
                on_begin,
            )
            for tensor, of_tensor in order
        ]
        try:
            for future in as_completed(futures):
                yield from future.result()
        finally:
            for future in futures:
                future.cancel()


def by_matrix(
    importance: Float32Array | None, tensor: GgufTensor
) -> Float32Array | None:
    """One row of importance for each matrix of a tensor.

    llama-imatrix keeps one count for a stack that is not of experts (the heads of
    multi-head latent attention), and all its columns in one row.
    """
    return None if importance is None else importance.reshape(-1, tensor.shape[-1])


def sample(
    descriptor: int,
    path: Path,
    tensor: GgufTensor,
    share: float,
    importance: Float32Array | None,
) -> Sample:
    """Some rows of a tensor, drawn by its name: the same whenever it is read.

    Args:
        descriptor: descriptor of the open file.
        path: path of it, for messages.
        tensor: tensor of a float type.
        share: share of the rows that is sampled.
        importance: (matrices, columns) mean squared activations.

    Raises:
        InputError: the file ends before the tensor does.
    """
    n_columns = tensor.shape[-1]
    n_all = prod(tensor.shape[:-1])
    count = min(n_all, max(_MIN_ROWS, round(share * n_all)))
    random = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    numbers = np.sort(random.choice(n_all, count, replace=False))
    size = row_bytes(tensor.ggml_type, n_columns)
    data = bytearray()
    for number in numbers.tolist():
        row = os.pread(descriptor, size, tensor.offset + number * size)
        if len(row) != size:
            problem = f"{tensor.name} ends before its row {number}"
            raise InputError(STAGE, path, problem, "make the file again")
        data += row
    matrices = numbers // tensor.shape[-2] if len(tensor.shape) > 2 else 0 * numbers
    rows = as_float(bytes(data), tensor.ggml_type).reshape(count, n_columns)
    return Sample(rows, matrices, importance, n_all)


def error_of(ggml: Ggml, sampled: Sample, ggml_type: str) -> tuple[float, float, float]:
    """The share of the energy that a type loses, its standard error, and the plain one.

    sum I (w - w')^2 / sum I w^2, a ratio of sums over rows; the error is that of a
    ratio estimated from some of them. The last number is the ratio for I = 1.

    Args:
        ggml: ggml's quantisers.
        sampled: sampled rows.
        ggml_type: type whose blocks divide the rows.
    """
    lost, energy, plain = [], [], np.zeros(2)
    for matrix in np.unique(sampled.matrices):
        rows = np.ascontiguousarray(sampled.rows[sampled.matrices == matrix])
        weight = None
        if sampled.importance is not None:
            weight = np.ascontiguousarray(sampled.importance[matrix])
        blocks = ggml.quantize(rows, ggml_type, weight)
        moved = ggml.dequantize(blocks, ggml_type, rows.shape[1])
        np.subtract(rows, moved, out=moved)
        scale = np.ones(rows.shape[1], np.float32) if weight is None else weight
        squares = np.square(moved, out=moved), np.square(rows)
        lost.append(squares[0] @ scale.astype(np.float64))
        energy.append(squares[1] @ scale.astype(np.float64))
        plain += [square.sum(dtype=np.float64) for square in squares]
    ratio, stderr = _ratio(np.concatenate(lost), np.concatenate(energy), sampled.n_all)
    return ratio, stderr, float(plain[0] / plain[1]) if plain[1] else 0.0


def _ratio(
    lost: NDArray[np.float64], energy: NDArray[np.float64], n_all: int
) -> tuple[float, float]:
    total, n = float(energy.sum()), len(energy)
    if total == 0.0:  # weights or importance are zero: there is nothing to lose
        return 0.0, 0.0
    ratio = float(lost.sum()) / total
    if n < 2 or n >= n_all:
        return ratio, 0.0
    spread = float(np.square(lost - ratio * energy).sum()) * n / (n - 1)
    return ratio, sqrt(spread * (1 - n / n_all)) / total


def _tensor_errors(
    read: Callable[[], Sample],
    name: str,
    types: Sequence[str],
    ggml: Ggml,
    on_begin: Callable[[str, str], None],
) -> list[QuantError]:
    sampled = read()
    errors = []
    for ggml_type in types:
        n_rows = len(sampled.rows)
        if TYPES[ggml_type].is_slow:
            n_rows = max(min(_MIN_ROWS, n_rows), round(_SLOW_SHARE * n_rows))
        on_begin(name, ggml_type)
        error, stderr, plain = error_of(ggml, _first(sampled, n_rows), ggml_type)
        errors.append(
            QuantError(
                name=f"{name} {ggml_type}",
                error=error,
                error_stderr=stderr,
                plain_error=plain,
                n_rows=n_rows,
            )
        )
    return errors


def _first(sampled: Sample, n_rows: int) -> Sample:
    """Some of the sampled rows, evenly spaced."""
    if n_rows >= len(sampled.rows):
        return sampled
    places = np.linspace(0, len(sampled.rows) - 1, n_rows).round().astype(np.intp)
    return Sample(
        sampled.rows[places], sampled.matrices[places], sampled.importance,
        sampled.n_all,
    )  # fmt: skip

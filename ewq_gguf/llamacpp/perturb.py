"""A base GGUF with some tensors moved to where a type would put them.

The values that a type can hold are written in the base's own float type: the file keeps
its layout, nothing is quantised by llama-quantize, and activations are rounded as the
base rounds them. What such a file loses is the weights' error alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path

from ewq_gguf.checkpoint.gguf_file import GgufTensor, read_gguf
from ewq_gguf.ggml_types import row_bytes, written_type
from ewq_gguf.llamacpp.floats import as_bytes, as_float
from ewq_gguf.llamacpp.ggml import Float32Array, Ggml
from ewq_gguf.llamacpp.quant_error import of_matrices

#: Weights that are held in float32 at once, per thread: 32 MiB.
_BLOCK = 1 << 23


class Perturbed:
    """A copy of a base that can be moved and moved back.

    Args:
        base: a 16- or 32-bit GGUF.
        copy: where the copy goes; overwritten.
        ggml: the quantisers.
        importance: (matrices, columns) mean squared activations by tensor.
        n_threads: blocks of rows that are worked on at once.
    """

    def __init__(
        self,
        base: Path,
        copy: Path,
        ggml: Ggml,
        importance: Mapping[str, Float32Array],
        n_threads: int = 1,
    ) -> None:
        """Copy the base."""
        self.path = copy
        self._base = base
        self._ggml = ggml
        self._importance = importance
        self._n_threads = n_threads
        self._tensors = {tensor.name: tensor for tensor in read_gguf(base).tensors}
        shutil.copyfile(base, copy)

    @contextmanager
    def moved(self, tensors: Iterable[str], ggml_type: str) -> Iterator[Path]:
        """The file with these tensors as a type holds them, until the block ends."""
        names = list(tensors)
        try:
            for name in names:
                self._write(self._tensors[name], ggml_type)
            yield self.path
        finally:
            for name in names:
                self._write(self._tensors[name], None)

    def _write(self, tensor: GgufTensor, ggml_type: str | None) -> None:
        n_columns = tensor.shape[-1]
        n_rows = prod(tensor.shape[:-1])
        per_matrix = tensor.shape[-2] if len(tensor.shape) > 1 else 1
        size = row_bytes(tensor.ggml_type, n_columns)
        step = max(1, min(_BLOCK // n_columns, per_matrix))
        # No block lies in two experts: each has an importance of its own.
        blocks = [
            (begin, min(begin + step, matrix + per_matrix))
            for matrix in range(0, n_rows, per_matrix)
            for begin in range(matrix, matrix + per_matrix, step)
        ]
        with (
            self._base.open("rb") as source,
            self.path.open("r+b") as target,
            ThreadPoolExecutor(self._n_threads) as pool,
        ):

            def work(block: tuple[int, int]) -> None:
                begin, end = block
                offset = tensor.offset + begin * size
                data = os.pread(source.fileno(), (end - begin) * size, offset)
                if ggml_type is not None:
                    weight = of_matrices(self._importance.get(tensor.name), tensor)
                    row = None if weight is None else weight[begin // per_matrix]
                    data = self._moved(data, tensor, ggml_type, row)
                os.pwrite(target.fileno(), data, offset)

            list(pool.map(work, blocks))

    def _moved(
        self,
        data: bytes,
        tensor: GgufTensor,
        ggml_type: str,
        importance: Float32Array | None,
    ) -> bytes:
        n_columns = tensor.shape[-1]
        written = written_type(ggml_type, n_columns)
        rows = as_float(data, tensor.ggml_type).reshape(-1, n_columns)
        blocks = self._ggml.quantize(rows, written, importance)
        return as_bytes(
            self._ggml.dequantize(blocks, written, n_columns), tensor.ggml_type
        )

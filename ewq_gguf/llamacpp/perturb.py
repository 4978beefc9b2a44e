"""A copy of a base GGUF in which some tensors get the values that a type holds.

These values are written in the base's own float type: the file keeps its layout,
llama-quantize has no part in it, and activations are rounded as the base rounds them.
The loss of such a file is that of the weights' errors alone.
"""

from __future__ import annotations

import json
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
from ewq_gguf.llamacpp.quant_error import by_matrix

#: Weights that are held in float32 at once, per thread: 32 MiB.
_BLOCK = 1 << 23


class PerturbedCopy:
    """A copy of a base whose tensors are overwritten and restored.

    The copy may be there from an earlier process. A file beside it names the
    tensors that are overwritten; a process that was killed leaves that file, and its
    tensors are restored first.

    Args:
        base: base GGUF, 16- or 32-bit.
        path: path of the copy; made where it is missing.
        ggml: ggml's quantisers.
        importance: (matrices, columns) mean squared activations by tensor.
        n_threads: blocks of rows that are worked on at once.
    """

    def __init__(
        self,
        base: Path,
        path: Path,
        ggml: Ggml,
        importance: Mapping[str, Float32Array],
        n_threads: int = 1,
    ) -> None:
        """Copy the base, or restore the copy that is there."""
        self.path = path
        self._base = base
        self._ggml = ggml
        self._importance = importance
        self._n_threads = n_threads
        self._tensors = {tensor.name: tensor for tensor in read_gguf(base).tensors}
        self._overwritten = path.with_suffix(".overwritten")
        if not path.exists():
            part = path.with_suffix(".part")
            shutil.copyfile(base, part)
            part.replace(path)
        elif self._overwritten.exists():
            self._restore(json.loads(self._overwritten.read_bytes()))

    @contextmanager
    def perturbed(self, tensors: Iterable[str], ggml_type: str) -> Iterator[Path]:
        """The file with these tensors as a type holds them, until the block ends."""
        names = list(tensors)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(names))
        part.replace(self._overwritten)
        try:
            for name in names:
                self._write(self._tensors[name], ggml_type)
            yield self.path
        finally:
            self._restore(names)

    def _restore(self, names: Iterable[str]) -> None:
        for name in names:
            self._write(self._tensors[name], None)
        self._overwritten.unlink()

    def _write(self, tensor: GgufTensor, ggml_type: str | None) -> None:
        """Write a tensor's values as a type holds them, or the base's for None."""
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
                    weight = by_matrix(self._importance.get(tensor.name), tensor)
                    row = None if weight is None else weight[begin // per_matrix]
                    data = self._quantized(data, tensor, ggml_type, row)
                os.pwrite(target.fileno(), data, offset)

            list(pool.map(work, blocks))

    def _quantized(
        self,
        data: bytes,
        tensor: GgufTensor,
        ggml_type: str,
        importance: Float32Array | None,
    ) -> bytes:
        """Rows of a tensor, quantised and dequantised; bytes of the base's type."""
        n_columns = tensor.shape[-1]
        written = written_type(ggml_type, n_columns)
        rows = as_float(data, tensor.ggml_type).reshape(-1, n_columns)
        blocks = self._ggml.quantize(rows, written, importance)
        return as_bytes(
            self._ggml.dequantize(blocks, written, n_columns), tensor.ggml_type
        )

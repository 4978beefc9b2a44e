"""Are the values of a converted file the checkpoint's?

The converter moves weights (it splits, joins and transposes tensors), so a tensor's
values are compared in sorted order: rounding to a float type keeps that order, and what
a quantised block may be off is bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.gguf_file import GgufTensor
from ewq_gguf.checkpoint.mapping import WEIGHT_DTYPES, Region
from ewq_gguf.checkpoint.reader import BUFFER_BYTES, RangeReader
from ewq_gguf.checkpoint.regions import parts_of
from ewq_gguf.entropy.codes import code_values
from ewq_gguf.errors import VerificationError
from ewq_gguf.ggml_types import FLOAT_TYPES
from ewq_gguf.llamacpp.floats import as_bytes, as_float
from ewq_gguf.llamacpp.ggml import Float32Array
from ewq_gguf.records import Source

# A block's step is its largest value / 127, kept in F16: half a step, and 127 times
# what the step is off.
_Q8_0_ERROR = (0.5 + 127 * 2.0**-11) / 127


class ValueCheck:
    """Compares the tensors of one file with the checkpoint they were made from."""

    def __init__(self, checkpoint: Checkpoint, path: Path) -> None:
        """Remember both; nothing is read yet."""
        self._files = {t.name: (shard, t) for shard, t in checkpoint.tensors}
        self._path = path

    def compare(
        self, tensor: GgufTensor, sources: tuple[Source, ...], *, computed: bool
    ) -> bool:
        """Whether a tensor's values were compared; only finite ones pass.

        Args:
            tensor: A tensor of the file.
            sources: The checkpoint tensors that it was made of.
            computed: Whether its values are not the checkpoint's own; then they are
                not compared.

        Raises:
            VerificationError: its values are not finite, or not the checkpoint's.
        """
        found = self._stored(tensor)
        n_bad = int(np.count_nonzero(~np.isfinite(found)))
        if n_bad:
            raise self._wrong(tensor, f"{n_bad:,} values are not finite")
        if computed or not self._are_weights(sources):
            return False
        wanted = np.sort(self._source_values(sources))
        if wanted.size != found.size:
            raise self._wrong(
                tensor, f"has {found.size:,} values, the checkpoint {wanted.size:,}"
            )
        found.sort()
        if tensor.ggml_type == "Q8_0":
            limit = _Q8_0_ERROR * float(np.abs(wanted).max(initial=0.0))
        else:
            limit = 0.0
            wanted = as_float(as_bytes(wanted, tensor.ggml_type), tensor.ggml_type)
        error = float(np.abs(wanted - found).max(initial=0.0))
        if error > limit:
            raise self._wrong(
                tensor, f"a value is off by {error:.3g}, {limit:.3g} may be"
            )
        return True

    def _wrong(self, tensor: GgufTensor, problem: str) -> VerificationError:
        return VerificationError(
            "verify",
            self._path,
            f"{tensor.name} ({tensor.ggml_type}): {problem}",
            "do not use this file; make it again, or in another type",
        )

    def _are_weights(self, sources: tuple[Source, ...]) -> bool:
        return bool(sources) and all(
            self._files[source.hf_name][1].dtype in WEIGHT_DTYPES for source in sources
        )

    def _stored(self, tensor: GgufTensor) -> Float32Array:
        """A tensor's values in the file, (n,)."""
        with self._path.open("rb") as file:
            file.seek(tensor.offset)
            data = file.read(tensor.size_bytes)
        if tensor.ggml_type in FLOAT_TYPES:
            return as_float(data, tensor.ggml_type).ravel().copy()
        raw = np.frombuffer(data, np.uint8)
        values = dequantize(raw, GGMLQuantizationType[tensor.ggml_type])
        return np.array(values, np.float32).ravel()

    def _source_values(self, sources: tuple[Source, ...]) -> Float32Array:
        """The values in the checkpoint, (n,)."""
        buffer = np.empty(BUFFER_BYTES, np.uint8)
        pieces = []
        with RangeReader() as reader:
            for source in sources:
                shard, header = self._files[source.hf_name]
                reader.open(shard)
                for part in parts_of(Region(shard, header, source.box), reader):
                    for piece in part.pieces(reader, buffer):
                        if piece.dtype.kind == "u":
                            pieces.append(code_values(header.dtype)[piece])
                        else:
                            pieces.append(piece.copy())
        return np.concatenate([np.asarray(p, np.float32) for p in pieces])


def check_all(
    checkpoint: Checkpoint,
    path: Path,
    tensors: tuple[GgufTensor, ...],
    sources: Mapping[str, tuple[Source, ...]],
    computed: frozenset[str],
) -> frozenset[str]:
    """Compare every tensor of a file; the names of those that were not computed.

    Raises:
        VerificationError: the first that is not right.
    """
    check = ValueCheck(checkpoint, path)
    return frozenset(
        tensor.name
        for tensor in tensors
        if check.compare(tensor, sources[tensor.name], computed=tensor.name in computed)
    )

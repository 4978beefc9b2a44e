"""Are the values of a converted file the checkpoint's?

The converter moves weights (it splits, joins and transposes tensors), so a tensor's
values are compared in sorted order: rounding to a float type keeps that order, and what
a quantised block may be off is bounded. Both sides are read in pieces, of which only is
kept how often a value occurs, to 22 bits of its float32, and a checksum of all bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.gguf_file import GgufTensor
from ewq_gguf.checkpoint.mapping import WEIGHT_DTYPES, Region
from ewq_gguf.checkpoint.reader import RangeReader
from ewq_gguf.checkpoint.regions import parts_of
from ewq_gguf.entropy.codes import code_values
from ewq_gguf.errors import VerificationError
from ewq_gguf.llamacpp.floats import as_bytes, as_float
from ewq_gguf.llamacpp.ggml import Float32Array
from ewq_gguf.records import Source

# A block's step is its largest value / 127, kept in F16: half a step, and 127 times
# what the step is off.
_Q8_0_ERROR = (0.5 + 127 * 2.0**-11) / 127

_PIECE_BYTES = 8 << 20
_DROPPED_BITS = 10
#: How much smaller a value is without them, at most: a part of it.
_KEY_ERROR = 2.0 ** (_DROPPED_BITS - 23)


class _Distribution:
    """How often each value of a tensor occurs, in whatever order they come.

    BF16 and F16 fit in the bits that are kept; of other float32 a checksum tells the
    rest.
    """

    def __init__(self) -> None:
        """Begin with no value."""
        self.size = 0
        self.largest = 0.0
        self.checksum = 0
        self._keys = np.empty(0, np.uint32)
        self._counts = np.empty(0, np.int64)

    def add(self, values: Float32Array) -> None:
        """Count finite values, (n,)."""
        bits = (values + np.float32(0)).view(np.uint32)  # -0 is 0
        mixed = bits.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ mixed >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
        self.size += values.size
        self.largest = max(self.largest, float(np.abs(values).max(initial=0.0)))
        self.checksum = (self.checksum + int(mixed.sum())) % (1 << 64)
        keys, counts = np.unique(bits >> _DROPPED_BITS, return_counts=True)
        self._keys, places = np.unique(
            np.concatenate([self._keys, keys]), return_inverse=True
        )
        counts = np.concatenate([self._counts, counts])
        self._counts = np.bincount(places, counts).astype(np.int64)

    def ranks(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Values in ascending order, and how many are not larger than each."""
        values = (self._keys << _DROPPED_BITS).view(np.float32).astype(np.float64)
        order = np.argsort(values)
        return values[order], np.cumsum(self._counts[order])


def _largest_difference(ours: _Distribution, theirs: _Distribution) -> float:
    """The largest difference between values of the same rank; both have as many."""
    (our_values, our_ranks), (their_values, their_ranks) = ours.ranks(), theirs.ranks()
    ranks = np.union1d(our_ranks, their_ranks)
    differences = (
        our_values[np.searchsorted(our_ranks, ranks)]
        - their_values[np.searchsorted(their_ranks, ranks)]
    )
    return float(np.abs(differences).max(initial=0.0))


class ValueCheck:
    """Compares the tensors of one file with the checkpoint they were made from.

    Args:
        checkpoint: the file's source.
        path: the file.
        piece_bytes: how much is read at a time, at least a block of any type.
    """

    def __init__(
        self, checkpoint: Checkpoint, path: Path, piece_bytes: int = _PIECE_BYTES
    ) -> None:
        """Remember both; nothing is read yet."""
        self._files = {t.name: (shard, t) for shard, t in checkpoint.tensors}
        self._path = path
        self._piece_bytes = piece_bytes

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
        stored, n_bad = _Distribution(), 0
        for values in self._stored(tensor):
            n_bad += values.size - int(np.count_nonzero(np.isfinite(values)))
            if not n_bad:
                stored.add(values)
        if n_bad:
            raise self._wrong(tensor, f"{n_bad:,} values are not finite")
        if computed or not self._are_weights(sources):
            return False
        source = _Distribution()
        for values in self._source_values(sources):
            if tensor.ggml_type != "Q8_0":
                values = as_float(as_bytes(values, tensor.ggml_type), tensor.ggml_type)
            source.add(values)
        if source.size != stored.size:
            raise self._wrong(
                tensor, f"has {stored.size:,} values, the checkpoint {source.size:,}"
            )
        limit = 0.0
        if tensor.ggml_type == "Q8_0":
            limit = (_Q8_0_ERROR + _KEY_ERROR) * source.largest
        error = _largest_difference(source, stored)
        if not error <= limit:
            raise self._wrong(
                tensor, f"a value is off by {error:.3g}, {limit:.3g} may be"
            )
        if limit == 0.0 and source.checksum != stored.checksum:
            raise self._wrong(
                tensor, f"a value is off by a part of {_KEY_ERROR:.1g} of it at most"
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

    def _stored(self, tensor: GgufTensor) -> Iterator[Float32Array]:
        """A tensor's values in the file, piece by piece, each (n,)."""
        ggml_type = GGMLQuantizationType[tensor.ggml_type]
        _, block_bytes = GGML_QUANT_SIZES[ggml_type]
        step = max(1, self._piece_bytes // block_bytes) * block_bytes
        with self._path.open("rb") as file:
            file.seek(tensor.offset)
            for begin in range(0, tensor.size_bytes, step):
                data = file.read(min(step, tensor.size_bytes - begin))
                values = dequantize(np.frombuffer(data, np.uint8), ggml_type)
                yield np.asarray(values, np.float32).ravel()

    def _source_values(self, sources: tuple[Source, ...]) -> Iterator[Float32Array]:
        """The values in the checkpoint, piece by piece, each (n,)."""
        buffer = np.empty(self._piece_bytes, np.uint8)
        with RangeReader() as reader:
            for source in sources:
                shard, header = self._files[source.hf_name]
                reader.open(shard)
                for part in parts_of(Region(shard, header, source.box), reader):
                    for piece in part.pieces(reader, buffer):
                        if piece.dtype.kind == "u":
                            piece = code_values(header.dtype)[piece]
                        yield np.asarray(piece, np.float32)


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

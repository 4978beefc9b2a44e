"""The tensors of a checkpoint that are parts of packed weights, by their names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ewq_gguf.checkpoint.completeness import check_complete
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.header import TensorHeader
from ewq_gguf.checkpoint.leftovers import check_names
from ewq_gguf.checkpoint.packing import UNUSED, Packing
from ewq_gguf.checkpoint.shards import ShardFile
from ewq_gguf.errors import InputError

Place = tuple[ShardFile, TensorHeader]


@dataclass(frozen=True)
class PackedWeight:
    """One packed weight, of which nothing is read yet.

    Attributes:
        name: its name when it is unpacked.
        parts: its tensors by their endings, the integers first.
        packing: the checkpoint's.
    """

    name: str
    parts: Mapping[str, Place]
    packing: Packing

    @property
    def integers(self) -> Place:
        """The tensor of its integers, and the file that it is in."""
        return next(iter(self.parts.values()))


def packed_weights(
    checkpoint: Checkpoint, packing: Packing
) -> tuple[list[PackedWeight], set[str]]:
    """The packed weights in file order, and the names of tensors that are not copied.

    Raises:
        InputError: there is none.
    """
    places = {tensor.name: (shard, tensor) for shard, tensor in checkpoint.tensors}
    replaced = {name for name in places if name.endswith(UNUSED)}
    weights = []
    for name, (_, tensor) in places.items():
        for endings in packing.endings(tensor.dtype):
            parts = _parts(name, endings, places)
            if parts is None:
                continue
            weights.append(PackedWeight(_plain_name(name, endings[0]), parts, packing))
            replaced |= {part.name for _, part in parts.values()}
            break
    if not weights:
        raise InputError(
            "scan",
            checkpoint.folder,
            f"config.json says {packing.method}, and no tensor is packed so",
            "download config.json and the weights of one revision",
        )
    return weights, replaced


def _plain_name(name: str, ending: str) -> str:
    """The name of an unpacked weight, by the name of one of its tensors."""
    stem = name.removesuffix(ending)
    return stem if ending in ("_blocks", "_scales") else f"{stem}.weight"


def _parts(
    name: str, endings: Iterable[str], places: Mapping[str, Place]
) -> dict[str, Place] | None:
    """The tensors of one weight by their endings; None where one is missing."""
    first, *_ = endings
    if not name.endswith(first):
        return None
    stem, parts = name.removesuffix(first), {}
    for ending in endings:
        end = ending.strip("()")
        if stem + end in places:
            parts[end] = places[stem + end]
        elif end == ending:
            return None
    return parts


def check_sound(
    checkpoint: Checkpoint,
    packing: Packing,
    weights: Sequence[PackedWeight],
    replaced: Collection[str],
) -> None:
    """Refuse what the unpacked checkpoint would be refused for, by names alone.

    Raises:
        InputError: a tensor, or a part of a packed weight, is missing; or tensors are
            no weights of the model.
    """
    rests: dict[str, set[str]] = {}  # parts of weights whose other parts are missing
    shards = []
    for shard in checkpoint.shards:
        tensors = [
            replace(weight.integers[1], name=weight.name, dtype="F32")
            for weight in weights
            if weight.integers[0] is shard
        ]
        for tensor in shard.header.tensors:
            if tensor.name in replaced:
                continue
            ending = packing.ending_of_part(tensor.name, tensor.dtype)
            if ending is None:
                tensors.append(tensor)
            else:
                rests.setdefault(_plain_name(tensor.name, ending), set()).add(ending)
        header = replace(shard.header, tensors=tuple(tensors))
        shards.append(replace(shard, header=header))
    plain = replace(checkpoint, shards=tuple(shards))
    check_names(plain)
    check_complete(plain)
    if rests:
        name, endings = min(rests.items())
        raise InputError(
            "scan",
            checkpoint.folder,
            f"half a checkpoint: {len(rests)} packed weights lack parts: of {name} "
            f"there is only {', '.join(sorted(endings))}",
            "download it again",
        )

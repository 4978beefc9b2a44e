"""Which checkpoint tensor feeds which GGUF tensor."""

from __future__ import annotations

from dataclasses import dataclass

from ewq_gguf.checkpoint.folder import Checkpoint, ShardFile
from ewq_gguf.checkpoint.header import TensorHeader
from ewq_gguf.errors import InputError
from ewq_gguf.tensor_names import gguf_name, is_dropped, layer_idx

#: What the scanner reads.
SCANNED_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class MappedTensor:
    """A GGUF tensor and where its weights lie."""

    name: str
    source: TensorHeader
    shard: ShardFile


def map_tensors(
    checkpoint: Checkpoint,
) -> tuple[tuple[MappedTensor, ...], tuple[str, ...]]:
    """Map every tensor of a checkpoint.

    Returns:
        The mapped tensors in the order of the GGUF, layers numerically, and the
        names of those the GGUF has no use for.

    Raises:
        InputError: a tensor has no GGUF name, or a dtype the scanner cannot read.
    """
    identity = checkpoint.identity
    mapped: dict[str, MappedTensor] = {}
    dropped: list[str] = []
    for shard, tensor in checkpoint.tensors:
        if is_dropped(tensor.name) or tensor.n_weights == 0 or not tensor.shape:
            dropped.append(tensor.name)
            continue
        name = gguf_name(identity.gguf_architecture, identity.n_layers, tensor.name)
        if name is None:
            raise InputError(
                "scan",
                shard.path,
                f"{tensor.name} has no place in a {identity.gguf_architecture} GGUF "
                f"of {identity.n_layers} layers",
                "check config.json; this checkpoint is not what it says",
            )
        if tensor.dtype not in SCANNED_DTYPES:
            raise InputError(
                "scan",
                shard.path,
                f"{tensor.name} is {tensor.dtype}, which is not scanned",
                f"use a checkpoint in {', '.join(SCANNED_DTYPES)}",
            )
        if name in mapped:
            raise InputError(
                "scan",
                shard.path,
                f"{mapped[name].source.name} and {tensor.name} both feed {name}",
                "remove one",
            )
        mapped[name] = MappedTensor(name, tensor, shard)
    if not mapped:
        raise InputError(
            "scan", checkpoint.folder, "holds no weights", "download it again"
        )
    ordered = sorted(mapped.values(), key=lambda tensor: gguf_order(tensor.name))
    return tuple(ordered), tuple(sorted(dropped))


def gguf_order(name: str) -> tuple[int, int, str]:
    """A sort key: embedding first, then layers numerically, then the rest."""
    layer = layer_idx(name)
    if layer is not None:
        return (1, layer, name)
    return (0 if name.startswith("token_embd") else 2, 0, name)

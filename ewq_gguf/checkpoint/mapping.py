"""The checkpoint tensors, or parts of them, that feed each GGUF tensor.

Two ways lead here. For the families in `tensor_names.ARCHITECTURES` the names alone say
it. For every other one the converter is asked (`llamacpp/layout.py`), and its answer is
checked against the names where both are known. A GGUF source's tensors feed themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.fp8 import BlockSize
from ewq_gguf.checkpoint.header import TensorHeader
from ewq_gguf.checkpoint.leftovers import no_place
from ewq_gguf.checkpoint.other_tensors import is_buffer
from ewq_gguf.checkpoint.shards import ShardFile
from ewq_gguf.errors import InputError
from ewq_gguf.records import Layout, LayoutTensor
from ewq_gguf.tensor_names import ARCHITECTURES, gguf_name, layer_idx

#: What the scanner reads; other dtypes (masks, token tables) are not weights.
WEIGHT_DTYPES = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")

#: Families that keep their experts as (expert, input, output).
_TRANSPOSED_EXPERTS = frozenset({"GptOssForCausalLM"})

Box = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Scales:
    """The scales of an FP8 weight.

    Attributes:
        shard: the file they are in.
        tensor: their header.
        block_size: rows and columns that share one; None for one scale for all or one
            per row.
    """

    shard: ShardFile
    tensor: TensorHeader
    block_size: BlockSize | None = None


@dataclass(frozen=True)
class Region:
    """A checkpoint tensor, or a box of it.

    Attributes:
        shard: the file it is in.
        tensor: its header.
        box: (start, stop, step) per dimension; None for all of it.
        scales: the FP8 weight's, or None.
    """

    shard: ShardFile
    tensor: TensorHeader
    box: Box | None = None
    scales: Scales | None = None

    @property
    def headers(self) -> tuple[TensorHeader, ...]:
        """The headers of the tensor and of its scales, if it has some."""
        return (self.tensor, *([self.scales.tensor] if self.scales else []))

    @property
    def n_weights(self) -> int:
        """How many weights of the tensor are taken."""
        if self.box is None:
            return self.tensor.n_weights
        return prod(len(range(*part)) for part in self.box)

    @property
    def columns(self) -> int:
        """Weights of a row, as the checkpoint has them; 1 of a single number."""
        if self.box is not None:
            return len(range(*self.box[-1]))
        return self.tensor.shape[-1] if self.tensor.shape else 1


@dataclass(frozen=True)
class MappedTensor:
    """A GGUF tensor and where its weights lie.

    Attributes:
        name: in the GGUF.
        shape: in the GGUF, slowest dimension first.
        regions: The parts that it is made of; at least one, all of one dtype.
        is_transposed: whether the checkpoint has its columns where the GGUF has rows.
    """

    name: str
    shape: tuple[int, ...]
    regions: tuple[Region, ...]
    is_transposed: bool = False

    @property
    def dtype(self) -> str:
        """The dtype of its weights in the checkpoint."""
        return self.regions[0].tensor.dtype

    @property
    def n_bytes(self) -> int:
        """How many bytes its regions' tensors have in the checkpoint."""
        return sum(r.tensor.end - r.tensor.begin for r in self.regions)

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The checkpoint's tensors that feed it."""
        return tuple(region.tensor.name for region in self.regions)


Mapping = tuple[tuple[MappedTensor, ...], tuple[str, ...]]


def map_tensors(checkpoint: Checkpoint, layout: Layout | None = None) -> Mapping:
    """Map every tensor of a checkpoint.

    Args:
        checkpoint: opened by `open_checkpoint`.
        layout: the converter's; needed for a family that names alone do not map.

    Returns:
        The mapped tensors in the order of the GGUF, layers numerically, and the
        names of those that are no weights or that the GGUF has no use for.

    Raises:
        InputError: a tensor has no place in the GGUF.
    """
    if checkpoint.identity.is_gguf:
        mapped = _map_to_themselves(checkpoint)
    elif layout:
        mapped = _map_by_layout(checkpoint, layout)
    else:
        mapped = _map_by_name(checkpoint)
    mapped = {n: t for n, t in mapped.items() if t.dtype in WEIGHT_DTYPES}
    if not mapped:
        raise InputError(
            "scan", checkpoint.folder, "holds no weights", "download it again"
        )
    used = {
        header.name
        for tensor in mapped.values()
        for region in tensor.regions
        for header in region.headers
    }
    dropped = sorted(t.name for _, t in checkpoint.tensors if t.name not in used)
    ordered = sorted(mapped.values(), key=lambda tensor: gguf_order(tensor.name))
    return tuple(ordered), tuple(dropped)


def gguf_order(name: str) -> tuple[int, int, str]:
    """A sort key: embedding first, then layers numerically, then the rest."""
    layer = layer_idx(name)
    if layer is not None:
        return (1, layer, name)
    return (0 if name.startswith("token_embd") else 2, 0, name)


def _map_to_themselves(checkpoint: Checkpoint) -> dict[str, MappedTensor]:
    return {
        tensor.name: MappedTensor(tensor.name, tensor.shape, (Region(shard, tensor),))
        for shard, tensor in checkpoint.tensors
    }


def _map_by_name(checkpoint: Checkpoint) -> dict[str, MappedTensor]:
    identity = checkpoint.identity
    architecture = ARCHITECTURES[identity.hf_architecture]
    mapped: dict[str, MappedTensor] = {}
    for shard, tensor in checkpoint.tensors:
        if is_buffer(tensor) or tensor.n_weights == 0 or not tensor.shape:
            continue
        name = gguf_name(architecture, identity.n_layers, tensor.name)
        if name is None:
            raise no_place(checkpoint, [tensor.name])
        if name in mapped:
            raise InputError(
                "scan",
                shard.path,
                f"{mapped[name].regions[0].tensor.name} and {tensor.name} both feed "
                f"{name}",
                "remove one",
            )
        mapped[name] = MappedTensor(name, tensor.shape, (Region(shard, tensor),))
    return mapped


def _map_by_layout(checkpoint: Checkpoint, layout: Layout) -> dict[str, MappedTensor]:
    files = {tensor.name: (shard, tensor) for shard, tensor in checkpoint.tensors}
    scale_names = set(checkpoint.fp8.scales.values()) if checkpoint.fp8 else set()
    mapped = {}
    for tensor in layout.tensors:
        names = {source.hf_name for source in tensor.sources}
        regions = tuple(
            Region(
                *files[source.hf_name],
                source.box,
                _scales(checkpoint, files, source.hf_name, names),
            )
            for source in tensor.sources
            if source.hf_name not in scale_names
        )
        if not regions:
            continue
        dtypes = {region.tensor.dtype for region in regions}
        if len(dtypes) > 1:
            raise InputError(
                "scan",
                checkpoint.folder,
                f"{tensor.name} is made of {' and '.join(sorted(dtypes))} tensors",
                "convert the checkpoint to one dtype",
            )
        mapped[tensor.name] = MappedTensor(
            tensor.name,
            tensor.shape,
            regions,
            is_transposed=_is_transposed(checkpoint, tensor, regions),
        )
    return mapped


def _is_transposed(
    checkpoint: Checkpoint, tensor: LayoutTensor, regions: tuple[Region, ...]
) -> bool:
    """Whether the converter turns a matrix: by its shape, or where only names tell."""
    n_columns = regions[0].columns
    if tensor.shape[-1] != n_columns:
        return True
    is_stack = checkpoint.identity.hf_architecture in _TRANSPOSED_EXPERTS
    return is_stack and tensor.name.endswith("_exps.weight")


def _scales(
    checkpoint: Checkpoint,
    files: dict[str, tuple[ShardFile, TensorHeader]],
    name: str,
    sources: set[str],
) -> Scales | None:
    """A weight's scales, which the converter has to combine with it too."""
    fp8 = checkpoint.fp8
    if fp8 is None or name not in fp8.scales:
        return None
    scale = fp8.scales[name]
    if scale not in sources:
        raise InputError(
            "scan",
            files[name][0].path,
            f"llama.cpp's converter does not apply {scale} to {name}",
            "use the BF16 checkpoint it was made from",
        )
    return Scales(*files[scale], fp8.block_size)

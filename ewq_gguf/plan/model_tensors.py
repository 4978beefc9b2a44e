"""A model's tensors as they would stand in a GGUF file, before a plan is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

from ewq_gguf import ggml_types
from ewq_gguf.errors import InputError
from ewq_gguf.ggml_types import n_dims
from ewq_gguf.plan.importance import Importance
from ewq_gguf.plan.lattice import Lattices
from ewq_gguf.records import Layout, LayoutTensor, ModelIdentity, Scan, Source
from ewq_gguf.tensor_names import is_quantizable

#: Largest magnitude an F16 holds.
_F16_MAX = 65504.0


@dataclass(frozen=True)
class ModelTensors:
    """The tensors that a plan gives types to.

    Attributes:
        identity: The checkpoint.
        tensors: All tensors of the file, in the types of the base GGUF.
        raw_type: The ggml type that `raw` stands for.
        weights_sha256: Hash of the weights; None where none was read.
        layout: The converter's layout; without it the header's bytes are not known.
        importance: The importance matrix that the file is made with, or None.
        lattices: By tensor name, the types that hold it exactly, small to large; empty
            where nothing is quantised already, or it is not to be kept.
    """

    identity: ModelIdentity
    tensors: tuple[LayoutTensor, ...]
    raw_type: str
    weights_sha256: str | None
    layout: Layout | None
    importance: Importance | None = None
    lattices: Lattices = field(default_factory=dict)

    @classmethod
    def of_scan(cls, scan: Scan, layout: Layout | None, raw_type: str) -> ModelTensors:
        """The tensors of a scanned checkpoint; without a layout those of the scan.

        Raises:
            InputError: it is a part of a scan.
        """
        check_whole(scan)
        return cls(
            identity=scan.model,
            tensors=layout.tensors
            if layout
            else tuple(
                layout_tensor(t.name, t.shape, t.dtype, t.hf_names)
                for t in scan.tensors
            ),
            raw_type=_raw_type(scan) if raw_type == "auto" else raw_type,
            weights_sha256=scan.weights_sha256,
            layout=layout,
        )

    @classmethod
    def of_tensors(
        cls,
        identity: ModelIdentity,
        tensors: Iterable[LayoutTensor],
        layout: Layout | None,
        raw_type: str,
    ) -> ModelTensors:
        """The tensors of a checkpoint whose weights were not read.

        32-bit weights may be larger than an F16 holds, so raw is then BF16.
        """
        tensors = tuple(tensors)
        weights: Counter[str] = Counter()
        for tensor in tensors:
            if is_quantizable(tensor.name, n_dims(tensor.shape)):
                weights[tensor.ggml_type] += prod(tensor.shape)
        base = weights.most_common(1)[0][0] if weights else "F16"
        raw = "BF16" if base == "F32" else base
        return cls(
            identity=identity,
            tensors=tensors,
            raw_type=raw if raw_type == "auto" else raw_type,
            weights_sha256=None,
            layout=layout,
        )

    def plain(self, name: str) -> str:
        """A type as a policy spells it, with `raw` replaced by the ggml type."""
        return self.raw_type if name == "raw" else name


def _raw_type(scan: Scan) -> str:
    """The 16-bit type of the source.

    For 32-bit weights F16 where they fit it, which is the converter's choice too.
    """
    weights: Counter[str] = Counter()
    for tensor in scan.tensors:
        weights[ggml_types.type_of_dtype(tensor.dtype)] += tensor.n_weights
    base = weights.most_common(1)[0][0]
    if base in ("F16", "BF16"):
        return base
    largest = max(max(-tensor.min, tensor.max) for tensor in scan.tensors)
    return "F16" if largest <= _F16_MAX else "BF16"


def check_whole(scan: Scan) -> None:
    """Refuse a part of a scan, and one of nothing.

    Raises:
        InputError: it is one.
    """
    if scan.part is not None:
        raise InputError(
            "plan",
            scan.model.name,
            f"the scan is part {scan.part} only",
            "join the parts first: `ewq scan merge PART...`",
        )
    if not scan.tensors:
        raise InputError(
            "plan", scan.model.name, "the scan is of no tensor", "scan again"
        )


def layout_tensor(
    name: str, shape: tuple[int, ...], dtype: str, hf_names: Iterable[str] = ()
) -> LayoutTensor:
    """The tensor that the converter would write for a dense model."""
    quantizable = is_quantizable(name, n_dims(shape))
    return LayoutTensor(
        name=name,
        shape=shape,
        ggml_type=ggml_types.type_of_dtype(dtype) if quantizable else "F32",
        sources=tuple(Source(hf_name=hf_name) for hf_name in hf_names),
    )

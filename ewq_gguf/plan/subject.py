"""What a plan is about: a checkpoint's tensors as they would stand in a file."""

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
class Subject:
    """What a plan is about.

    Attributes:
        model: which checkpoint.
        tensors: of the file, in the base types.
        raw_type: what `raw` means.
        weights_sha256: which weights, or None where none was read.
        layout: the converter's, or None: then the header's bytes are not known.
        importance: the matrix the file is made with, or None.
        lattices: types that hold a tensor exactly, small to large, by its name; empty
            where nothing is quantised already, or it is not to be kept.
    """

    model: ModelIdentity
    tensors: tuple[LayoutTensor, ...]
    raw_type: str
    weights_sha256: str | None
    layout: Layout | None
    importance: Importance | None = None
    lattices: Lattices = field(default_factory=dict)

    @classmethod
    def of_scan(cls, scan: Scan, layout: Layout | None, raw_type: str) -> Subject:
        """Of a scanned checkpoint; without a layout the file's tensors are the scan's.

        Raises:
            InputError: it is a part of a scan.
        """
        check_whole(scan)
        found = (
            layout_tensor(t.name, t.shape, t.dtype, t.hf_names) for t in scan.tensors
        )
        return cls(
            model=scan.model,
            tensors=layout.tensors if layout else tuple(found),
            raw_type=_raw_type(scan) if raw_type == "auto" else raw_type,
            weights_sha256=scan.weights_sha256,
            layout=layout,
        )

    @classmethod
    def of_tensors(
        cls,
        model: ModelIdentity,
        tensors: Iterable[LayoutTensor],
        layout: Layout | None,
        raw_type: str,
    ) -> Subject:
        """Of a checkpoint whose weights were not read.

        32-bit weights may be larger than an F16 holds, so raw is then BF16.
        """
        known = tuple(tensors)
        weights: Counter[str] = Counter()
        for tensor in known:
            if is_quantizable(tensor.name, n_dims(tensor.shape)):
                weights[tensor.ggml_type] += prod(tensor.shape)
        base = weights.most_common(1)[0][0] if weights else "F16"
        raw = "BF16" if base == "F32" else base
        return cls(
            model=model,
            tensors=known,
            raw_type=raw if raw_type == "auto" else raw_type,
            weights_sha256=None,
            layout=layout,
        )

    def plain(self, name: str) -> str:
        """A type of a policy, `raw` by its own name."""
        return self.raw_type if name == "raw" else name


def _raw_type(scan: Scan) -> str:
    """The 16-bit type of the source.

    For 32-bit weights F16 where they fit it, which is the converter's choice too.
    """
    weights: Counter[str] = Counter()
    for tensor in scan.tensors:
        weights[ggml_types.base_type(tensor.dtype)] += tensor.n_weights
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
    """What the converter writes for a dense model, where it could not be asked."""
    quantizable = is_quantizable(name, n_dims(shape))
    return LayoutTensor(
        name=name,
        shape=shape,
        ggml_type=ggml_types.base_type(dtype) if quantizable else "F32",
        sources=tuple(Source(hf_name=hf_name) for hf_name in hf_names),
    )

"""A plan for bitsandbytes: which of a checkpoint's matrices become 8-bit, which 4-bit.

bitsandbytes has one layer of each width and no fallback: the type that a plan asks for
decides, by its bits, and not the one that llama-quantize writes where rows are odd.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.checkpoint.mapping import MappedTensor
from ewq_gguf.errors import InputError, ToolError
from ewq_gguf.ggml_types import FLOAT_TYPES, bits_per_weight
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.records import Plan

#: What a matrix becomes: Linear8bitLt or Linear4bit.
Precision = Literal["int8", "nf4"]

#: Types of fewer bits per weight become nf4: Q6_K has 6.6, Q8_0 8.5.
_MIN_INT8_BITS = 7.0

#: The weights of a folder that `--save` wrote, under a name that transformers, which
#: knows no mix of both layers, does not take for its own.
SAVED_NAME = "bitsandbytes.safetensors"

_PACKAGES = ("transformers", "torch", "bitsandbytes")
_REMEDY = "pip install 'ewq-gguf[bnb]'"


@dataclass(frozen=True)
class AppliedPlan:
    """A plan as bitsandbytes applies it to a checkpoint.

    Attributes:
        name: name of the quantised model, in results.
        sha256: hash of the plan.
        precisions: by the names of the tensors that are quantised.
    """

    name: str
    sha256: str
    precisions: Mapping[str, Precision]


def precision_of(ggml_type: str) -> Precision | None:
    """A ggml type's precision in bitsandbytes; None for weights left as they are."""
    if ggml_type in FLOAT_TYPES:
        return None
    return "int8" if bits_per_weight(ggml_type) >= _MIN_INT8_BITS else "nf4"


def precisions_of(plan: Plan, tensors: Iterable[MappedTensor]) -> dict[str, Precision]:
    """Precisions of a checkpoint's tensors by a plan, by their names there.

    Args:
        plan: a plan for the checkpoint.
        tensors: names in the GGUF, and the tensors that each is made of.

    Returns:
        The tensors that are quantised.

    Raises:
        InputError: the plan names a tensor that comes from no checkpoint tensor, or
            gives parts of one tensor different precisions.
    """
    sources = {tensor.name: tensor.hf_names for tensor in tensors}
    found: dict[str, Precision | None] = {}
    for tensor in plan.tensors:
        precision = precision_of(tensor.ggml_type) if tensor.is_quantizable else None
        if precision is not None and tensor.name not in sources:
            problem = "is made of no tensor of the checkpoint"
            raise InputError(STAGE, tensor.name, problem, "plan this checkpoint")
        for name in sources.get(tensor.name, ()):
            if found.setdefault(name, precision) != precision:
                raise InputError(
                    STAGE,
                    name,
                    f"becomes several tensors, {tensor.name} is one, and the plan "
                    "gives them different precisions",
                    "give them one with --granularity layer",
                )
    return {
        name: precision for name, precision in found.items() if precision is not None
    }


def library_versions(*, needs_bitsandbytes: bool) -> str:
    """The versions that a transformers model's numbers depend on.

    Raises:
        ToolError: one is not installed.
    """
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError as error:
            if name != "bitsandbytes" or needs_bitsandbytes:
                raise ToolError(STAGE, name, "is not installed", _REMEDY) from error
    return ", ".join(versions)


def engine_key(path: Path) -> str:
    """Name of the engine for the model that a path names, like `Engine.key`."""
    if path.is_dir():
        return library_versions(needs_bitsandbytes=False)
    return LLAMA_CPP_COMMIT

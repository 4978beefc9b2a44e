"""An importance matrix, as far as a plan depends on it: which tensors it weighs.

llama-quantize throws in the middle of a run where a very low-bit type meets a tensor
without an entry, aborts where that tensor is the embedding or the head, and throws
wherever an entry has another length than the tensor's rows (src/llama-quant.cpp).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ewq_gguf import ggml_types
from ewq_gguf.errors import InputError
from ewq_gguf.records import Imatrix, PlanTensor

_KEY = "quantize.imatrix."
#: The matrix's name in every work folder, so that no path can enter the file.
IMATRIX_FILE = "imatrix.gguf"


@dataclass(frozen=True)
class Importance:
    """A matrix that was read.

    Attributes:
        record: what a plan says about it.
        n_values: of each tensor's entry, by the tensor's name.
        kv_bytes: what llama-quantize's keys about it take in the file.
    """

    record: Imatrix
    n_values: Mapping[str, int]
    kv_bytes: int


def file_keys(imatrix: Imatrix) -> dict[str, str | int]:
    """The keys that llama-quantize writes about a matrix (tools/quantize)."""
    keys: dict[str, str | int] = {f"{_KEY}file": IMATRIX_FILE}
    if imatrix.dataset is not None:
        keys[f"{_KEY}dataset"] = imatrix.dataset
    keys[f"{_KEY}entries_count"] = imatrix.n_entries
    if imatrix.n_chunks:
        keys[f"{_KEY}chunks_count"] = imatrix.n_chunks
    return keys


def needs_entry(ggml_type: str, n_columns: int) -> bool:
    """Whether a type, as written on rows of this length, needs a matrix."""
    return ggml_types.written_type(ggml_type, n_columns) in ggml_types.IMATRIX_TYPES


def check_entries(tensors: Iterable[PlanTensor], importance: Importance) -> None:
    """Refuse a matrix of another model, or one that lacks an entry that is needed.

    Raises:
        InputError: naming the tensor and what to do.
    """
    quantizable = [tensor for tensor in tensors if tensor.is_quantizable]
    file, n_values = importance.record.file_name, importance.n_values
    if not any(tensor.name in n_values for tensor in quantizable):
        raise InputError(
            "plan",
            file,
            "has no entry for any tensor of the model",
            "give the importance matrix of this model",
        )
    for tensor in quantizable:
        found, needed = n_values.get(tensor.name), entry_length(tensor.shape)
        if found is not None and found != needed:
            raise InputError(
                "plan",
                file,
                f"has {found} values for {tensor.name}, which needs {needed}",
                "give the importance matrix of this model",
            )
        if found is None and tensor.written_type in ggml_types.IMATRIX_TYPES:
            raise InputError(
                "plan",
                tensor.name,
                f"cannot be {tensor.written_type}: {file} has no entry for it",
                _remedy(tensor),
            )


def entry_length(shape: Sequence[int]) -> int:
    """Values of an entry: one for each column, of each expert; slowest first."""
    return shape[-1] * (shape[-3] if len(shape) > 2 else 1)


def _remedy(tensor: PlanTensor) -> str:
    if tensor.name == "output.weight":
        return "collect it with llama-imatrix --process-output, or give --output-type"
    if tensor.layer_idx is None:
        return "give --embedding-type; llama-imatrix never collects one for it"
    return "collect it from more text, or choose a type that needs none"

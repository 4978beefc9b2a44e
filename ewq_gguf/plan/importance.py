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
from ewq_gguf.ggml_types import n_dims
from ewq_gguf.records import Imatrix, LayoutTensor, PlanTensor
from ewq_gguf.tensor_names import is_quantizable, layer_idx

_KEY = "quantize.imatrix."
#: Of names in a message.
_SHOWN = 4
#: The matrix's name in every work folder, so that no path can enter the file.
IMATRIX_FILE = "imatrix.gguf"


@dataclass(frozen=True)
class Importance:
    """A matrix that was read.

    Attributes:
        record: The plan's part about it.
        n_values: Values of each tensor's entry, by the tensor's name.
        kv_bytes: Bytes of llama-quantize's keys about it in the file.
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


def check_model(
    tensors: Iterable[LayoutTensor | PlanTensor], importance: Importance
) -> str | None:
    """Refuse a matrix of another model; say where one of this model has no entry.

    A matrix is another model's if a length is not that of the tensor's rows, if it has
    entries for layers that the model does not have, if most of its entries are for
    tensors that the model does not have, or if most of the layers' have none.

    Args:
        tensors: All tensors of the file.
        importance: the matrix.

    Returns:
        A note on the tensors that are quantised without an entry, or None.

    Raises:
        InputError: it is another model's.
    """
    file, n_values = importance.record.file_name, importance.n_values
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    quantized = [n for n, s in shapes.items() if is_quantizable(n, n_dims(s))]
    for name in quantized:
        n_given, needed = n_values.get(name), entry_length(shapes[name])
        if n_given is not None and n_given != needed:
            raise _another(
                file, f"has {n_given} values for {name}, which needs {needed}"
            )
    last = max((layer_idx(name) or 0 for name in shapes), default=0)
    foreign = [name for name in n_values if name not in shapes]
    beyond = [name for name in foreign if (layer_idx(name) or 0) > last]
    if beyond or 2 * len(foreign) > len(n_values):
        names = _few(beyond or foreign)
        problem = f"has entries for tensors that the model does not have: {names}"
        raise _another(file, problem)
    # llama-imatrix collects one for the head where it is told to, for the embedding
    # never.
    in_layers = [name for name in quantized if layer_idx(name) is not None]
    missing = [name for name in in_layers if name not in n_values]
    if not missing:
        return None
    problem = f"has no entry for {len(missing)} of the layers' {len(in_layers)} tensors"
    if 2 * len(missing) > len(in_layers):
        raise _another(file, f"{problem}: {_few(missing)}")
    return f"{file} {problem}, which are quantised without: {_few(missing)}"


def _another(file: str, problem: str) -> InputError:
    remedy = "give the importance matrix of this model"
    return InputError("imatrix", file, problem, remedy)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def check_entries(tensors: Sequence[PlanTensor], importance: Importance) -> str | None:
    """Refuse a matrix of another model, or one that lacks an entry that is needed.

    Returns:
        As of `check_model`.

    Raises:
        InputError: naming the tensor and what to do.
    """
    note = check_model(tensors, importance)
    for tensor in tensors:
        if (
            tensor.is_quantizable
            and tensor.name not in importance.n_values
            and tensor.written_type in ggml_types.IMATRIX_TYPES
        ):
            file = importance.record.file_name
            raise InputError(
                "plan",
                tensor.name,
                f"cannot be {tensor.written_type}: {file} has no entry for it",
                _remedy(tensor),
            )
    return note


def entry_length(shape: Sequence[int]) -> int:
    """Values of an entry: one for each column, of each expert; slowest first."""
    return shape[-1] * (shape[-3] if len(shape) > 2 else 1)


def _remedy(tensor: PlanTensor) -> str:
    if tensor.name == "output.weight":
        return "collect it with llama-imatrix --process-output, or give --output-type"
    if tensor.layer_idx is None:
        return "give --embedding-type; llama-imatrix never collects one for it"
    return "collect it from more text, or choose a type that needs none"

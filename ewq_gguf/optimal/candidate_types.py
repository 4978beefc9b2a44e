"""The types that each tensor may have: by its shape, the bounds, and a file's size."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

from ewq_gguf.ggml_types import (
    QUANTISED_TYPES,
    bits_per_weight,
    n_dims,
    tensor_bytes,
    written_type,
)
from ewq_gguf.optimal.settings import DEFAULT, SearchSettings
from ewq_gguf.plan.assemble import header_of
from ewq_gguf.plan.importance import needs_entry
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.plan.sizes import padded
from ewq_gguf.records import LayoutTensor, OptimalPolicy
from ewq_gguf.tensor_names import is_quantizable, role

CandidateTypes = dict[str, tuple[str, ...]]


def candidate_types_within(
    subject: ModelTensors,
    policy: OptimalPolicy,
    limit_bytes: int,
    settings: SearchSettings = DEFAULT,
) -> CandidateTypes:
    """The types that each tensor may have in a file of a size: none is far too small.

    Args:
        subject: The model's tensors and importance matrix.
        policy: The types in question, and bounds of roles.
        limit_bytes: Bytes of the whole file. Where types that would be left out are
            needed to keep it, none is left out.
        settings: Constants of the search.
    """
    min_bits = settings.min_bits_share * _mean_bits(subject, limit_bytes)
    candidates = candidate_types(subject, policy, min_bits)
    if min_file_bytes(subject, candidates) > limit_bytes:
        return candidate_types(subject, policy)
    return candidates


def floor_unmeasured(
    subject: ModelTensors,
    candidates: Mapping[str, tuple[str, ...]],
    costs: Mapping[str, Mapping[str, float]],
    limit_bytes: int,
) -> CandidateTypes:
    """The same types, but at least the file's mean bits for tensors without any cost.

    Nothing computes with such a tensor when a text is read; a head that predicts
    further tokens is one. It is in the file for another use.

    Args:
        subject: The model's tensors.
        candidates: Types by tensor.
        costs: Nats by tensor and type.
        limit_bytes: Bytes of the whole file; where they would be exceeded, the types
            stay as they are.
    """
    mean_bits = _mean_bits(subject, limit_bytes)
    floored = dict(candidates)
    for name, types in candidates.items():
        if not any(costs[name][ggml_type] for ggml_type in types):
            high = tuple(t for t in types if bits_per_weight(t) >= mean_bits)
            floored[name] = high or types[:1]
    is_small_enough = min_file_bytes(subject, floored) <= limit_bytes
    return floored if is_small_enough else dict(candidates)


def candidate_types(
    subject: ModelTensors,
    policy: OptimalPolicy,
    min_bits: float = 0.0,
    *,
    has_entries: bool = False,
) -> CandidateTypes:
    """The types that each quantisable tensor may have, from most to fewest bits.

    Args:
        subject: The model's tensors and importance matrix; its `raw_type` is always in
            question.
        policy: The types in question, and bounds of roles.
        min_bits: Bits per weight that a type has at least.
        has_entries: The importance matrix is still to come, with an entry for each
            tensor.
    """
    importance = subject.importance
    entries = set(importance.n_values) if importance else set()
    if has_entries:
        entries = {tensor.name for tensor in subject.tensors}
    return {
        tensor.name: _types_of(tensor, subject.raw_type, policy, min_bits, entries)
        for tensor in quantizable(subject)
    }


def keeps_bounds(
    policy: OptimalPolicy, types: Mapping[str, str], raw_type: str
) -> bool:
    """Whether a file that was not allocated here has only types that the user allows.

    Args:
        policy: The types in question, and bounds of roles. A type that is not in
            question by default was not excluded by the user.
        types: Type of each quantisable tensor.
        raw_type: The type that `raw` stands for.
    """
    is_narrow = bool(set(QUANTISED_TYPES) - set(policy.types))
    return all(
        (not is_narrow or ggml_type == raw_type or ggml_type in policy.types)
        and _is_allowed(policy, role(name), ggml_type, raw_type)
        for name, ggml_type in types.items()
    )


def quantizable(subject: ModelTensors) -> list[LayoutTensor]:
    """The tensors that llama-quantize quantises."""
    return [t for t in subject.tensors if is_quantizable(t.name, n_dims(t.shape))]


def fixed_bytes(subject: ModelTensors) -> int:
    """Bytes of the file that no choice changes: the header, norms, biases."""
    return (header_of(subject) or 0) + sum(
        padded(tensor_bytes(tensor.ggml_type, tensor.shape))
        for tensor in subject.tensors
        if not is_quantizable(tensor.name, n_dims(tensor.shape))
    )


def min_file_bytes(
    subject: ModelTensors, candidates: Mapping[str, Collection[str]]
) -> int:
    """Bytes of the smallest file that the types allow, by tensor."""
    return fixed_bytes(subject) + sum(
        min(padded(tensor_bytes(t, tensor.shape)) for t in candidates[tensor.name])
        for tensor in quantizable(subject)
    )


def _mean_bits(subject: ModelTensors, limit_bytes: int) -> float:
    """Bits that a file's bytes leave for each weight that is quantised."""
    n_weights = sum(prod(tensor.shape) for tensor in quantizable(subject))
    return 8 * max(limit_bytes - fixed_bytes(subject), 0) / max(n_weights, 1)


def _types_of(
    tensor: LayoutTensor,
    raw_type: str,
    policy: OptimalPolicy,
    min_bits: float,
    entries: Collection[str],
) -> tuple[str, ...]:
    n_columns = tensor.shape[-1]
    fitting = [
        ggml_type
        for ggml_type in (raw_type if name == "raw" else name for name in policy.types)
        if written_type(ggml_type, n_columns) == ggml_type
        and not (needs_entry(ggml_type, n_columns) and tensor.name not in entries)
    ]
    allowed = [
        ggml_type
        for ggml_type in dict.fromkeys((raw_type, *fitting))
        if _is_allowed(policy, role(tensor.name), ggml_type, raw_type)
    ]
    allowed.sort(key=bits_per_weight, reverse=True)
    large = [t for t in allowed if bits_per_weight(t) >= min_bits]
    # Bounds that the user set hold, even where all that they allow is too small.
    return tuple(large or allowed[:1]) or (raw_type,)


def _is_allowed(
    policy: OptimalPolicy, role_name: str, ggml_type: str, raw_type: str
) -> bool:
    floor, ceiling = (
        raw_type if bound == "raw" else bound
        for bounds in (policy.floors, policy.ceilings)
        for bound in [bounds.get(role_name, bounds.get("*"))]
    )
    return (floor is None or bits_per_weight(ggml_type) >= bits_per_weight(floor)) and (
        ceiling is None or bits_per_weight(ggml_type) <= bits_per_weight(ceiling)
    )

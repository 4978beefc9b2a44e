"""Weights that are quantised already keep their values in every policy.

A tensor is exact in a type whose lattice it is on: nothing is lost by it, so such a
type replaces the one that a policy chose, where it takes no more bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from ewq_gguf.ggml_types import tensor_bytes, written_type
from ewq_gguf.records import LayoutTensor, PlanTensor, Scan

#: By tensor, the types that hold it exactly, small to large.
Lattices = Mapping[str, tuple[str, ...]]


def lattices_of(scan: Scan) -> dict[str, tuple[str, ...]]:
    """The lattices that a scan has found."""
    return {tensor.name: tensor.lattice for tensor in scan.tensors if tensor.lattice}


def exact_types(
    tensors: Iterable[LayoutTensor],
    types: Mapping[str, str],
    raw_type: str,
    lattices: Lattices,
) -> dict[str, str]:
    """The types of a plan where an exact one takes no more bytes than what was chosen.

    Args:
        tensors: tensors of the file.
        types: chosen types by name; raw without one.
        raw_type: ggml type that `raw` stands for.
        lattices: types that hold each tensor exactly.
    """
    result = dict(types)
    for tensor in tensors:
        exact = lattices.get(tensor.name, ())
        chosen = written_type(types.get(tensor.name, raw_type), tensor.shape[-1])
        if exact and tensor_bytes(exact[0], tensor.shape) <= tensor_bytes(
            chosen, tensor.shape
        ):
            result[tensor.name] = exact[0]
    return result


def allowed(
    lattices: Lattices, menus: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """The exact types that are in each tensor's menu."""
    exact = {
        name: tuple(
            ggml_type for ggml_type in types if ggml_type in menus.get(name, ())
        )
        for name, types in lattices.items()
    }
    return {name: types for name, types in exact.items() if types}


def without_loss(
    costs: Mapping[str, Mapping[str, float]], lattices: Lattices
) -> dict[str, dict[str, float]]:
    """Costs by tensor and type, where a type that holds the tensor exactly costs 0."""
    return {
        name: {
            ggml_type: 0.0 if ggml_type in lattices.get(name, ()) else cost
            for ggml_type, cost in by_type.items()
        }
        for name, by_type in costs.items()
    }


def lattice_line(tensors: Iterable[PlanTensor], lattices: Lattices) -> str | None:
    """A line about a model that is quantised already; None for other models."""
    matrices = [tensor for tensor in tensors if tensor.is_quantizable]
    on = [tensor for tensor in matrices if tensor.name in lattices]
    if not on:
        return None
    counts = Counter(lattices[tensor.name][0] for tensor in on)
    values = " and ".join(f"{n} {name}" for name, n in sorted(counts.items()))
    exact = sum(tensor.is_exact for tensor in on)
    they = "they go" if exact == len(on) else f"{exact} of them go"
    return (
        f"quantised already: {len(on)} of {len(matrices)} matrices hold the values of "
        f"a ggml type ({values}); {they} over exactly"
    )

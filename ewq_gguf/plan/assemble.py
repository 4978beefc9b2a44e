"""From each tensor's type to the plan: fallbacks, base type, and the file's bytes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import prod

from ewq_gguf import ggml_types
from ewq_gguf._version import __version__
from ewq_gguf.ggml_types import n_dims
from ewq_gguf.plan.importance import check_entries
from ewq_gguf.plan.lattice import exact_types
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.plan.sizes import header_bytes, padded, string_kv_bytes
from ewq_gguf.records import (
    Budget,
    LayoutTensor,
    ModelIdentity,
    Plan,
    PlanLayer,
    PlanTensor,
    Policy,
    Totals,
)
from ewq_gguf.records.plan import Thresholds
from ewq_gguf.tensor_names import is_quantizable, layer_idx, role


def assemble(
    model: ModelTensors,
    policy: Policy,
    types: Mapping[str, str],
    *,
    layers: Sequence[PlanLayer] = (),
    thresholds: Mapping[str, Thresholds] | None = None,
    entropies: Mapping[str, float | None] | None = None,
    budget: Budget | None = None,
) -> Plan:
    """The plan that asks for these types.

    Args:
        model: Tensors of the model that is planned.
        policy: policy that led to the types.
        types: type by tensor name; a quantisable tensor that is not named is raw.
        layers: the decisions; without them each layer's type is its tensors', where
            they agree.
        thresholds: thresholds of the rule.
        entropies: entropies by tensor name, where tensors were decided one by one.
        budget: the limit and how it was reached.

    Raises:
        InputError: the importance matrix is another model's, or lacks an entry.
    """
    entropies = entropies or {}
    types = exact_types(model.tensors, types, model.raw_type, model.lattices)
    tensors = tuple(
        plan_tensor(
            tensor,
            name := types.get(tensor.name, model.raw_type),
            entropies.get(tensor.name),
            is_exact=name in model.lattices.get(tensor.name, ()),
        )
        for tensor in model.tensors
    )
    importance = model.importance
    if importance is not None:
        check_entries(tensors, importance)
    return Plan(
        ewq_version=__version__,
        model=model.identity,
        weights_sha256=model.weights_sha256,
        policy=policy,
        raw_type=model.raw_type,
        ftype=ftype_of(tensors),
        thresholds=dict(thresholds or {}),
        budget=budget,
        imatrix=importance.record if importance else None,
        tensors=tensors,
        layers=_layers(layers, tensors),
        totals=totals_of(tensors, header_of(model)),
    )


def _layers(
    decided: Sequence[PlanLayer], tensors: Iterable[PlanTensor]
) -> tuple[PlanLayer, ...]:
    """The decisions, with the types that the tensors have after all."""
    undecided = layers_of(tensors)
    types = {layer.layer_idx: layer.ggml_type for layer in undecided}
    return (
        tuple(
            layer.model_copy(
                update={"ggml_type": types.get(layer.layer_idx, layer.ggml_type)}
            )
            for layer in decided
        )
        or undecided
    )


def layers_of(tensors: Iterable[PlanTensor]) -> tuple[PlanLayer, ...]:
    """Layers without decisions: each one's type, where its tensors agree on one."""
    types: dict[int, set[str]] = defaultdict(set)
    for tensor in tensors:
        if tensor.layer_idx is not None and tensor.is_quantizable:
            types[tensor.layer_idx].add(tensor.ggml_type)
    return tuple(
        PlanLayer(
            layer_idx=idx,
            entropy=None,
            decision=None,
            ggml_type=next(iter(names)) if len(names) == 1 else None,
        )
        for idx, names in sorted(types.items())
    )


def header_of(model: ModelTensors) -> int | None:
    """Bytes before the data of any file of this model; None without a layout."""
    layout = model.layout
    if layout is None:
        return None
    pairs = provenance(model.identity, __version__)
    kv_bytes = layout.kv_bytes + layout.added_kv_bytes + string_kv_bytes(pairs)
    if model.importance is not None:
        kv_bytes += model.importance.kv_bytes
    return header_bytes(kv_bytes, ((t.name, t.shape) for t in layout.tensors))


def provenance(
    model: ModelIdentity, ewq_version: str, plan_sha256: str = "0" * 64
) -> dict[str, str]:
    """The key-value pairs a file carries about its plan.

    Their length does not depend on the hash, so that a plan can predict its own file.
    """
    pairs = {"ewq.version": ewq_version, "ewq.plan.sha256": plan_sha256}
    if model.revision is not None:
        pairs["ewq.source.revision"] = model.revision
    return pairs


def plan_tensor(
    tensor: LayoutTensor,
    ggml_type: str,
    entropy: float | None = None,
    *,
    is_exact: bool = False,
) -> PlanTensor:
    """A tensor of the file, given the type asked for it."""
    quantizable = is_quantizable(tensor.name, n_dims(tensor.shape))
    ggml_type = ggml_type if quantizable else tensor.ggml_type
    written = ggml_types.written_type(ggml_type, tensor.shape[-1])
    return PlanTensor(
        name=tensor.name,
        role=role(tensor.name),
        layer_idx=layer_idx(tensor.name),
        shape=tensor.shape,
        base_type=tensor.ggml_type,
        is_quantizable=quantizable,
        ggml_type=ggml_type,
        written_type=written,
        size_bytes=ggml_types.tensor_bytes(written, tensor.shape),
        entropy=entropy,
        is_exact=is_exact and quantizable,
    )


def ftype_of(tensors: Iterable[PlanTensor]) -> str:
    """llama-quantize's base type: the quantised type most weights are asked to have.

    A float base type ignores overrides, so it serves only where all are that type.
    """
    weights: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.is_quantizable:
            weights[tensor.ggml_type] += prod(tensor.shape)
    quantised = [t for t in weights if t not in ggml_types.FLOAT_TYPES]
    if not quantised:
        return next(iter(weights)) if len(weights) == 1 else "Q8_0"
    most = max(quantised, key=lambda name: (weights[name], name))
    return ggml_types.TYPES[most].ftype or most


def totals_of(tensors: Sequence[PlanTensor], header: int | None) -> Totals:
    """The sums of a plan, with its header's bytes where they are known."""
    data = sum(padded(tensor.size_bytes) for tensor in tensors)
    n_weights = sum(prod(tensor.shape) for tensor in tensors)
    size = data + (header or 0)
    return Totals(
        n_weights=n_weights,
        tensor_bytes=data,
        header_bytes=header,
        file_size_bytes=size,
        is_estimate=header is None,
        bpw=8 * size / n_weights,
    )

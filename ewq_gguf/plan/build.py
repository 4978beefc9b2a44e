"""From a scan and a policy to a plan with every tensor's type and the file's bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import prod

from ewq_gguf import ggml_types
from ewq_gguf._version import __version__
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.ggml_types import n_dims
from ewq_gguf.plan.ewq import decide, thresholds
from ewq_gguf.plan.sizes import header_bytes, padded, string_kv_bytes
from ewq_gguf.records import (
    EwqPolicy,
    Layout,
    LayoutTensor,
    ModelIdentity,
    Plan,
    PlanLayer,
    PlanTensor,
    Policy,
    Scan,
    Totals,
    UniformPolicy,
)
from ewq_gguf.records.plan import Thresholds
from ewq_gguf.tensor_names import is_quantizable, layer_idx, role

#: Largest magnitude an F16 holds.
_F16_MAX = 65504.0

#: Base types of llama-quantize that are not named like their main ggml type.
_FTYPES = {
    "Q3_K": "Q3_K_M",
    "Q4_K": "Q4_K_M",
    "Q5_K": "Q5_K_M",
    "MXFP4": "MXFP4_MOE",
}


def make_plan(
    scan: Scan, policy: Policy, layout: Layout | None = None, *, raw_type: str = "auto"
) -> Plan:
    """Plan every tensor of the file and predict its size.

    Args:
        scan: of the checkpoint.
        policy: with every parameter.
        layout: the converter's; without it the size is an estimate.
        raw_type: what `raw` means: `F16`, `BF16`, or `auto` for the source's own.

    Raises:
        UsageError: the policy names an unknown type or an impossible ladder.
        InputError: a type needs an importance matrix, or the scan has other measures.
    """
    check_policy(policy)
    if scan.part is not None:
        raise InputError(
            "plan",
            scan.model.name,
            f"the scan is part {scan.part} only",
            "join the parts first: `ewq scan merge PART...`",
        )
    raw = _raw_type(scan, raw_type)
    layers, limits = _decide_layers(scan, policy, raw)
    asked = _asked_types(policy, layers, raw)
    source = layout.tensors if layout else _layout_tensors(scan)
    tensors = tuple(plan_tensor(tensor, asked) for tensor in source)
    return Plan(
        ewq_version=__version__,
        model=scan.model,
        weights_sha256=scan.weights_sha256,
        policy=policy,
        raw_type=raw,
        ftype=ftype_of(tensors),
        thresholds=limits,
        tensors=tensors,
        layers=layers,
        totals=totals_of(
            tensors, _header_bytes(tensors, scan, layout) if layout else None
        ),
    )


def check_policy(policy: Policy) -> None:
    """Refuse unknown types and impossible parameters before any work.

    Raises:
        UsageError: naming the parameter.
        InputError: a type needs an importance matrix.
    """
    if isinstance(policy, UniformPolicy):
        _check_type(policy.ggml_type)
        return
    for name in (*policy.ladder, policy.embedding_type, policy.output_type):
        _check_type(name)
    if len(policy.ladder) not in (2, 3):
        raise UsageError(
            "plan",
            "--ladder",
            f"has {len(policy.ladder)} precisions",
            "name two or three, low to high, such as Q4_K,Q8_0,raw",
        )
    bits = [
        16.0 if name == "raw" else ggml_types.bits_per_weight(name)
        for name in policy.ladder
    ]
    if sorted(set(bits)) != bits:
        raise UsageError(
            "plan",
            "--ladder",
            f"{','.join(policy.ladder)} does not rise from low to high",
            "sort it, such as Q4_K,Q8_0,raw",
        )
    for flag, value, least in (
        ("--factor", policy.factor, 0),
        ("--epsilon", policy.epsilon, 0),
        ("--bins", policy.n_bins, 2),
    ):
        if not value >= least:  # NaN is not
            raise UsageError(
                "plan", flag, f"{value} is not {least} or more", "give a larger number"
            )


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


def _check_type(name: str) -> None:
    if name == "raw":
        return
    if name not in ggml_types.PLANNABLE:
        raise UsageError(
            "plan",
            name,
            "is not a ggml type",
            f"use raw or one of {', '.join(ggml_types.PLANNABLE)}",
        )
    if name in ggml_types.IMATRIX_TYPES:
        raise InputError(
            "plan",
            name,
            "needs an importance matrix, and none is given",
            "choose a type that needs none, such as Q2_K or IQ3_S",
        )


def _raw_type(scan: Scan, raw_type: str) -> str:
    """The 16-bit type of the source.

    For 32-bit weights F16 where they fit it, which is the converter's choice too.
    """
    if raw_type != "auto":
        return raw_type
    weights: Counter[str] = Counter()
    for tensor in scan.tensors:
        weights[ggml_types.base_type(tensor.dtype)] += tensor.n_weights
    base = weights.most_common(1)[0][0]
    if base in ("F16", "BF16"):
        return base
    largest = max(max(-tensor.min, tensor.max) for tensor in scan.tensors)
    return "F16" if largest <= _F16_MAX else "BF16"


def _decide_layers(
    scan: Scan, policy: Policy, raw: str
) -> tuple[tuple[PlanLayer, ...], Thresholds | None]:
    def plain(name: str) -> str:
        return raw if name == "raw" else name

    if isinstance(policy, UniformPolicy):
        return (
            tuple(
                PlanLayer(
                    layer_idx=layer.layer_idx,
                    entropy=None,
                    ggml_type=plain(policy.ggml_type),
                )
                for layer in scan.layers
            ),
            None,
        )
    _check_measures(scan, policy)
    entropies = [
        layer.softmax_entropy_nats
        if policy.measure == "softmax"
        else layer.histogram_entropy_bits
        for layer in scan.layers
    ]
    if not entropies:
        return (), None
    limits = thresholds(entropies, policy.factor)
    ladder = [plain(name) for name in policy.ladder]
    return (
        tuple(
            PlanLayer(
                layer_idx=layer.layer_idx,
                entropy=entropy,
                ggml_type=decide(entropy, limits, ladder),
            )
            for layer, entropy in zip(scan.layers, entropies, strict=True)
        ),
        limits,
    )


def _check_measures(scan: Scan, policy: EwqPolicy) -> None:
    wrong = (
        f"epsilon {scan.measures.epsilon}, the policy {policy.epsilon}"
        if policy.measure == "softmax" and policy.epsilon != scan.measures.epsilon
        else f"{scan.measures.n_bins} bins, the policy {policy.n_bins}"
        if policy.measure == "histogram" and policy.n_bins != scan.measures.n_bins
        else None
    )
    if wrong:
        raise InputError(
            "plan", "SCAN", f"was measured with {wrong}", "scan again with the same"
        )


def _asked_types(
    policy: Policy, layers: Sequence[PlanLayer], raw: str
) -> Callable[[str], str]:
    """Which type a policy asks for, by GGUF tensor name."""

    def plain(name: str) -> str:
        return raw if name == "raw" else name

    if isinstance(policy, UniformPolicy):
        return lambda name: plain(policy.ggml_type)
    by_layer: dict[int | None, str] = {
        layer.layer_idx: layer.ggml_type for layer in layers
    }
    named = {
        "token_embd.weight": plain(policy.embedding_type),
        "output.weight": plain(policy.output_type),
    }
    return lambda name: named.get(name) or by_layer.get(layer_idx(name), raw)


def _layout_tensors(scan: Scan) -> Iterable[LayoutTensor]:
    """What the converter writes for a dense model, where it could not be asked."""
    for tensor in scan.tensors:
        quantizable = is_quantizable(tensor.name, n_dims(tensor.shape))
        yield LayoutTensor(
            name=tensor.name,
            shape=tensor.shape,
            ggml_type=ggml_types.base_type(tensor.dtype) if quantizable else "F32",
        )


def plan_tensor(tensor: LayoutTensor, asked: Callable[[str], str]) -> PlanTensor:
    """A tensor of the file, given the type asked for its name."""
    quantizable = is_quantizable(tensor.name, n_dims(tensor.shape))
    ggml_type = asked(tensor.name) if quantizable else tensor.ggml_type
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
    return _FTYPES.get(most, most)


def _header_bytes(tensors: Sequence[PlanTensor], scan: Scan, layout: Layout) -> int:
    pairs = provenance(scan.model, __version__)
    kv_bytes = layout.kv_bytes + layout.added_kv_bytes + string_kv_bytes(pairs)
    return header_bytes(kv_bytes, ((t.name, t.shape) for t in tensors))


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

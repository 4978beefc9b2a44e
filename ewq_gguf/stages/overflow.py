"""No weight becomes infinite because F16 was asked for: refused before the work."""

from __future__ import annotations

from ewq_gguf.checkpoint.buffers import is_buffer
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.overflow import (
    F16_INFINITE,
    F16_MAX,
    find_overflows,
    overflow_error,
)
from ewq_gguf.errors import InputError
from ewq_gguf.llamacpp.convert import header_of
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.records import Plan, Scan

_USE_BF16 = "use BF16: --raw-type bf16"


def check_base(checkpoint: Checkpoint, toolchain: Toolchain, outtype: str) -> None:
    """Refuse an F16 base GGUF of a checkpoint with weights that F16 cannot hold.

    Its BF16 and 32-bit matrices are read once. What the converter keeps in F32 may hold
    any weight, so it is asked only when there is one.

    Raises:
        InputError: naming the first such weight.
    """
    if outtype != "F16" or checkpoint.identity.is_gguf:
        return
    matrices = {
        tensor.name
        for _, tensor in checkpoint.tensors
        if len(tensor.shape) > 1 and not is_buffer(tensor)
    }
    found = list(find_overflows(checkpoint, matrices))
    if not found:
        return
    with header_of(checkpoint, toolchain, outtype=outtype) as base:
        feeds = {
            source.hf_name: tensor.name
            for tensor in base.gguf.tensors
            if tensor.ggml_type == "F16"
            for source in base.sources[tensor.name]
        }
    for overflow in found:
        if (name := feeds.get(overflow.tensor.name)) is not None:
            remedy = "use --outtype bf16 or f32"
            raise overflow_error("convert", overflow, remedy, name)


def check_planned(plan: Plan, scanned: Scan, source: Checkpoint | Scan) -> None:
    """Refuse a plan that makes an F16 tensor of weights that F16 cannot hold.

    Args:
        plan: of the scanned model.
        scanned: the scan, which knows the largest weight of each tensor.
        source: where that weight can be looked up, if it is a checkpoint.

    Raises:
        InputError: naming the first such weight.
    """
    in_f16 = {t.name for t in plan.tensors if "F16" in (t.written_type, t.base_type)}
    for tensor in scanned.tensors:
        largest = max(-tensor.min, tensor.max)
        if tensor.name not in in_f16 or largest < F16_INFINITE:
            continue
        if isinstance(source, Checkpoint):
            for overflow in find_overflows(source, tensor.hf_names):
                raise overflow_error("plan", overflow, _USE_BF16, tensor.name)
        raise InputError(
            "plan",
            tensor.name,
            f"holds a weight of {largest:g}, F16 ends at {F16_MAX:g}: it would become "
            "infinite",
            _USE_BF16,
        )

"""The base GGUF of a model: in the cache, or under a name of the user's."""

from __future__ import annotations

from pathlib import Path

from ewq_gguf import store
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.checkpoint.other_tensors import is_buffer
from ewq_gguf.checkpoint.overflow import (
    F16_INFINITE,
    F16_MAX,
    find_overflows,
    overflow_error,
)
from ewq_gguf.errors import InputError, VerificationError
from ewq_gguf.llamacpp.convert import base_type, convert, header_of
from ewq_gguf.llamacpp.convertible import check_is_no_gguf
from ewq_gguf.records import Plan, Scan
from ewq_gguf.stages.choosing import naming_the_nearest
from ewq_gguf.stages.companions import needs_companions, plan_companions
from ewq_gguf.stages.placing import CompanionFile, check_names, place_companions
from ewq_gguf.stages.run import Run

_USE_BF16 = "use BF16: --raw-type bf16"


def base_file(run: Run) -> Path:
    """The base GGUF of a model in the cache, made on first use; or itself."""
    checkpoint, toolchain = run.checkpoint, run.toolchain
    if checkpoint.identity.is_gguf:
        checkpoint.check_unchanged("quantize")
        return checkpoint.shards[0].path
    outtype = base_type(checkpoint)
    key = store.cache_key(checkpoint.signature, outtype, toolchain.key)
    name = f"{checkpoint.identity.name}-{outtype}-{key[:16]}.gguf"
    path = store.cache_dir("base") / name
    with store.locked(path, stage="convert", wait=True):
        if not _is_sound(path):
            check_base(run, outtype)
            _convert(run, path, outtype)
    return path


def base_target(run: Run, out: Path | None, outtype: str) -> tuple[Path, str]:
    """Where a base GGUF is written, and its type.

    Args:
        run: the model and the options.
        out: path of the base GGUF; None for `NAME-TYPE.gguf`.
        outtype: `F16`, `BF16`, `F32`, or `auto` for the checkpoint's own.

    Raises:
        InputError: the model is a GGUF already.
    """
    check_is_no_gguf(run.checkpoint)
    ggml_type = outtype.upper() if outtype != "auto" else base_type(run.checkpoint)
    return out or Path(f"{run.identity.name}-{ggml_type}.gguf"), ggml_type


def convert_model(
    run: Run, out: Path | None = None, outtype: str = "auto"
) -> tuple[Path, tuple[CompanionFile, ...]]:
    """Write the base GGUF and its companions.

    Args:
        run: the model and the options.
        out: path of the base GGUF; None for `NAME-TYPE.gguf`.
        outtype: `F16`, `BF16`, `F32`, or `auto` for the checkpoint's own.

    Returns:
        The base GGUF, and the files beside it.

    Raises:
        EwqError: a stage failed; the message says what to do.
    """
    _ = run.toolchain  # a missing one is said before a model is downloaded
    out, outtype = base_target(run, out, outtype)
    store.check_writable(out, "convert")
    if not run.checkpoint.is_mapped_by_name:
        _ = run.layout  # whether it is whole, before the long work
    check_base(run, outtype)
    if out.exists() and not run.options.force:
        raise store.already_exists(out, "convert")
    companions = []
    if needs_companions(run):
        companions = plan_companions(run, run.layout)
        check_names(run, companions, out.parent)
    with store.locked(out, stage="convert"):
        warnings = _convert(run, out, outtype)
    for warning in warnings:
        run.progress.note(f"llama.cpp's converter: {warning}")
    return out, place_companions(run, companions, out)


def _convert(run: Run, out: Path, outtype: str) -> list[str]:
    """Run the converter; its warnings."""
    checkpoint, toolchain = run.checkpoint, run.toolchain
    with (
        naming_the_nearest(checkpoint, toolchain, run.progress),
        run.progress.stage("convert") as share,
    ):
        return convert(checkpoint, toolchain, out, outtype=outtype, on_progress=share)


def _is_sound(base: Path) -> bool:
    """Whether a cached base GGUF is there and whole."""
    try:
        read_gguf(base)
    except (VerificationError, InputError):
        return False
    return True


def check_base(run: Run, outtype: str) -> None:
    """Refuse an F16 base GGUF of a model with weights that F16 cannot hold.

    Its BF16 and 32-bit matrices are read once. What the converter keeps in F32 may hold
    any weight, so it is asked only when there is one.

    Raises:
        InputError: naming the first such weight.
    """
    checkpoint = run.checkpoint
    if outtype != "F16" or checkpoint.identity.is_gguf:
        return
    matrices = {
        tensor.name
        for _, tensor in checkpoint.tensors
        if len(tensor.shape) > 1 and not is_buffer(tensor)
    }
    overflows = list(find_overflows(checkpoint, matrices))
    if not overflows:
        return
    with header_of(checkpoint, run.toolchain, outtype=outtype) as base:
        feeds = {
            source.hf_name: tensor.name
            for tensor in base.gguf.tensors
            if tensor.ggml_type == "F16"
            for source in base.sources[tensor.name]
        }
    for overflow in overflows:
        if (name := feeds.get(overflow.tensor.name)) is not None:
            remedy = "use --outtype bf16 or f32"
            raise overflow_error("convert", overflow, remedy, name)


def check_planned(run: Run, plan: Plan, scanned: Scan) -> None:
    """Refuse a plan that makes an F16 tensor of weights that F16 cannot hold.

    Args:
        run: the model, in which that weight is looked up where it is there.
        plan: a plan of the scanned model.
        scanned: the scan, which knows the largest weight of each tensor.

    Raises:
        InputError: naming the first such weight.
    """
    in_f16 = {t.name for t in plan.tensors if "F16" in (t.written_type, t.base_type)}
    for tensor in scanned.tensors:
        largest = max(-tensor.min, tensor.max)
        if tensor.name not in in_f16 or largest < F16_INFINITE:
            continue
        if run.given_scan is None:
            for overflow in find_overflows(run.checkpoint, tensor.hf_names):
                raise overflow_error("plan", overflow, _USE_BF16, tensor.name)
        raise InputError(
            "plan",
            tensor.name,
            f"holds a weight of {largest:g}, F16 ends at {F16_MAX:g}: it would become "
            "infinite",
            _USE_BF16,
        )

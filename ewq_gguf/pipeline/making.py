"""From a plan to a verified GGUF, and everything at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.errors import InputError, UsageError, VerificationError
from ewq_gguf.ggml_types import tensor_bytes
from ewq_gguf.llamacpp.convert import base_type
from ewq_gguf.llamacpp.convertible import check_is_local
from ewq_gguf.llamacpp.quantize import quantize
from ewq_gguf.llamacpp.self_test import can_load
from ewq_gguf.llamacpp.verify import verify_file
from ewq_gguf.pipeline.planning import check_needs, plan, plan_file
from ewq_gguf.plan.naming import nearest_preset
from ewq_gguf.plan.size_target import SizeTarget
from ewq_gguf.plan.sizes import base_info_bytes, header_bytes, padded
from ewq_gguf.records import (
    EwqPolicy,
    Layout,
    OptimalPolicy,
    Plan,
    PresetPolicy,
    RulePolicy,
    Verification,
    load_cached,
)
from ewq_gguf.stages.calibrating import with_imatrix
from ewq_gguf.stages.companions import plan_companions
from ewq_gguf.stages.converting import base_file
from ewq_gguf.stages.finished_plan import as_planned, check_replaceable, check_weights
from ewq_gguf.stages.options import Options
from ewq_gguf.stages.placing import CompanionFile, check_names, place_companions
from ewq_gguf.stages.run import Run


@dataclass(frozen=True)
class Made:
    """A finished GGUF, and everything that was learnt on the way.

    Attributes:
        path: the GGUF.
        plan: the plan it was made from.
        plan_path: where the plan was written; None where it was given.
        verification: the checks that the file passed.
        preset_bytes: sizes of the standard presets, by name, and of the base type.
        is_reused: whether the file was there already, valid and of the same plan.
        companions: the files beside it, such as an mmproj.
    """

    path: Path
    plan: Plan
    plan_path: Path | None
    verification: Verification
    preset_bytes: dict[str, int]
    is_reused: bool
    companions: tuple[CompanionFile, ...] = ()


def make_gguf(
    run: Run,
    out: Path | None = None,
    policy: RulePolicy | Plan | None = None,
    *,
    raw_type: str = "auto",
    budget: SizeTarget | None = None,
) -> Made:
    """Everything: scan, plan, convert, quantise, verify; reusing what is there.

    Args:
        run: the model and the options.
        out: path of the GGUF; None for `NAME-EWQ-<nearest preset>.gguf` here.
        policy: how to plan, or a finished plan; None for the paper's.
        raw_type: meaning of `raw`: `F16`, `BF16` or `auto`.
        budget: limit of the file's size; None without one.

    Raises:
        EwqError: a stage failed; the message says what to do.
    """
    policy = policy or EwqPolicy()
    if out is not None:
        store.check_writable(out, "gguf")
    if isinstance(policy, Plan):
        run = as_planned(run, policy)
    else:
        check_needs(run.options, policy, budget)
    _ = run.toolchain  # a missing one is said before a model is downloaded
    check_is_local(run.checkpoint)
    inputs = [shard.path for shard in run.checkpoint.shards]
    if out is not None:
        store.check_distinct(out, inputs, "gguf")
    companions = plan_companions(run, run.layout)
    check_names(run, companions, (out or Path()).parent)
    if isinstance(policy, Plan):
        made_plan, plan_path = policy, None
        check_weights(run, policy)
    else:
        check_replaceable(run, policy, budget)
        made_plan = plan(run, policy, raw_type=raw_type, budget=budget)
        plan_path = plan_file(made_plan)
        if isinstance(policy, OptimalPolicy):
            run = with_imatrix(run)
    presets = _preset_bytes(run)
    out = out or _file_name(made_plan, presets)
    store.check_distinct(out, inputs, "gguf")
    verification, is_reused = planned_file(run, made_plan, out, plan_path=plan_path)
    return Made(
        path=out,
        plan=made_plan,
        plan_path=plan_path,
        verification=verification,
        preset_bytes=presets,
        is_reused=is_reused,
        companions=place_companions(run, companions, out),
    )


def _preset_bytes(run: Run) -> dict[str, int]:
    """Sizes of the standard presets' files, by name, and of the base's."""
    base_bytes = layout_bytes(run.layout)
    return {**run.layout.preset_bytes, base_type(run.checkpoint): base_bytes}


def _file_name(plan: Plan, preset_bytes: dict[str, int]) -> Path:
    """A file's name where the user gives none, with the preset nearest in size."""
    if isinstance(plan.policy, PresetPolicy):
        preset = plan.policy.preset
    else:
        preset = nearest_preset(plan.totals.file_size_bytes, preset_bytes)
    return Path(f"{plan.model.name}-EWQ-{preset}.gguf")


def planned_file(
    run: Run,
    plan: Plan,
    out: Path,
    *,
    base: Path | None = None,
    plan_path: Path | None = None,
) -> tuple[Verification, bool]:
    """Make the verified file of a plan where it is not there yet.

    Args:
        run: the model and the options, with the plan's importance matrix.
        plan: a plan of the model.
        out: path of the file.
        base: the base GGUF; None for the model's own, made on first use.
        plan_path: where the plan is written; None writes none.

    Returns:
        The checks that the file passed, and whether it was there already.

    Raises:
        EwqError: a stage failed; the message says what to do.
    """
    force = run.options.force
    store.check_writable(out, "gguf")
    with store.locked(out, stage="gguf"):
        verification = _existing(plan, out, run.options)
        if plan_path is not None:
            store.write_text(plan_path, plan.to_json(), stage="plan", force=force)
        if verification is not None:
            return verification, True
        return _quantized(run, plan, base or base_file(run), out), False


def layout_bytes(layout: Layout) -> int:
    """Size of the base GGUF."""
    infos = ((tensor.name, tensor.shape) for tensor in layout.tensors)
    return header_bytes(layout.kv_bytes, infos, base_info_bytes) + sum(
        padded(tensor_bytes(tensor.ggml_type, tensor.shape))
        for tensor in layout.tensors
    )


def _existing(plan: Plan, out: Path, options: Options) -> Verification | None:
    """The verification of a file that is there and still what this plan says."""
    if not out.exists():
        return None
    try:
        if read_gguf(out).kv.get("ewq.plan.sha256") == plan.sha256:
            verified = load_cached(Verification, _verification_path(plan), "verify")
            is_damaged = verified and verified.file_sha256 != store.sha256_file(out)
            must_load = options.load and can_load()
            # An answer may be empty: the file was loaded, and is not again.
            was_loaded = verified is not None and verified.answer is not None
            if verified and not is_damaged and (was_loaded or not must_load):
                return verified
            if not is_damaged:
                return _keep(plan, verify_file(plan, out, load=options.load))
    except (VerificationError, InputError):
        pass  # damaged or not a GGUF: treated as somebody else's file
    if options.force:
        return None
    raise UsageError(
        "gguf",
        out,
        "exists and was made from another plan, or is damaged",
        "use --force to replace it, or another -o",
    )


def _quantized(run: Run, plan: Plan, base: Path, out: Path) -> Verification:
    """Make the file, verify it, and remember what was verified."""
    with run.progress.stage("quantize") as share:
        verification = quantize(
            plan,
            base,
            out,
            run.toolchain,
            n_threads=run.options.n_threads,
            load=run.options.load,
            # The best file of a search may be one without.
            imatrix=run.options.imatrix if plan.imatrix else None,
            on_progress=share,
        )
    return _keep(plan, verification)


def _keep(plan: Plan, verification: Verification) -> Verification:
    """Remember what was verified, for the next run."""
    path = _verification_path(plan)
    store.write_text(path, verification.to_json(), stage="verify", force=True)
    return verification


def _verification_path(plan: Plan) -> Path:
    return store.cache_dir("verifications") / f"{plan.sha256}.json"

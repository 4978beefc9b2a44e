"""From a plan to a verified GGUF, and everything at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.errors import (
    InputError,
    UsageError,
    VerificationError,
)
from ewq_gguf.ggml_types import tensor_bytes
from ewq_gguf.llamacpp.convert import (
    base_type,
    check_is_local,
)
from ewq_gguf.llamacpp.quantize import quantize
from ewq_gguf.llamacpp.toolchain import Toolchain, find_toolchain
from ewq_gguf.llamacpp.verify import can_load, verify_file
from ewq_gguf.pipeline.planning import (
    check_weights,
    plan,
    plan_file,
)
from ewq_gguf.plan.naming import nearest_preset
from ewq_gguf.plan.policy import check_policy
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
from ewq_gguf.stages.bases import base_file
from ewq_gguf.stages.calibrating import with_imatrix
from ewq_gguf.stages.choosing import as_planned
from ewq_gguf.stages.companions import plan_companions
from ewq_gguf.stages.options import SILENT, Options, Progress
from ewq_gguf.stages.placing import CompanionFile, check_names, place_companions
from ewq_gguf.stages.presets import check_presets
from ewq_gguf.stages.scanning import layout, open_model


@dataclass(frozen=True)
class Made:
    """What `make_gguf` made.

    Attributes:
        path: of the GGUF.
        plan: it was made from.
        plan_path: where the plan was written; None where it was given.
        verification: of the file.
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
    model: str,
    out: Path | None = None,
    policy: RulePolicy | Plan | None = None,
    *,
    raw_type: str = "auto",
    budget: SizeTarget | None = None,
    options: Options | None = None,
    progress: Progress = SILENT,
) -> Made:
    """Everything: scan, plan, convert, quantise, verify; reusing what is there.

    Args:
        model: a folder, a .safetensors or .gguf file, a Hub id, or `demo`.
        out: of the GGUF; None for `NAME-EWQ-<nearest preset>.gguf` here.
        policy: how to plan, or a finished plan; None for the paper's.
        raw_type: what `raw` means: `F16`, `BF16` or `auto`.
        budget: what the file may take.
        options: for the whole run.
        progress: who is told.

    Raises:
        EwqError: of the stage that failed, with what to do.
    """
    options = options or Options()
    policy = policy or EwqPolicy()
    if out is not None:
        store.check_writable(out, "gguf")
    if isinstance(policy, Plan):
        options = as_planned(options, policy, progress)
    else:
        _check_policy(policy, budget, options)
    toolchain = find_toolchain(options.llama_cpp)
    checkpoint = open_model(model, options=options, progress=progress)
    check_is_local(checkpoint)
    inputs = [shard.path for shard in checkpoint.shards]
    if out is not None:
        store.check_distinct(out, inputs, "gguf")
    laid_out = layout(checkpoint, toolchain, progress)
    beside = plan_companions(checkpoint, laid_out, toolchain, options, progress)
    check_names(checkpoint, beside, (out or Path()).parent, options)
    plan_path = None
    if isinstance(policy, Plan):
        made_plan = policy
        check_weights(policy, checkpoint, options=options, progress=progress)
    else:
        made_plan = plan(
            checkpoint,
            policy,
            raw_type=raw_type,
            budget=budget,
            options=options,
            progress=progress,
        )
        if isinstance(policy, OptimalPolicy):
            options = with_imatrix(checkpoint, options, progress)
        plan_path = plan_file(made_plan)
    presets = {**laid_out.preset_bytes, base_type(checkpoint): layout_bytes(laid_out)}
    preset = (
        made_plan.policy.preset
        if isinstance(made_plan.policy, PresetPolicy)
        else nearest_preset(made_plan.totals.file_size_bytes, presets)
    )
    out = out or Path(f"{made_plan.model.name}-EWQ-{preset}.gguf")
    store.check_distinct(out, inputs, "gguf")
    with store.locked(out, stage="gguf"):
        reused = _existing(made_plan, out, options)
        if plan_path is not None:
            store.write_text(
                plan_path, made_plan.to_json(), stage="plan", force=options.force
            )
        verification = reused or _make(
            made_plan,
            base_file(checkpoint, toolchain, progress=progress),
            out,
            toolchain,
            options,
            progress,
        )
    companions = place_companions(checkpoint, toolchain, beside, out, options, progress)
    return Made(
        path=out,
        plan=made_plan,
        plan_path=plan_path,
        verification=verification,
        preset_bytes=presets,
        is_reused=reused is not None,
        companions=companions,
    )


def _check_policy(
    policy: RulePolicy, budget: SizeTarget | None, options: Options
) -> None:
    """Refuse what a policy cannot do without, before any work.

    Raises:
        UsageError: it lacks a size, a matrix, or is a preset that nobody knows.
    """
    has_imatrix = options.imatrix is not None
    check_policy(policy, has_budget=budget is not None, has_imatrix=has_imatrix)
    if isinstance(policy, PresetPolicy):
        check_presets([policy.preset], has_imatrix=has_imatrix)


def planned_file(
    plan: Plan,
    base: Path,
    out: Path,
    toolchain: Toolchain,
    *,
    options: Options | None = None,
    progress: Progress = SILENT,
) -> Verification:
    """The verified file of a plan, made from its base where it is not there yet.

    Args:
        plan: of the base's model.
        base: the base GGUF.
        out: of the file.
        toolchain: that quantises.
        options: for the whole run; its matrix is the plan's.
        progress: who is told.

    Raises:
        EwqError: of the stage that failed, with what to do.
    """
    options = options or Options()
    with store.locked(out, stage="gguf"):
        reused = _existing(plan, out, options)
        return reused or _make(plan, base, out, toolchain, options, progress)


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
            known = load_cached(Verification, _verification_path(plan), "verify")
            is_damaged = known and known.file_sha256 != store.sha256_file(out)
            must_load = options.load and can_load()
            if known and not is_damaged and (known.answer or not must_load):
                return known
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


def _make(
    plan: Plan,
    base: Path,
    out: Path,
    toolchain: Toolchain,
    options: Options,
    progress: Progress,
) -> Verification:
    with progress.stage("quantize") as share:
        verification = quantize(
            plan,
            base,
            out,
            toolchain,
            n_threads=options.n_threads,
            load=options.load,
            # The best file of a search may be one without.
            imatrix=options.imatrix if plan.imatrix else None,
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

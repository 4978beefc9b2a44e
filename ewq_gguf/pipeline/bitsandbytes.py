"""What `ewq bench --backend bnb` measures: a checkpoint, and a plan for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ewq_gguf.bench.engines.precision import SAVED_NAME, AppliedPlan, precisions_of
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.checkpoint.files import model_name
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.mapping import map_tensors
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.llamacpp.convert import check_is_local
from ewq_gguf.llamacpp.toolchain import find_toolchain
from ewq_gguf.pipeline.planning import check_plan, policy_measures
from ewq_gguf.plan.check import check_sound
from ewq_gguf.records import Plan, load_record
from ewq_gguf.stages.choosing import with_planned_tensors
from ewq_gguf.stages.options import SILENT, Options, Progress
from ewq_gguf.stages.scanning import layout, open_model, scan


@dataclass(frozen=True)
class ForTransformers:
    """A model that transformers loads.

    Attributes:
        name: of its result.
        folder: of the checkpoint, or one that `--save` wrote.
        plan: that bitsandbytes follows; None without one.
    """

    name: str
    folder: Path
    plan: AppliedPlan | None


def for_transformers(
    model: str,
    plan_path: Path | None,
    *,
    options: Options | None = None,
    progress: Progress = SILENT,
) -> ForTransformers:
    """Find a checkpoint and look what a plan says about each of its tensors.

    Args:
        model: a folder, a Hub id or `demo`; or a folder that `--save` wrote.
        plan_path: of the plan; None for the checkpoint as it is.
        options: for the whole run.
        progress: who is told.

    Raises:
        UsageError: the model is no folder, or was quantised before.
        InputError: it is FP8, or the plan is not of it or not sound.
    """
    options = options or Options()
    if (Path(model) / SAVED_NAME).is_file():
        folder = Path(model)
        if plan_path is not None:
            problem = "is quantised already, by another run's --save"
            raise UsageError(STAGE, folder, problem, "leave --plan away")
        return ForTransformers(model_name(folder), folder, None)
    checkpoint = open_model(model, options=options, progress=progress)
    _check_loadable(model, checkpoint)
    name = checkpoint.identity.name
    if plan_path is None:
        return ForTransformers(name, checkpoint.folder, None)
    record = load_record(Plan, plan_path, STAGE)
    check_sound(record)
    if record.model.adapters and not options.force:
        names = ", ".join(adapter.name for adapter in record.model.adapters)
        raise InputError(
            STAGE,
            plan_path,
            f"is for weights with adapters merged ({names}), which {model} has not",
            "save the merged model as a folder and plan that, or measure the plan's "
            "GGUF without --backend bnb",
        )
    checkpoint = with_planned_tensors(checkpoint, record)
    weights = None
    if record.weights_sha256 is not None:
        measures = policy_measures(record.policy)
        scanned = scan(checkpoint, measures, options=options, progress=progress)
        weights = scanned.weights_sha256
    # Transformers has the model's own template and tokenizer whatever the plan's are.
    as_found = record.model_copy(update={"model": record.model.as_found})
    check_plan(as_found, checkpoint.identity.as_found, weights, force=options.force)
    laid_out = None
    if not checkpoint.is_mapped_by_name:
        laid_out = layout(checkpoint, find_toolchain(options.llama_cpp), progress)
    tensors, _ = map_tensors(checkpoint, laid_out)
    applied = AppliedPlan(
        name=f"{plan_path.stem}.bnb",
        sha256=record.sha256,
        precisions=precisions_of(record, tensors),
    )
    return ForTransformers(applied.name, checkpoint.folder, applied)


def _check_loadable(model: str, checkpoint: Checkpoint) -> None:
    """Refuse what transformers would not load, or not as it is."""
    if checkpoint.identity.is_gguf or not checkpoint.folder.is_dir():
        problem = "is a GGUF file, and transformers loads checkpoints"
        raise UsageError(STAGE, model, problem, "give the checkpoint it was made from")
    if Path(model).is_file():
        problem = "is a file, and transformers loads folders"
        raise UsageError(STAGE, model, problem, "give its folder")
    check_is_local(checkpoint)
    if checkpoint.fp8 is not None:
        raise InputError(
            STAGE,
            checkpoint.folder,
            "has FP8 weights, which bitsandbytes does not read",
            "give a BF16 or F16 checkpoint",
        )

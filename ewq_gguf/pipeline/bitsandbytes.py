"""Models that `ewq bench --backend bnb` measures: a checkpoint, a plan for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ewq_gguf.bench.engines.precision import SAVED_NAME, AppliedPlan, precisions_of
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.checkpoint.files import model_name
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.mapping import map_tensors
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.llamacpp.convertible import check_is_local
from ewq_gguf.plan.check import check_sound
from ewq_gguf.records import Plan, load_record
from ewq_gguf.stages.finished_plan import (
    check_plan,
    planned_weights,
    with_planned_tensors,
)
from ewq_gguf.stages.run import Run


@dataclass(frozen=True)
class ForTransformers:
    """A model that transformers loads.

    Attributes:
        name: the name of its result.
        folder: the checkpoint's folder, or one that `--save` wrote.
        plan: the plan that bitsandbytes follows; None without one.
    """

    name: str
    folder: Path
    plan: AppliedPlan | None


def for_transformers(run: Run, plan_path: Path | None) -> ForTransformers:
    """Find a checkpoint and look what a plan says about each of its tensors.

    Args:
        run: a folder, a Hub id or `demo`, or a folder that `--save` wrote; and the
            options.
        plan_path: the plan's file; None for the checkpoint as it is.

    Raises:
        UsageError: the model is no folder, or was quantised before.
        InputError: it is FP8, or the plan is not of it or not sound.
    """
    model = str(run.model)
    if (Path(model) / SAVED_NAME).is_file():
        folder = Path(model)
        if plan_path is not None:
            problem = "is quantised already, by another run's --save"
            raise UsageError(STAGE, folder, problem, "leave --plan away")
        return ForTransformers(model_name(folder), folder, None)
    _check_loadable(model, run.checkpoint)
    if plan_path is None:
        return ForTransformers(run.identity.name, run.checkpoint.folder, None)
    plan = load_record(Plan, plan_path, STAGE)
    _check_plan(run, plan, plan_path)
    run = replace(run, model=with_planned_tensors(run.checkpoint, plan))
    layout = None if run.checkpoint.is_mapped_by_name else run.layout
    tensors, _ = map_tensors(run.checkpoint, layout)
    applied = AppliedPlan(
        name=f"{plan_path.stem}.bnb",
        sha256=plan.sha256,
        precisions=precisions_of(plan, tensors),
    )
    return ForTransformers(applied.name, run.checkpoint.folder, applied)


def _check_plan(run: Run, plan: Plan, plan_path: Path) -> None:
    """Refuse a plan that is not sound, or not of this model.

    Raises:
        InputError: it is for merged adapters, or for other files or weights.
    """
    check_sound(plan)
    if plan.model.adapters and not run.options.force:
        names = ", ".join(adapter.name for adapter in plan.model.adapters)
        raise InputError(
            STAGE,
            plan_path,
            f"is for weights with adapters merged ({names}), which {run.model} has not",
            "save the merged model as a folder and plan that, or measure the plan's "
            "GGUF without --backend bnb",
        )
    run = replace(run, model=with_planned_tensors(run.checkpoint, plan))
    # Transformers has the model's own template and tokenizer whatever the plan's are.
    check_plan(
        plan.model_copy(update={"model": plan.model.as_found}),
        run.identity.as_found,
        planned_weights(run, plan),
        force=run.options.force,
    )


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

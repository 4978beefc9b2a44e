"""A finished plan and the model that is there: choices, files and weights agree."""

from __future__ import annotations

from dataclasses import replace
from glob import escape
from pathlib import Path

from ewq_gguf import store
from ewq_gguf._version import __version__
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.errors import InputError
from ewq_gguf.llamacpp.imatrix import check_imatrix
from ewq_gguf.plan.check import check_sound
from ewq_gguf.plan.size_target import SizeTarget
from ewq_gguf.records import (
    ModelIdentity,
    OptimalPolicy,
    Plan,
    RulePolicy,
    load_cached,
)
from ewq_gguf.stages.calibrating import with_imatrix
from ewq_gguf.stages.run import Run
from ewq_gguf.stages.scanning import policy_measures, scan


def as_planned(run: Run, plan: Plan) -> Run:
    """The run that makes a plan's file; only files have to be given again.

    Raises:
        InputError: the plan contradicts itself, or its chat template or importance
            matrix is not given.
    """
    check_given(run, plan)
    return chosen_as(run, plan)


def check_given(run: Run, plan: Plan) -> None:
    """Refuse a plan that contradicts itself, or any importance matrix but its own.

    Raises:
        InputError: naming what is wrong, or missing.
    """
    check_sound(plan)
    if note := check_imatrix(plan, run.options.imatrix):
        run.progress.note(note)


def check_replaceable(
    run: Run,
    policy: RulePolicy,
    budget: SizeTarget | None,
    out: Path | None = None,
) -> None:
    """Refuse before a search a plan that could not be written after it.

    Args:
        run: the model and the options.
        policy: how to plan; only policy `optimal` takes long.
        budget: size of the file.
        out: path of the plan; None for its default.

    Raises:
        UsageError: a plan that was made from other inputs is there.
    """
    if run.options.force or not isinstance(policy, OptimalPolicy) or budget is None:
        return
    pattern = f"{escape(run.identity.name)}.optimal*.json"
    for path in [out] if out else sorted(Path("plans").glob(pattern)):
        if not path.exists():
            continue
        plan = load_cached(Plan, path, "plan")
        asked = plan and plan.budget and plan.budget.asked
        is_named_alike = plan and (plan.policy, asked) == (policy, budget.text)
        if plan and is_named_alike and _has_inputs(plan, run):
            continue
        if out is not None or is_named_alike:
            raise store.already_exists(path, "plan")


def _has_inputs(plan: Plan, run: Run) -> bool:
    """Whether a search of this run could give a plan again."""
    matrix = with_imatrix(run).options.imatrix
    return (
        plan.ewq_version == __version__
        and plan.model.fingerprint == run.identity.fingerprint
        and (plan.imatrix is None or plan.imatrix.file_sha256 == _sha256(matrix))
    )


def _sha256(path: Path | None) -> str | None:
    return None if path is None else store.sha256_file(path)


def chosen_as(run: Run, plan: Plan) -> Run:
    """The run with what the converter was told for a plan.

    Raises:
        InputError: the plan's chat template is not given.
    """
    chosen, options = plan.model.chosen, run.options
    if "chat_template" in chosen and options.chat_template is None:
        raise InputError(
            "plan",
            plan.model.name,
            "the plan was made with a chat template of SHA-256 "
            f"{chosen['chat_template'][:12]}",
            "give it with --chat-template",
        )
    return run.with_options(
        pre=options.pre or chosen.get("pre"),
        mtp="drop" if options.mtp == "keep" and "mtp" in chosen else options.mtp,
    )


def with_planned_tensors(checkpoint: Checkpoint, plan: Plan) -> Checkpoint:
    """The checkpoint with a plan's choices, but for a template, which has no tensor."""
    chosen = {k: v for k, v in plan.model.chosen.items() if k != "chat_template"}
    identity = checkpoint.identity.model_copy(update={"chosen": chosen})
    return replace(checkpoint, identity=identity, opened="")


def check_weights(run: Run, plan: Plan) -> None:
    """Refuse a plan of another model; where it names weights, they are scanned.

    Raises:
        InputError: files, headers or weights differ.
    """
    weights = planned_weights(run, plan)
    check_plan(plan, run.checkpoint.identity, weights, force=run.options.force)


def planned_weights(run: Run, plan: Plan) -> str | None:
    """The SHA-256 of the weights that are there; None where the plan names none."""
    if plan.weights_sha256 is None:
        return None
    return scan(run, policy_measures(plan.policy)).weights_sha256


def check_plan(
    plan: Plan, model: ModelIdentity, weights_sha256: str | None, *, force: bool = False
) -> None:
    """Refuse a plan that was made for another checkpoint, or for other weights of it.

    Args:
        plan: a finished plan.
        model: identity of the model that is there.
        weights_sha256: SHA-256 of its weights; None where the plan names none.
        force: take it nevertheless; not with other choices, of which no file of the
            plan's size can be made.

    Raises:
        InputError: adapters, choices, files, headers or weights differ.
    """
    merged, here = ([a.weights_sha256 for a in m.adapters] for m in (plan.model, model))
    if merged != here and not force:
        names = [adapter.name for adapter in plan.model.adapters]
        raise InputError(
            "plan",
            plan.model.name,
            f"the plan is for weights with {len(merged)} adapters merged "
            f"({', '.join(names) or 'none'}), here are {len(here)}",
            "give the same adapters with --adapter, in the same order, or plan again",
        )
    if plan.model.as_found.fingerprint == model.as_found.fingerprint or force:
        _check_chosen(plan, model)
    planned = (plan.model.fingerprint, plan.weights_sha256)
    actual = (model.fingerprint, weights_sha256)
    for what, a, b in zip(("checkpoint", "weights"), planned, actual, strict=True):
        if a != b and not force:
            raise InputError(
                "plan",
                plan.model.name,
                f"the plan is for {what} {str(a)[:12]}, here are {str(b)[:12]}",
                "plan again, or use --force if you know that they match",
            )


def _check_chosen(plan: Plan, model: ModelIdentity) -> None:
    """Refuse a plan that was made with another choice, which is named.

    Raises:
        InputError: a chat template, a pre-tokenizer or what becomes of heads differs.
    """
    planned, chosen = plan.model.chosen, model.chosen
    for name in sorted({*planned, *chosen}):
        if planned.get(name) == chosen.get(name):
            continue
        option = f"--{name.replace('_', '-')}"
        same = "give the same" if name in planned else f"leave {option} away"
        raise InputError(
            "plan",
            plan.model.name,
            f"the plan was made {_with_choice(option, planned.get(name))}, here is a "
            f"checkpoint {_with_choice(option, chosen.get(name))}",
            f"{same}, or plan again",
        )


def _with_choice(option: str, value: str | None) -> str:
    """Such as `with --pre qwen2`; a file by the begin of its SHA-256."""
    return f"without {option}" if value is None else f"with {option} {value[:12]}"

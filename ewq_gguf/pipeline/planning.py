"""From a checkpoint or a scan to a plan."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from ewq_gguf.checkpoint.mapping import map_tensors
from ewq_gguf.errors import ChildError, InputError, ToolError, UsageError
from ewq_gguf.fastewq.classifier import select_layers
from ewq_gguf.fastewq.rows import layer_features, rows_in_use, rows_sha256
from ewq_gguf.llamacpp.devices import free_memory
from ewq_gguf.optimal.candidate_types import candidate_types
from ewq_gguf.optimal.search import check_search, search
from ewq_gguf.plan.build import make_fast_plan, make_plan
from ewq_gguf.plan.importance import check_model
from ewq_gguf.plan.lattice import Lattices, allowed, lattice_line, lattices_of
from ewq_gguf.plan.model_tensors import ModelTensors, check_whole, layout_tensor
from ewq_gguf.plan.naming import plan_label, plan_name
from ewq_gguf.plan.policy import check_policy
from ewq_gguf.plan.size_target import SizeTarget
from ewq_gguf.records import (
    EwqPolicy,
    FastEwqPolicy,
    Layout,
    OptimalPolicy,
    Plan,
    PresetPolicy,
    RulePolicy,
    Scan,
    UniformPolicy,
)
from ewq_gguf.stages.calibrating import check_calibration, with_imatrix
from ewq_gguf.stages.converting import check_planned
from ewq_gguf.stages.options import Options
from ewq_gguf.stages.presets import check_presets, preset_plan
from ewq_gguf.stages.run import Run
from ewq_gguf.stages.scanning import (
    check_layout,
    find_lattices,
    policy_measures,
    scan,
)


def plan(
    run: Run,
    policy: RulePolicy,
    *,
    raw_type: str = "auto",
    budget: SizeTarget | None = None,
) -> Plan:
    """Plan a checkpoint, or a scan of one, and predict the file's bytes.

    With a checkpoint and a toolchain the prediction is exact. From a Scan alone it is,
    where this machine has laid the same checkpoint out before; else an estimate.

    Args:
        run: the model, or a scan of it, and the options.
        policy: how each tensor's type is decided.
        raw_type: meaning of `raw`: `F16`, `BF16` or `auto`.
        budget: limit of the file's size; None without one.

    Raises:
        EwqError: a stage failed; the message says what to do.
    """
    check_needs(run.options, policy, budget)
    check_importance(run)
    if isinstance(policy, OptimalPolicy):
        assert budget is not None
        made, lattices = _optimal_plan(run, policy, raw_type, budget)
    else:
        made, lattices = _rule_plan(run, policy, raw_type, budget)
    if (line := lattice_line(made.tensors, lattices)) is not None:
        run.progress.note(
            line if run.options.keep_lattice else f"{line} (--no-lattice)"
        )
    return made


def check_needs(
    options: Options, policy: RulePolicy, budget: SizeTarget | None
) -> None:
    """Refuse what a policy cannot do without, before any work.

    Raises:
        UsageError: it lacks a size, a matrix, or is a preset that nobody knows.
        InputError: the text that an importance matrix is computed on cannot be read.
    """
    has_imatrix = options.imatrix is not None
    check_policy(policy, has_budget=budget is not None, has_imatrix=has_imatrix)
    if isinstance(policy, PresetPolicy):
        check_presets([policy.preset], has_imatrix=has_imatrix)
    if options.calibration is not None and not has_imatrix:
        check_calibration(options.calibration)


def check_importance(run: Run) -> None:
    """Refuse an importance matrix of another model; note tensors without an entry.

    Raises:
        InputError: the file is no importance matrix, or another model's.
    """
    if run.importance is not None:
        model = _predicted_tensors(run, "auto")
        if note := check_model(model.tensors, run.importance):
            run.progress.note(note)


def _rule_plan(
    run: Run,
    policy: EwqPolicy | FastEwqPolicy | UniformPolicy | PresetPolicy,
    raw_type: str,
    budget: SizeTarget | None,
) -> tuple[Plan, Lattices]:
    """The plan of a rule, and what is quantised already."""
    if budget is not None:
        _need_header(run)
    if isinstance(policy, PresetPolicy | FastEwqPolicy):
        lattices = find_lattices(run)
        kept = lattices if run.options.keep_lattice else {}
        if isinstance(policy, PresetPolicy):
            made = preset_plan(run, policy, raw_type=raw_type, lattices=kept)
        else:
            model = _predicted_tensors(run, raw_type)
            model = replace(model, importance=run.importance, lattices=kept)
            made = _fast_plan(model, policy, budget)
        return made, lattices
    scanned, layout = measured(run, policy)
    made = make_plan(
        scanned,
        policy,
        layout,
        raw_type=raw_type,
        budget=budget,
        importance=run.importance,
        keep_lattice=run.options.keep_lattice,
    )
    check_planned(run, made, scanned)
    return made, lattices_of(scanned)


def _optimal_plan(
    run: Run, policy: OptimalPolicy, raw_type: str, budget: SizeTarget
) -> tuple[Plan, Lattices]:
    """The best of what the entropies and presets propose and what can be found."""
    if run.given_scan is not None:
        raise InputError(
            "plan",
            run.identity.name,
            "policy optimal measures files of the model",
            "give the model in place of the scan",
        )
    if budget.machines:
        raise UsageError(
            "plan",
            "--machine",
            "does not go with policy optimal, which places nothing",
            "give --budget SIZE, or use --policy ewq",
        )
    scanned, layout = measured(run, policy)
    model = ModelTensors.of_scan(scanned, layout, raw_type)
    lattices = lattices_of(scanned)
    if run.options.keep_lattice:
        model = replace(
            model, lattices=allowed(lattices, candidate_types(model, policy))
        )
    check_search(run, model, policy, budget)
    run = with_imatrix(run)
    baselines = {}
    for rule in (EwqPolicy(), EwqPolicy(granularity="tensor"), FastEwqPolicy()):
        try:
            made, _ = _rule_plan(run, rule, raw_type, budget)
        except (InputError, ToolError) as error:
            # Its ladder does not reach the size, or its library is missing.
            run.progress.note(f"policy {rule.name} has no file of this size: {error}")
            continue
        baselines[plan_label(made)] = made
    model = replace(model, importance=run.importance)
    return search(run, model, policy, budget, baselines), lattices


def _predicted_tensors(run: Run, raw_type: str) -> ModelTensors:
    """The tensors to be planned, from config and headers alone.

    The converter takes seconds to lay a file out, so it is asked only where names alone
    do not say which tensor becomes which.
    """
    if run.given_scan is not None:
        check_whole(run.given_scan)
    identity, layout = run.identity, run.known_layout
    if (
        layout is None
        and run.given_scan is None
        and not run.checkpoint.is_mapped_by_name
    ):
        layout = run.layout
    if layout is not None:
        return ModelTensors.of_tensors(identity, layout.tensors, layout, raw_type)
    tensors = (
        run.given_scan.tensors if run.given_scan else map_tensors(run.checkpoint)[0]
    )
    predicted = [layout_tensor(t.name, t.shape, t.dtype) for t in tensors]
    return ModelTensors.of_tensors(identity, predicted, None, raw_type)


def _need_header(run: Run) -> None:
    """A budget counts every byte of the file, so the header's have to be known.

    Raises:
        InputError: only a scan is there, of a model that was not laid out here.
        EwqError: the model cannot be laid out.
    """
    if run.given_scan is None:
        _ = run.layout
    elif run.known_layout is None:
        _ = run.toolchain_key  # an own llama.cpp that cannot be used is said
        raise InputError(
            "plan",
            run.identity.name,
            "the file's header is not known from a scan, and a budget counts its bytes",
            "give the model in place of the scan, once",
        )


def _fast_plan(
    model: ModelTensors, policy: FastEwqPolicy, budget: SizeTarget | None
) -> Plan:
    rows = rows_in_use()
    layers = layer_features(model.tensors, model.identity.n_layers)
    answers = select_layers(rows, list(layers.values()), policy.variant)
    policy = policy.model_copy(
        update={
            "rows_sha256": rows_sha256(rows),
            "library": f"scikit-learn {version('scikit-learn')}",
        }
    )
    selected = [
        idx for idx, answer in zip(layers, answers, strict=True) if answer.quantise
    ]
    return make_fast_plan(model, policy, selected, budget=budget)


def measured(run: Run, policy: RulePolicy) -> tuple[Scan, Layout | None]:
    """The scan that a policy decides by, and the layout where it is known."""
    if run.given_scan is not None:
        return run.given_scan, run.known_layout
    layout = None
    try:
        layout = run.unchecked_layout
    except (ToolError, ChildError, InputError) as error:
        run.progress.note(f"{error}; the file's size is an estimate without its header")
    if layout is not None:
        run.check_loadable()
    scanned = scan(run, policy_measures(policy))
    if layout is not None:
        check_layout(scanned, layout)
    return scanned, layout


def machine_budget(
    n_ctx: int, device: str = "auto", options: Options | None = None
) -> SizeTarget:
    """The memory that is free here for a file and its context.

    Args:
        n_ctx: tokens of context.
        device: `auto`, `cpu`, or names of llama.cpp's devices.
        options: settings of the whole run; its llama.cpp lists the devices.

    Raises:
        ToolError, UsageError: there is no such device.
    """
    n_bytes, names = free_memory(device, (options or Options()).llama_cpp)
    # A thirty-second less at most: what is free moves from one minute to the next, and
    # the same machine should make the same plan.
    step = 1 << max(n_bytes.bit_length() - 6, 0)
    return SizeTarget(
        f"auto ({', '.join(names)})",
        memory_bytes=n_bytes // step * step,
        n_devices=len(names),
        n_ctx=n_ctx,
    )


def plan_file(plan: Plan) -> Path:
    """Where a plan is written by default: `plans/NAME.POLICY.json`."""
    return Path("plans") / f"{plan_name(plan)}.json"

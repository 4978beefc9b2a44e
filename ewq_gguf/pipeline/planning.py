"""From a checkpoint or a scan to a plan."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.mapping import map_tensors
from ewq_gguf.errors import (
    ChildError,
    InputError,
    ToolError,
    UsageError,
    VerificationError,
)
from ewq_gguf.fastewq.classifier import select_layers
from ewq_gguf.fastewq.rows import layer_features, rows_in_use, rows_sha256
from ewq_gguf.llamacpp.devices import free_memory
from ewq_gguf.llamacpp.imatrix import read_imatrix
from ewq_gguf.llamacpp.layout import cached_layout
from ewq_gguf.llamacpp.toolchain import LLAMA_CPP_COMMIT, find_toolchain
from ewq_gguf.optimal.problem import menus
from ewq_gguf.optimal.search import check_search, search
from ewq_gguf.plan.build import make_fast_plan, make_plan
from ewq_gguf.plan.importance import Importance, check_model
from ewq_gguf.plan.lattice import Lattices, allowed, lattice_line, lattices_of
from ewq_gguf.plan.model_tensors import ModelTensors, check_whole, layout_tensor
from ewq_gguf.plan.naming import plan_label, plan_name
from ewq_gguf.plan.policy import check_policy
from ewq_gguf.plan.size_target import SizeTarget
from ewq_gguf.records import (
    EwqPolicy,
    FastEwqPolicy,
    Layout,
    Measures,
    ModelIdentity,
    OptimalPolicy,
    Plan,
    Policy,
    PresetPolicy,
    RulePolicy,
    Scan,
    UniformPolicy,
)
from ewq_gguf.stages.calibrating import with_imatrix
from ewq_gguf.stages.options import SILENT, Options, Progress
from ewq_gguf.stages.overflow import check_planned
from ewq_gguf.stages.presets import check_presets, preset_plan
from ewq_gguf.stages.scanning import (
    ask_layout,
    check_loadable,
    found_lattices,
    layout,
    scan,
)


def plan(
    source: Checkpoint | Scan,
    policy: RulePolicy,
    *,
    raw_type: str = "auto",
    budget: SizeTarget | None = None,
    options: Options | None = None,
    progress: Progress = SILENT,
) -> Plan:
    """Plan a checkpoint, or a scan of one, and predict the file's bytes.

    With a checkpoint and a toolchain the prediction is exact. From a Scan alone it is,
    where this machine has laid the same checkpoint out before; else an estimate.
    """
    options = options or Options()
    has_budget, has_imatrix = budget is not None, options.imatrix is not None
    check_policy(policy, has_budget=has_budget, has_imatrix=has_imatrix)
    if isinstance(policy, PresetPolicy):
        check_presets([policy.preset], has_imatrix=has_imatrix)
    importance = given_importance(source, options, progress)
    if isinstance(policy, OptimalPolicy):
        assert budget is not None
        return _optimal_plan(source, policy, raw_type, budget, options, progress)
    made, lattices = _rule_plan(
        source, policy, raw_type, budget, importance, options, progress
    )
    return _told(made, lattices, options, progress)


def _rule_plan(
    source: Checkpoint | Scan,
    policy: EwqPolicy | FastEwqPolicy | UniformPolicy | PresetPolicy,
    raw_type: str,
    budget: SizeTarget | None,
    importance: Importance | None,
    options: Options,
    progress: Progress,
) -> tuple[Plan, Lattices]:
    """The plan of a rule, and what is quantised already."""
    if budget is not None:
        _need_header(source, options, progress)
    if isinstance(policy, PresetPolicy | FastEwqPolicy):
        lattices = found_lattices(source, options, progress)
        kept = lattices if options.keep_lattice else {}
        if isinstance(policy, PresetPolicy):
            made = preset_plan(
                source,
                policy,
                raw_type=raw_type,
                lattices=kept,
                options=options,
                progress=progress,
            )
        else:
            subject = _unread(source, raw_type, options, progress)
            subject = replace(subject, importance=importance, lattices=kept)
            made = _fast_plan(subject, policy, budget)
        return made, lattices
    scanned, laid_out = measured(source, policy, options=options, progress=progress)
    made = make_plan(
        scanned,
        policy,
        laid_out,
        raw_type=raw_type,
        budget=budget,
        importance=importance,
        keep_lattice=options.keep_lattice,
    )
    check_planned(made, scanned, source)
    return made, lattices_of(scanned)


def _told(plan: Plan, lattices: Lattices, options: Options, progress: Progress) -> Plan:
    """The plan; whoever follows the run is told what is quantised already."""
    line = lattice_line(plan.tensors, lattices)
    if line is not None:
        progress.note(line if options.keep_lattice else f"{line} (--no-lattice)")
    return plan


def given_importance(
    source: Checkpoint | Scan, options: Options, progress: Progress
) -> Importance | None:
    """The matrix that was given, None without; told where it has no entry.

    Raises:
        InputError: it is none, or another model's.
    """
    if options.imatrix is None:
        return None
    importance = read_imatrix(options.imatrix)
    subject = _unread(source, "auto", options, progress)
    if note := check_model(subject.tensors, importance):
        progress.note(note)
    return importance


def _optimal_plan(
    source: Checkpoint | Scan,
    policy: OptimalPolicy,
    raw_type: str,
    budget: SizeTarget,
    options: Options,
    progress: Progress,
) -> Plan:
    """The best of what the entropies and presets propose and what can be found."""
    if isinstance(source, Scan):
        raise InputError(
            "plan",
            source.model.name,
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
    scanned, laid_out = measured(source, policy, options=options, progress=progress)
    subject = ModelTensors.of_scan(scanned, laid_out, raw_type)
    lattices = lattices_of(scanned)
    if options.keep_lattice:
        subject = replace(subject, lattices=allowed(lattices, menus(subject, policy)))
    check_search(subject, policy, budget, options)
    options = with_imatrix(source, options, progress)
    assert options.imatrix is not None
    importance, rivals = read_imatrix(options.imatrix), {}
    for rule in (EwqPolicy(), EwqPolicy(granularity="tensor"), FastEwqPolicy()):
        try:
            made, _ = _rule_plan(
                source, rule, raw_type, budget, importance, options, progress
            )
        except (InputError, ToolError) as error:
            # Its ladder does not reach the size, or its library is missing.
            progress.note(f"policy {rule.name} is no rival: {error}")
            continue
        rivals[plan_label(made)] = made
    made = search(
        source,
        replace(subject, importance=importance),
        policy,
        budget,
        rivals,
        options=options,
        progress=progress,
    )
    return _told(made, lattices, options, progress)


def _unread(
    source: Checkpoint | Scan,
    raw_type: str,
    options: Options,
    progress: Progress,
) -> ModelTensors:
    """What is planned, from config and headers alone.

    The converter takes seconds to lay a file out, so it is asked only where names alone
    do not say which tensor becomes which.
    """
    if isinstance(source, Scan):
        check_whole(source)
    model = source.model if isinstance(source, Scan) else source.identity
    laid_out = cached_layout(model.fingerprint, LLAMA_CPP_COMMIT)
    if (
        laid_out is None
        and isinstance(source, Checkpoint)
        and not source.is_mapped_by_name
    ):
        laid_out = layout(source, find_toolchain(options.llama_cpp), progress)
    if laid_out is not None:
        return ModelTensors.of_tensors(model, laid_out.tensors, laid_out, raw_type)
    found = source.tensors if isinstance(source, Scan) else map_tensors(source)[0]
    known = [layout_tensor(t.name, t.shape, t.dtype) for t in found]
    return ModelTensors.of_tensors(model, known, None, raw_type)


def _need_header(
    source: Checkpoint | Scan, options: Options, progress: Progress
) -> None:
    """A budget counts every byte of the file, so the header's have to be known.

    Raises:
        InputError: only a scan is there, of a model that was not laid out here.
        EwqError: the model cannot be laid out.
    """
    if isinstance(source, Checkpoint):
        layout(source, find_toolchain(options.llama_cpp), progress)
    elif cached_layout(source.model.fingerprint, LLAMA_CPP_COMMIT) is None:
        raise InputError(
            "plan",
            source.model.name,
            "the file's header is not known from a scan, and a budget counts its bytes",
            "give the model in place of the scan, once",
        )


def _fast_plan(
    subject: ModelTensors, policy: FastEwqPolicy, budget: SizeTarget | None
) -> Plan:
    rows = rows_in_use()
    layers = layer_features(subject.tensors, subject.identity.n_layers)
    answers = select_layers(rows, list(layers.values()), policy.variant)
    told = policy.model_copy(
        update={
            "rows_sha256": rows_sha256(rows),
            "library": f"scikit-learn {version('scikit-learn')}",
        }
    )
    selected = [
        idx for idx, answer in zip(layers, answers, strict=True) if answer.quantise
    ]
    return make_fast_plan(subject, told, selected, budget=budget)


def measured(
    source: Checkpoint | Scan,
    policy: RulePolicy,
    *,
    options: Options | None = None,
    progress: Progress = SILENT,
) -> tuple[Scan, Layout | None]:
    """What a plan of this policy needs: the scan, and the layout where it is known."""
    options = options or Options()
    if isinstance(source, Scan):
        return source, cached_layout(source.model.fingerprint, LLAMA_CPP_COMMIT)
    try:
        laid_out = ask_layout(source, find_toolchain(options.llama_cpp), progress)
    except (ToolError, ChildError, InputError) as error:
        progress.note(f"{error}; the file's size is an estimate without its header")
        laid_out = None
    if laid_out is not None:
        check_loadable(source, laid_out)
    scanned = scan(source, policy_measures(policy), options=options, progress=progress)
    if laid_out is not None:
        check_layout(scanned, laid_out)
    return scanned, laid_out


def machine_budget(
    n_ctx: int, device: str = "auto", options: Options | None = None
) -> SizeTarget:
    """What this machine has free for a file and its context.

    Args:
        n_ctx: tokens of context.
        device: `auto`, `cpu`, or names of llama.cpp's devices.
        options: for the whole run.

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


def policy_measures(policy: Policy) -> Measures:
    """The measures a policy decides by."""
    if isinstance(policy, EwqPolicy):
        return Measures(epsilon=policy.epsilon, n_bins=policy.n_bins)
    return Measures()


def plan_file(plan: Plan) -> Path:
    """Where a plan is written by default: `plans/NAME.POLICY.json`."""
    return Path("plans") / f"{plan_name(plan)}.json"


def check_plan(
    plan: Plan, model: ModelIdentity, weights_sha256: str | None, *, force: bool = False
) -> None:
    """Refuse a plan that was made for another checkpoint, or for other weights of it.

    Args:
        plan: to be followed.
        model: that is there.
        weights_sha256: of its scan; None where the plan does not name any.
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
    found = (model.fingerprint, weights_sha256)
    for what, a, b in zip(("checkpoint", "weights"), planned, found, strict=True):
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
    planned, found = plan.model.chosen, model.chosen
    for name in sorted({*planned, *found}):
        if planned.get(name) == found.get(name):
            continue
        option = f"--{name.replace('_', '-')}"
        same = "give the same" if name in planned else f"leave {option} away"
        raise InputError(
            "plan",
            plan.model.name,
            f"the plan was made {_with_choice(option, planned.get(name))}, here is a "
            f"checkpoint {_with_choice(option, found.get(name))}",
            f"{same}, or plan again",
        )


def _with_choice(option: str, value: str | None) -> str:
    """Such as `with --pre qwen2`; a file by the begin of its SHA-256."""
    return f"without {option}" if value is None else f"with {option} {value[:12]}"


def check_weights(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    options: Options | None = None,
    progress: Progress = SILENT,
) -> None:
    """Refuse a plan of another checkpoint; where it names weights, they are scanned.

    Raises:
        InputError: files, headers or weights differ.
    """
    options, weights = options or Options(), None
    if plan.weights_sha256 is not None:
        measures = policy_measures(plan.policy)
        scanned = scan(checkpoint, measures, options=options, progress=progress)
        weights = scanned.weights_sha256
    check_plan(plan, checkpoint.identity, weights, force=options.force)


def check_layout(scan: Scan, layout: Layout) -> None:
    """The names, shapes and sources predicted from the headers are the converter's.

    The converter may add tensors that it computes (`rope_freqs`), nothing else.

    Raises:
        VerificationError: they are not; a plan would miss its tensors.
    """
    found = {
        tensor.name: (tensor.shape, {source.hf_name for source in tensor.sources})
        for tensor in layout.tensors
    }
    for tensor in scan.tensors:
        shape, sources = found.get(tensor.name, (None, set()))
        if shape != tensor.shape or not sources.issuperset(tensor.hf_names):
            raise VerificationError(
                "plan",
                tensor.name,
                f"predicted as {tensor.shape} of {', '.join(tensor.hf_names)}, the "
                f"converter writes {shape} of {sorted(sources)}",
                "report this checkpoint's config.json",
            )

"""Policy `optimal`: what is known of a model, and the contest that it leads to.

    error table x probed sensitivities + rounding -> predictor -> contest -> the plan

The text that files are measured on was written by the model, from other beginnings than
the text it is calibrated on.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import replace

from ewq_gguf import store
from ewq_gguf.bench.files import identify
from ewq_gguf.bench.runner import CPU_SETUP, Request
from ewq_gguf.bench.writing import written_text
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.errors import ToolError, UsageError
from ewq_gguf.ggml_types import tensor_bytes
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.optimal.activation_rounding import measured_rounding
from ewq_gguf.optimal.allocation import solve_allocation
from ewq_gguf.optimal.candidate_types import (
    candidate_types,
    candidate_types_within,
    fixed_bytes,
    floor_unmeasured,
    keeps_bounds,
    min_file_bytes,
    quantizable,
)
from ewq_gguf.optimal.candidates import Contest, written_types
from ewq_gguf.optimal.cost_model import Costs, measured_costs
from ewq_gguf.optimal.error_table import error_table
from ewq_gguf.optimal.latency_target import measure_latency_target
from ewq_gguf.optimal.measuring import Measuring, device_for
from ewq_gguf.optimal.predictor import Predictor
from ewq_gguf.optimal.prober import check_room
from ewq_gguf.optimal.probes import PROBE_TYPE, Prober
from ewq_gguf.plan.assemble import assemble
from ewq_gguf.plan.lattice import without_loss
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.plan.size_target import SizeLimit, SizeTarget
from ewq_gguf.plan.sizes import padded
from ewq_gguf.records import Budget, OptimalPolicy, Plan, Search, load_cached
from ewq_gguf.stages.candidate_files import types_sha256
from ewq_gguf.stages.converting import base_file
from ewq_gguf.stages.presets import all_preset_plans
from ewq_gguf.stages.run import Run
from ewq_gguf.tensor_names import nearest_name, role

#: Documents that the model writes to be measured on: few windows, and many.
_N_FEW_DOCUMENTS, _N_MANY_DOCUMENTS = 32, 64
#: Of texts that files are chosen on: no other text has these, so that none of them
#: calibrates anything.
_SEEDS = 1 << 40
#: Another one finds other files: what was searched for is searched for again.
_ALGORITHM = 4
#: What is said of a size that no file has.
_REACH, _OTHER = "these types reach", "other --types, --floor or --ceiling"
#: Of the effort, what probes may take at most, and before them the files that show what
#: rounding activations costs.
_PROBE_SHARE, _ROUNDING_SHARE = 0.5, 0.2


def search(
    run: Run,
    subject: ModelTensors,
    policy: OptimalPolicy,
    ask: SizeTarget,
    rivals: Mapping[str, Plan],
) -> Plan:
    """The best file that can be found within a budget, as a plan that tells how.

    Args:
        run: the model and the options, with the same importance matrix.
        subject: what is planned, with the importance matrix.
        policy: with every parameter.
        ask: what the file may take.
        rivals: plans that it has to beat, by name; every preset, with the matrix and
            without, is one too. None that is larger, or has types that the policy
            excludes, can win.

    Raises:
        InputError: the budget cannot be met.
        EwqError: of the stage that failed, with what to do.
    """
    toolchain = _built_toolchain(run)
    base = base_file(run)
    menu = candidate_types(subject, policy)
    limit = _limit(subject, ask, menu)
    if not policy.min_tps:  # what has to be fast may have to be far smaller
        menu = candidate_types_within(subject, policy, limit.n_bytes)
    setup = CPU_SETUP.model_copy(
        update={
            "n_threads": run.options.n_threads,
            "device": device_for(base, toolchain),
        }
    )

    def request(seed: int, n_documents: int) -> Request:
        text = written_text(
            base,
            setup,
            lambda: run.progress.measure(f"text by {run.identity.name}"),
            n_documents=n_documents,
            seed=_SEEDS + seed,
        )
        return Request(
            tasks=("perplexity", "kld"),
            base=base,
            texts=(("own", text),),
            setup=setup,
            n_ctx=read_gguf(base).window(Request.n_ctx),
        )

    presets = all_preset_plans(run, raw_type=subject.raw_type)
    all_rivals = {**presets, **rivals}
    # What was searched for once is known: the same command makes the same file.
    depends_on = (
        _ALGORITHM,
        identify(base).sha256,
        toolchain.key,
        LLAMA_CPP_COMMIT,
        setup.model_dump_json(),
        platform.node() if policy.min_tps else None,
        subject.identity.model_dump_json(),
        subject.raw_type,
        str(limit),
        policy.model_dump_json(),
        *sorted(types_sha256(plan) for plan in all_rivals.values()),
    )
    path = store.cache_dir("searches") / f"{store.sha256_text(repr(depends_on))}.json"
    with store.locked(path, stage="plan", wait=True):
        known = load_cached(Plan, path, "plan")
        if known is None:
            check_room(base)
            few = request(2 * policy.seed, _N_FEW_DOCUMENTS)
            many = request(2 * policy.seed + 1, _N_MANY_DOCUMENTS)
            measuring = Measuring(few, many, toolchain, run.options, run.progress)
            known = _searched(subject, policy, limit, menu, all_rivals, measuring)
            store.write_text(path, known.to_json(), stage="plan", force=True)
    return known


def check_search(
    run: Run, subject: ModelTensors, policy: OptimalPolicy, ask: SizeTarget
) -> None:
    """Refuse early what cannot be searched for: before texts are written.

    Args:
        run: the model and the options.
        subject: what is planned; its matrix may be missing still.
        policy: with every parameter.
        ask: what the file may take.

    Raises:
        InputError: the budget cannot be met.
        ToolError: the llama.cpp has no libraries.
        UsageError: a bound names a role that the model does not have.
    """
    _built_toolchain(run)
    menu = candidate_types(subject, policy, has_entries=True)
    _check_roles(policy, menu)
    _limit(subject, ask, menu)


def _built_toolchain(run: Run) -> Toolchain:
    toolchain = run.toolchain
    if toolchain.lib_dir is None:
        raise ToolError(
            "plan",
            "--policy optimal",
            "needs the libraries of a llama.cpp that ewq built",
            "leave --llama-cpp and EWQ_LLAMA_CPP out, or plan with another policy",
        )
    return toolchain


def _most_bytes(subject: ModelTensors) -> int:
    """Of the whole file, nothing quantised."""
    return fixed_bytes(subject) + sum(
        padded(tensor_bytes(subject.raw_type, tensor.shape))
        for tensor in quantizable(subject)
    )


def _limit(
    subject: ModelTensors, ask: SizeTarget, menu: Mapping[str, tuple[str, ...]]
) -> SizeLimit:
    """The bytes that may be used: no more than nothing quantised takes.

    Raises:
        InputError: the types do not reach so far down, or up.
    """
    most = _most_bytes(subject)
    limit = ask.limit(most, subject.tensors)
    limit.check_reached(min_file_bytes(subject, menu), most, _REACH, _OTHER)
    return replace(limit, n_bytes=min(limit.n_bytes, most))


def _check_roles(policy: OptimalPolicy, menu: Mapping[str, object]) -> None:
    """Refuse bounds of what the model does not have.

    Raises:
        UsageError: naming the role.
    """
    roles = {role(name) for name in menu}
    for option, named in (("--floor", policy.floors), ("--ceiling", policy.ceilings)):
        for unknown in named.keys() - roles - {"*"}:
            raise UsageError(
                "plan",
                option,
                f"there is no role {unknown!r} that is quantised",
                f"did you mean {nearest_name(unknown, roles)}?",
            )


def _searched(
    subject: ModelTensors,
    policy: OptimalPolicy,
    limit: SizeLimit,
    menu: Mapping[str, tuple[str, ...]],
    rivals: Mapping[str, Plan],
    measuring: Measuring,
) -> Plan:
    base, lib_dir = measuring.request.base, measuring.toolchain.lib_dir
    assert base is not None
    assert lib_dir is not None  # checked before
    started, effort = time.monotonic(), policy.effort_minutes * 60
    # What rivals are made of has to be predicted too.
    tried = {name: {*types} for name, types in menu.items()}
    for plan in rivals.values():
        for name, ggml_type in written_types(plan).items():
            tried[name].add(ggml_type)
    for tensor in quantizable(subject):
        if tensor.shape[-1] % 32 == 0:
            tried[tensor.name].add(PROBE_TYPE)
    errors = error_table(
        base,
        {name: sorted(types) for name, types in tried.items()},
        lib_dir,
        options=measuring.options,
        progress=measuring.progress,
    )
    latency_target = (
        measure_latency_target(
            subject,
            menu,
            policy.min_tps,
            measuring.request,
            measuring.toolchain,
            options=measuring.options,
            progress=measuring.progress,
        )
        if policy.min_tps
        else None
    )

    prober = Prober.of(
        measuring.request,
        lib_dir,
        options=measuring.options,
        progress=measuring.progress,
    )
    rounding = measured_rounding(
        prober, measuring.toolchain, subject, tried, _ROUNDING_SHARE * effort
    )

    def choose(costs: Costs) -> Mapping[str, str]:
        costs = without_loss(costs, subject.lattices)
        now = Predictor(costs, rounding=rounding).costs_now()
        allowed = {n: {k: now[n][k] for k in types} for n, types in menu.items()}
        return solve_allocation(subject, allowed, limit.n_bytes, latency_target) or {}

    costs = measured_costs(prober, errors, choose, _PROBE_SHARE * effort)
    costs = without_loss(costs, subject.lattices)
    contest = Contest(
        subject=subject,
        limit=limit,
        menu=floor_unmeasured(subject, menu, costs, limit.n_bytes),
        measuring=measuring,
        predictor=Predictor(costs, rounding=rounding),
        deadline=started + effort,
        make=lambda types: _plan(subject, policy, limit, types),
        allows=lambda types: keeps_bounds(policy, types, subject.raw_type),
        min_tps=policy.min_tps or 0.0,
        latency_target=latency_target,
    )
    chosen, files = contest.run(rivals)
    record = Search(
        text_sha256=measuring.final.parameters().texts[0].sha256,
        n_few=contest.n_few,
        n_many=contest.n_many,
        probe_type=PROBE_TYPE,
        n_probes=prober.n_probes,
        floor_nats=contest.predictor.floor(written_types(chosen)),
        prediction_error=contest.prediction_error,
        n_left_out=contest.n_left_out,
        files=files,
        chosen=files[0].name,
    )
    own = subject if chosen.imatrix else replace(subject, importance=None)
    plan = _plan(own, policy, limit, {t.name: t.ggml_type for t in chosen.tensors})
    return plan.model_copy(update={"search": record})


def _plan(
    subject: ModelTensors,
    policy: OptimalPolicy,
    limit: SizeLimit,
    types: Mapping[str, str],
) -> Plan:
    budget = Budget(
        asked=limit.asked,
        limit_bytes=limit.n_bytes,
        n_ctx=limit.n_ctx,
        context_bytes=limit.context_bytes,
    )
    return assemble(subject, policy, types, budget=budget)

"""Policy `optimal`: the search for the best file of a size.

    error table, probes, rounding -> costs -> predictor -> proposals, measured -> plan

The texts that files are measured on are written by the model, from other beginnings
than the text that it is calibrated on.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import astuple, replace
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.bench.files import identify
from ewq_gguf.bench.runner import CPU_SETUP, Request
from ewq_gguf.bench.writing import written_text
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.errors import ToolError
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.optimal import settings as defaults
from ewq_gguf.optimal.candidate_selection import CandidateSelection
from ewq_gguf.optimal.cost_measurement import measure_costs
from ewq_gguf.optimal.file_measurer import FileMeasurer, measuring_device
from ewq_gguf.optimal.search_space import SearchSpace, quantizable_types
from ewq_gguf.optimal.settings import SearchSettings
from ewq_gguf.optimal.type_prober import check_disk_space
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.plan.size_target import SizeTarget
from ewq_gguf.records import OptimalPolicy, Plan, Search, load_cached
from ewq_gguf.stages.candidate_files import types_sha256
from ewq_gguf.stages.converting import base_file
from ewq_gguf.stages.options import Progress
from ewq_gguf.stages.presets import all_preset_plans
from ewq_gguf.stages.run import Run

#: First seed of texts that files are chosen on; no calibration text has such a seed.
_FIRST_SEED = 1 << 40
#: Version of the algorithm: results of another version in the cache are not used.
_ALGORITHM = 4


def search(
    run: Run,
    model: ModelTensors,
    policy: OptimalPolicy,
    target: SizeTarget,
    baselines: Mapping[str, Plan],
    *,
    settings: SearchSettings | None = None,
) -> Plan:
    """Find the best file of a size; the plan holds a record of the search.

    The same search is not made twice: its plan stays in the cache.

    Args:
        run: model and options, with the same importance matrix.
        model: model's tensors, with the importance matrix.
        policy: parameters of the policy.
        target: size that the user asks for.
        baselines: plans to compare with, by name; every preset, with the matrix and
            without, is one too. None that is larger, or has types that the policy
            excludes, can win.
        settings: constants of the search; None for the defaults.

    Raises:
        InputError: no file is of that size.
        EwqError: a stage failed.
    """
    settings = settings or defaults.DEFAULT
    toolchain = _built_toolchain(run)
    base = base_file(run)
    space = SearchSpace.of(model, policy, target, settings)
    device = measuring_device(base, toolchain, settings)
    setup = CPU_SETUP.model_copy(
        update={"n_threads": run.options.n_threads, "device": device}
    )
    request = Request(
        tasks=("perplexity", "kld"),
        base=base,
        setup=setup,
        n_ctx=read_gguf(base).window(Request.n_ctx),
    )
    baselines = {**all_preset_plans(run, raw_type=model.raw_type), **baselines}
    path = _cached_plan(space, request, toolchain, baselines, settings)
    with store.locked(path, stage="plan", wait=True):
        plan = load_cached(Plan, path, "plan")
        if plan is None:
            check_disk_space(base)
            requests = _requests(
                request, run.identity.name, policy.seed, settings, run.progress
            )
            measurer = FileMeasurer(
                *requests, toolchain, run.options, run.progress, settings
            )
            plan = _best_plan(space, baselines, measurer, settings)
            store.write_text(path, plan.to_json(), stage="plan", force=True)
    return plan


def check_search(
    run: Run, model: ModelTensors, policy: OptimalPolicy, target: SizeTarget
) -> None:
    """Refuse a search that cannot succeed before texts are written.

    Args:
        run: model and options.
        model: model's tensors; the matrix may be missing still.
        policy: parameters of the policy.
        target: size that the user asks for.

    Raises:
        InputError: no file is of that size.
        ToolError: the llama.cpp has no libraries.
        UsageError: a bound names a role that the model does not have.
    """
    _built_toolchain(run)
    SearchSpace.of(model, policy, target, defaults.DEFAULT, has_entries=True)


def _built_toolchain(run: Run) -> Toolchain:
    """The toolchain, with the libraries of ggml's quantisers."""
    toolchain = run.toolchain
    if toolchain.lib_dir is None:
        raise ToolError(
            "plan",
            "--policy optimal",
            "needs the libraries of a llama.cpp that ewq built",
            "leave --llama-cpp and EWQ_LLAMA_CPP out, or plan with another policy",
        )
    return toolchain


def _requests(
    request: Request, name: str, seed: int, settings: SearchSettings, progress: Progress
) -> tuple[Request, Request]:
    """The request with the search text, and with the final one.

    Args:
        request: base, and how it is loaded.
        name: model's name, for the progress.
        seed: seed of the policy; each has two texts of its own.
        settings: constants of the search.
        progress: receiver of the share done.
    """
    base = request.base
    assert base is not None

    def with_text(seed: int, n_documents: int) -> Request:
        text = written_text(
            base,
            request.setup,
            lambda: progress.measure(f"text by {name}"),
            n_documents=n_documents,
            seed=_FIRST_SEED + seed,
        )
        return replace(request, texts=(("own", text),))

    return (
        with_text(2 * seed, settings.n_search_documents),
        with_text(2 * seed + 1, settings.n_final_documents),
    )


def _cached_plan(
    space: SearchSpace,
    request: Request,
    toolchain: Toolchain,
    baselines: Mapping[str, Plan],
    settings: SearchSettings,
) -> Path:
    """Path of the plan that the search finds, by everything that it depends on."""
    assert request.base is not None
    model, policy = space.model, space.policy
    depends_on = (
        _ALGORITHM,
        identify(request.base).sha256,
        toolchain.key,
        LLAMA_CPP_COMMIT,
        request.setup.model_dump_json(),
        platform.node() if policy.min_tps else None,
        model.identity.model_dump_json(),
        model.raw_type,
        astuple(space.limit),
        policy.model_dump_json(),
        *sorted(types_sha256(plan) for plan in baselines.values()),
        *([] if settings == SearchSettings() else [settings]),
    )
    return store.cache_dir("searches") / f"{store.sha256_text(repr(depends_on))}.json"


def _best_plan(
    space: SearchSpace,
    baselines: Mapping[str, Plan],
    measurer: FileMeasurer,
    settings: SearchSettings,
) -> Plan:
    """Measure the costs of types, propose files, and choose the best one."""
    seconds = space.policy.effort_minutes * 60
    deadline = time.monotonic() + seconds
    costs = measure_costs(space, baselines, measurer, seconds, settings)
    selection = CandidateSelection(
        costs.space, measurer, costs.predictor, deadline, settings
    )
    candidates = selection.run(baselines)
    best = candidates[0]
    record = Search(
        text_sha256=measurer.final.parameters().texts[0].sha256,
        n_few=selection.n_search_windows,
        n_many=selection.n_final_windows,
        probe_type=settings.probe_type,
        n_probes=costs.n_probes,
        floor_nats=selection.predictor.floor(quantizable_types(best.plan)),
        prediction_error=selection.prediction_error,
        n_left_out=selection.n_left_out,
        files=tuple(candidate.record(best) for candidate in candidates),
        chosen=best.name,
    )
    types = {tensor.name: tensor.ggml_type for tensor in best.plan.tensors}
    plan = space.plan(types, has_imatrix=best.plan.imatrix is not None)
    return plan.model_copy(update={"search": record})

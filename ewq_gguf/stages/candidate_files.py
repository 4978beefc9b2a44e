"""Files that are made in the cache, measured against the base, and removed.

Each result is kept by the tensors' types and everything else that it depends on: a
run that was killed goes on where it was, and no file is measured twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.bench.children import OnProgress
from ewq_gguf.bench.files import identify
from ewq_gguf.bench.job import MemoryUse
from ewq_gguf.bench.reference_run import cached_reference
from ewq_gguf.bench.runner import Request, bench_file
from ewq_gguf.errors import ChildError, ResourceError, VerificationError
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.llamacpp.quantize import quantize
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.records import Plan, Result, StudyPart, open_journal, read_journal
from ewq_gguf.stages.options import Options, Progress

STAGE = "study"
#: A speed test that tells types apart and takes seconds.
_N_PROMPT, _N_GENERATED = 32, 64


def measure_plans(
    plans: Sequence[Plan],
    request: Request,
    toolchain: Toolchain,
    *,
    options: Options,
    progress: Progress,
    may_fail: bool = False,
    on_seconds: Callable[[float], None] = lambda seconds: None,
) -> dict[str, StudyPart]:
    """Measure the file of every plan: perplexity, and divergence from the base.

    Args:
        plans: plans of the base's model.
        request: one text, how it is cut, and the base.
        toolchain: llama.cpp that quantises.
        options: settings of the run; its matrix is that of the plans that have one.
        progress: receiver of notes and of the share done.
        may_fail: a file that cannot be made or whose logits are no numbers is left out
            with a note, in place of raising.
        on_seconds: receiver of the time that each file took to make and measure; the
            base's reference is not part of it.

    Returns:
        Results by `types_sha256`, with those of earlier runs.

    Raises:
        EwqError: a file could not be made, or not be measured.
    """
    base = request.base
    assert base is not None
    journal = _journal(request, toolchain)
    with store.locked(journal, stage=STAGE, wait=True):
        parts = read_journal(journal, StudyPart)
        todo = {types_sha256(plan): plan for plan in plans}
        todo = {name: plan for name, plan in todo.items() if name not in parts}
        if len(todo) < len(plans):
            n_known = len(plans) - len(todo)
            progress.note(f"{n_known} of {len(plans)} files need no measuring")
        if not todo:
            return parts
        reference = cached_reference(
            base, request, lambda: progress.measure(f"reference {base.name}")
        )
        request = replace(request, reference=reference)

        def bench(plan: Plan, on_progress: OnProgress) -> Result:
            return _bench_plan(plan, request, journal, toolchain, options, on_progress)

        with open_journal(journal) as keep:
            for name, result in _results(todo, bench, progress, may_fail, on_seconds):
                part = StudyPart(
                    name=name, engine=result.engine, quality=result.texts[0]
                )
                keep(part)
                parts[name] = part
    return parts


def _results(
    plans: Mapping[str, Plan],
    bench: Callable[[Plan, OnProgress], Result],
    progress: Progress,
    may_fail: bool,
    on_seconds: Callable[[float], None],
) -> Iterator[tuple[str, Result]]:
    """Results of plans' files by the plans' names, as `measure_plans` keeps them."""
    with progress.stage(f"measure {len(plans)} files") as tell:
        for i, (name, plan) in enumerate(plans.items()):
            started = time.monotonic()
            try:
                result = bench(plan, _share_of(tell, i, len(plans)))
            except (ChildError, VerificationError) as error:
                if not may_fail:
                    raise
                progress.note(f"a file is left out: {error}")
                continue
            on_seconds(time.monotonic() - started)
            yield name, result


def time_plans(
    plans: Sequence[Plan],
    request: Request,
    toolchain: Toolchain,
    *,
    options: Options,
    progress: Progress,
) -> list[float]:
    """Measure how many tokens per second the file of every plan generates, now.

    On the devices there are, wherever quality is measured: the base may be too large
    for them. No speed is kept: it differs from day to day.

    Args:
        plans: plans of the base's model.
        request: how models are loaded, and the base.
        toolchain: llama.cpp that quantises.
        options: settings of the run, as of `measure_plans`.
        progress: receiver of notes and of the share done.

    Returns:
        Tokens per second of each plan; 0 where a file cannot be made or does not fit
        the devices, which a note says.

    Raises:
        EwqError: the cache cannot be written.
    """
    request = replace(
        request,
        tasks=("speed",),
        texts=(),
        n_prompt=_N_PROMPT,
        n_generated=_N_GENERATED,
        setup=request.setup.model_copy(update={"device": "auto"}),
    )
    place = store.cache_dir("studies") / "speed"
    speeds = []
    with (
        store.locked(place, stage=STAGE, wait=True),
        progress.stage(f"time {len(plans)} files") as tell,
    ):
        for i, plan in enumerate(plans):
            share = _share_of(tell, i, len(plans))
            try:
                result = _bench_plan(plan, request, place, toolchain, options, share)
            except (ChildError, ResourceError, VerificationError) as error:
                progress.note(f"a file is not timed: {error}")
                speeds.append(0.0)
                continue
            assert result.speed is not None
            speeds.append(result.speed.generation_tps)
    return speeds


def _journal(request: Request, toolchain: Toolchain) -> Path:
    """Path of the results of files that are measured alike."""
    assert request.base is not None
    parameters = request.parameters().model_dump_json()
    base_sha256 = identify(request.base).sha256
    key = store.cache_key(base_sha256, toolchain.key, LLAMA_CPP_COMMIT, parameters)
    return store.cache_dir("studies") / f"{key}.journal"


def _share_of(tell: Callable[[float], None], i: int, n_files: int) -> OnProgress:
    """Receiver of the share done of file `i`, which tells that of all files."""

    def of_file(share: float, _use: MemoryUse) -> None:
        tell((i + share) / n_files)

    return of_file


def _bench_plan(
    plan: Plan,
    request: Request,
    place: Path,
    toolchain: Toolchain,
    options: Options,
    on_progress: OnProgress,
) -> Result:
    """Make a plan's file in a work folder beside `place`, measure and remove it."""
    assert request.base is not None
    with store.work_dir(place, stage=STAGE) as folder:
        file = folder / "study.gguf"
        quantize(
            plan,
            request.base,
            file,
            toolchain,
            n_threads=options.n_threads,
            load=False,  # it is loaded to be measured
            imatrix=options.imatrix if plan.imatrix else None,
        )
        return bench_file(file, request, on_progress)


def types_sha256(plan: Plan) -> str:
    """Hash of everything that a file's numbers depend on, besides its base."""
    types = [(tensor.name, tensor.written_type) for tensor in plan.tensors]
    imatrix = plan.imatrix and plan.imatrix.file_sha256
    exact = [tensor.name for tensor in plan.tensors if tensor.is_exact]
    return store.sha256_text(repr((imatrix, types, *([exact] if exact else []))))

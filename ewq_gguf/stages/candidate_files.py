"""Files that are made in the cache, measured against the base, and removed.

What was measured is remembered by the tensors' types and everything else it depends on:
a run that was killed goes on where it was, and no file is measured twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.bench.files import identify
from ewq_gguf.bench.job import MemoryUse
from ewq_gguf.bench.reference_run import cached_reference
from ewq_gguf.bench.runner import Request, bench_file
from ewq_gguf.errors import ChildError, ResourceError, VerificationError
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.llamacpp.quantize import quantize
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.records import Plan, StudyPart, open_journal, read_journal
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
) -> dict[str, StudyPart]:
    """What the file of every plan is worth.

    Args:
        plans: of the base's model.
        request: one text, how it is cut, and the base.
        toolchain: that quantises.
        options: for the whole run; its matrix is that of the plans that have one.
        progress: who is told.
        may_fail: a file that cannot be made or whose logits are no numbers is left out
            and told, in place of raising.

    Returns:
        By `types_sha256`; what earlier runs measured likewise is among them.

    Raises:
        EwqError: of the stage that failed, with what to do.
    """
    base = request.base
    assert base is not None
    asked = request.parameters().model_dump_json()
    made_by = f"{toolchain.key} {LLAMA_CPP_COMMIT}"
    key = store.sha256_text(f"{identify(base).sha256} {made_by} {asked}")
    journal = store.cache_dir("studies") / f"{key}.journal"
    with store.locked(journal, stage=STAGE, wait=True):
        parts = read_journal(journal, StudyPart)
        todo = {types_sha256(made): made for made in plans}
        todo = {name: made for name, made in todo.items() if name not in parts}
        if len(todo) < len(plans):
            n_known = len(plans) - len(todo)
            progress.note(f"{n_known} of {len(plans)} files need no measuring")
        if not todo:
            return parts
        reference = cached_reference(
            base, request, lambda: progress.measure(f"reference {base.name}")
        )
        request = replace(request, reference=reference)
        with (
            open_journal(journal) as keep,
            progress.stage(f"measure {len(todo)} files") as tell,
        ):
            for i, (name, made) in enumerate(todo.items()):

                def of_file(share: float, _use: MemoryUse, i: int = i) -> None:
                    tell((i + share) / len(todo))

                try:
                    with _file(made, base, journal, toolchain, options) as file:
                        result = bench_file(file, request, of_file)
                except (ChildError, VerificationError) as error:
                    if not may_fail:
                        raise
                    progress.note(f"a file is left out: {error}")
                    continue
                part = StudyPart(
                    name=name, engine=result.engine, quality=result.texts[0]
                )
                keep(part)
                parts[name] = part
    return parts


def time_plans(
    plans: Sequence[Plan],
    request: Request,
    toolchain: Toolchain,
    *,
    options: Options,
    progress: Progress,
) -> list[float]:
    """How many tokens per second the file of every plan generates, now.

    On the devices there are, wherever quality is measured: the base may be too large
    for them. Nothing is remembered: speeds differ from day to day.

    Args:
        plans: of the base's model.
        request: how models are loaded, and the base.
        toolchain: that quantises.
        options: as of `measure_plans`.
        progress: who is told.

    Returns:
        Of each plan; 0 where a file cannot be made or has no room on the devices, which
        is told.

    Raises:
        EwqError: of the stage that failed, with what to do.
    """
    base = request.base
    assert base is not None
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
        for i, made in enumerate(plans):

            def of_file(share: float, _use: MemoryUse, i: int = i) -> None:
                tell((i + share) / len(plans))

            try:
                with _file(made, base, place, toolchain, options) as file:
                    speed = bench_file(file, request, of_file).speed
            except (ChildError, ResourceError, VerificationError) as error:
                progress.note(f"a file is not timed: {error}")
                speeds.append(0.0)
                continue
            assert speed is not None
            speeds.append(speed.generation_tps)
    return speeds


@contextmanager
def _file(
    plan: Plan, base: Path, journal: Path, toolchain: Toolchain, options: Options
) -> Iterator[Path]:
    """A plan's file, until the block ends; nobody will look for it again."""
    with store.work_dir(journal, stage=STAGE) as folder:
        file = folder / "study.gguf"
        quantize(
            plan,
            base,
            file,
            toolchain,
            n_threads=options.n_threads,
            load=False,  # it is loaded to be measured
            imatrix=options.imatrix if plan.imatrix else None,
        )
        yield file


def types_sha256(plan: Plan) -> str:
    """What a file's numbers depend on, besides its base."""
    types = [(tensor.name, tensor.written_type) for tensor in plan.tensors]
    imatrix = plan.imatrix and plan.imatrix.file_sha256
    exact = [tensor.name for tensor in plan.tensors if tensor.is_exact]
    return store.sha256_text(repr((imatrix, types, *([exact] if exact else []))))

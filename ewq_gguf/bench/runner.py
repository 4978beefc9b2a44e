"""One file's Result: children that measure, a journal of what they finished.

A child that crashes costs the part it was at; the next run goes on after the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ewq_gguf import store
from ewq_gguf.bench.children import OnProgress, run_job
from ewq_gguf.bench.engines.precision import AppliedPlan, engine_key
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.files import identify, identify_base
from ewq_gguf.bench.job import (
    Job,
)
from ewq_gguf.bench.task import Settings, Task, merge
from ewq_gguf.bench.tasks import all_tasks, tasks_of
from ewq_gguf.errors import (
    InputError,
    UsageError,
)
from ewq_gguf.llamacpp.verify import check_bindings
from ewq_gguf.process import (
    N_CPUS,
    stall_seconds,
)
from ewq_gguf.records import (
    BenchedFile,
    BenchParameters,
    BenchSetup,
    Result,
    RunPart,
    read_journal,
)

#: Types of a KV cache that llama.cpp takes (common/arg.cpp, kv_cache_types).
CACHE_TYPES = (
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1",
)  # fmt: skip

CPU_SETUP = BenchSetup(
    device="cpu",
    n_gpu_layers=None,
    tensor_split=(),
    rpc=(),
    n_threads=N_CPUS,
    cache_type_k="f16",
    cache_type_v="f16",
)


@dataclass(frozen=True)
class Request:
    """Everything that is measured of each file, and how.

    Attributes:
        tasks: any of them.
        base: model to compare with, for `kld` and `generation`; ignored without them.
        reference: the base's reference file, so that it need not run for `kld`.
        texts: files by the names they are reported under.
        setup: how models are loaded.
        n_ctx: tokens of a window.
        n_chunks: windows of each text, at most.
        is_lines: each line is a document.
        n_prompt: tokens of the speed test's prompt.
        n_generated: tokens of its answer.
        n_repeats: repeats of the speed test.
        settings: data of tasks, by their names.
        plan: precisions that bitsandbytes applies to a checkpoint; None without one.
    """

    tasks: tuple[str, ...]
    base: Path | None = None
    reference: Path | None = None
    texts: tuple[tuple[str, Path], ...] = ()
    setup: BenchSetup = CPU_SETUP
    n_ctx: int = 512
    n_chunks: int | None = None
    is_lines: bool = False
    n_prompt: int = 512
    n_generated: int = 128
    n_repeats: int = 5
    settings: Mapping[str, Settings] = field(default_factory=dict)
    plan: AppliedPlan | None = None

    @property
    def compared_base(self) -> Path | None:
        """The base, where a task compares with it."""
        names = {name for task in all_tasks() for name in task.compared}
        return None if names.isdisjoint(self.tasks) else self.base

    def check_base(self) -> None:
        """Refuse a divergence from nothing.

        Raises:
            UsageError: `kld` is asked for and there is no base.
        """
        if "kld" in self.tasks and self.base is None:
            raise UsageError(
                STAGE, "kld", "has no base to compare with", "name it with --base"
            )

    def parameters(self) -> BenchParameters:
        """The same, as results keep it: hashes instead of paths.

        Raises:
            UsageError: a task lacks what it needs.
            InputError: a text cannot be read.
        """
        self.check_base()
        if not self.tasks:
            raise UsageError(STAGE, "--tasks", "is empty", "name at least one task")
        if len({name for name, _ in self.texts}) < len(self.texts):
            raise UsageError(
                STAGE, "--text", "two texts have one name", "name each once"
            )
        fields: dict[str, Any] = {
            "tasks": self.tasks,
            "setup": self.setup,
            "texts": (),
            "n_ctx": self.n_ctx,
            "n_chunks": self.n_chunks,
            "is_lines": self.is_lines,
            "n_prompt": self.n_prompt,
            "n_generated": self.n_generated,
            "n_repeats": self.n_repeats,
            "plan_sha256": self.plan.sha256 if self.plan else None,
        }
        for task in tasks_of(self.tasks):
            merge(fields, task.parameters(self))
        return BenchParameters(**fields)

    def settings_parameters(self, name: str) -> dict[str, object] | None:
        """`Settings.parameters` of a task, read once however many files are measured.

        Args:
            name: the task's.

        Returns:
            None where the task has no settings.
        """
        if name in self.settings and name not in self._parameters:
            self._parameters[name] = self.settings[name].parameters()
        return self._parameters.get(name)

    @cached_property
    def _parameters(self) -> dict[str, dict[str, object]]:
        return {}


def bench_file(path: Path, request: Request, on_progress: OnProgress) -> Result:
    """Measure a file.

    Args:
        path: the GGUF file, or the first part of a split one; or a checkpoint's folder.
        request: tasks and their data.
        on_progress: told how far it is.

    Raises:
        ToolError: a library is missing, or the device asked for is.
        InputError: a file is missing, or a text or base does not fit.
        VerificationError: a file is no sound GGUF, or computes NaN.
        ChildError: a child crashed; what it had finished is kept.
        ResourceError: memory ran out.
    """
    check_bindings(STAGE)
    stall_seconds(STAGE)  # a wrong one is said before anything is read
    parameters = request.parameters()
    file = identify(path, request.plan)
    base = _base(request, parameters)
    engines = " ".join(engine_key(one) for one in (path, request.base) if one)
    journal = _journal(engines, file, base, parameters)
    tasks = tasks_of(parameters.tasks)
    with store.locked(journal, stage=STAGE):
        for i, task in enumerate(tasks):
            if task.name not in read_journal(journal, RunPart):
                job = _job(task, path, request, base, parameters, journal)
                run_job(job, _share_of(on_progress, i, len(tasks)))
        result = _result(file, base, parameters, journal)
        # The next run of the same measures anew: speeds differ from day to day.
        journal.unlink()
    return result


def _result(
    file: BenchedFile,
    base: BenchedFile | None,
    parameters: BenchParameters,
    journal: Path,
) -> Result:
    """Everything that the finished children of a journal measured."""
    runs = read_journal(journal, RunPart)
    engine = next(iter(runs.values())).engine
    result = Result(
        file=file,
        base=base,
        parameters=parameters,
        engine=engine,
        size_bytes=engine.weights_bytes or file.size_bytes,
    )
    fields = result.model_dump(mode="json")
    for run_part in runs.values():
        merge(fields, run_part.fields)
    return Result.model_validate_json(json.dumps(fields))


def is_result_of(result: Result, path: Path, request: Request) -> bool:
    """Whether a result answers a request about a file, as it is now.

    Raises:
        InputError, VerificationError: the file or its base is not sound.
    """
    parameters = request.parameters()
    base = _base(request, parameters)
    return (
        result.file.sha256 == identify(path, request.plan).sha256
        and (result.base and result.base.sha256) == (base and base.sha256)
        and result.parameters == parameters
        and result.engine.key == engine_key(path)
    )


def _base(request: Request, parameters: BenchParameters) -> BenchedFile | None:
    path = request.compared_base
    if path is None:
        return None
    base = identify_base(path, parameters)
    if request.reference is not None and "kld" in parameters.tasks:
        model = identify_base(request.reference, parameters).reference_of
        if model != base.sha256:
            raise InputError(
                STAGE, request.reference, f"is not of {path}", "make it anew"
            )
    return base


def _journal(
    engines: str,
    file: BenchedFile,
    base: BenchedFile | None,
    parameters: BenchParameters,
) -> Path:
    """Where finished parts are kept, by everything they depend on."""
    hashes = f"{file.sha256} {base and base.sha256} {engines}"
    key = store.cache_key(hashes, parameters.model_dump_json())
    return store.cache_dir("bench") / f"{key}.journal"


def _job(
    task: Task,
    path: Path,
    request: Request,
    base: BenchedFile | None,
    parameters: BenchParameters,
    journal: Path,
) -> Job:
    settings = request.settings.get(task.name)
    fields: dict[str, Any] = {
        "part": task.name,
        "model": str(path.absolute()),
        "precisions": dict(request.plan.precisions) if request.plan else {},
        "texts": tuple(str(text.absolute()) for _, text in request.texts),
        "settings": settings.model_dump(mode="json") if settings else None,
        "parameters": parameters,
        "journal": str(journal),
        "failure": str(journal.with_suffix(".failure")),
    }
    return Job(**(fields | task.job_fields(request, base, parameters)))


def _share_of(on_progress: OnProgress, index: int, count: int) -> OnProgress:
    return lambda share, use: on_progress((index + share) / count, use)

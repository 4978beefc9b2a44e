"""Child process: load a model, do one job, write each finished part to a journal.

python -m ewq_gguf.bench.child JOB
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from ewq_gguf.bench.engines.llama import LlamaModel
from ewq_gguf.bench.engines.llama_log import Log
from ewq_gguf.bench.engines.load import load
from ewq_gguf.bench.engines.nvml import gpu_bytes
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.job import (
    Failure,
    Job,
    ProbingRequest,
    ReferenceRequest,
    WritingRequest,
    progress_line,
)
from ewq_gguf.bench.reference import ReferenceModel
from ewq_gguf.bench.reference_writing import write_reference
from ewq_gguf.bench.task import TaskRun
from ewq_gguf.bench.tasks import all_tasks
from ewq_gguf.bench.tasks.text import windows_of
from ewq_gguf.bench.texts.quality import (
    Named,
    score_text,
)
from ewq_gguf.bench.texts.self_text import self_text
from ewq_gguf.bench.texts.summary import text_result
from ewq_gguf.bench.texts.windows import Windows
from ewq_gguf.errors import EwqError, VerificationError, printable
from ewq_gguf.llamacpp.ggml import Ggml
from ewq_gguf.llamacpp.imatrix import importance_values
from ewq_gguf.llamacpp.perturb import PerturbedCopy
from ewq_gguf.process import stall_seconds
from ewq_gguf.records import (
    Result,
    RunPart,
    open_journal,
)
from ewq_gguf.records.base import Part
from ewq_gguf.records.probe import TypeProbePart


def main(path: Path) -> int:
    """Do the job that a file describes; 1 where it failed and said why."""
    job = Job.model_validate_json(path.read_bytes())
    try:
        _tell(0.0)
        with open_journal(Path(job.journal)) as keep:
            log = Log()
            setup = job.parameters.setup
            if job.reference is not None:
                _reference(job, job.reference, LlamaModel(Path(job.model), setup, log))
                return 0
            if job.probing is not None:
                assert job.base is not None
                base = load(Path(job.base), setup, log)
                _probe(job, job.probing, base, log, keep)
                return 0
            model = load(Path(job.model), setup, log, job.precisions)
            if job.writing is not None:
                _write(job.writing, model)
                return 0
            (task,) = (task for task in all_tasks() if task.name == job.part)
            fields: dict[str, Any] = task.measure(
                TaskRun(job, model, lambda path: load(path, setup, log), keep, _tell)
            )
            # Only what is set: the rest is other tasks'.
            told = Result.model_construct(**fields).model_dump(
                mode="json", include=set(fields)
            )
            keep(RunPart(name=task.name, engine=model.model.engine, fields=told))
    except EwqError as error:
        Path(job.failure).write_text(Failure.of(error).model_dump_json())
        return 1
    return 0


def _probe(
    job: Job,
    request: ProbingRequest,
    compared: Named,
    log: Log,
    keep: Callable[[Part], None],
) -> None:
    parameters = job.parameters
    if isinstance(compared.model, ReferenceModel):
        stored = compared.model.windows(parameters.texts[0].sha256)
        windows = Windows(stored.windows[: parameters.n_chunks])
    else:
        windows = windows_of(job, 0, compared, None)
    importance = importance_values(Path(request.imatrix)) if request.imatrix else {}
    base = PerturbedCopy(
        Path(job.model),
        Path(request.copy_path),
        Ggml(Path(request.lib_dir)),
        importance,
        parameters.setup.n_threads,
    )
    for i, probe in enumerate(request.probes):
        with (
            base.perturbed(probe.tensors, probe.ggml_type) as path,
            closing(LlamaModel(path, parameters.setup, log)) as model,
        ):
            scored = score_text(
                Named(path, model),
                compared,
                windows,
                parameters.n_ctx,
                lambda i: False,
            )
            parts = []
            try:
                for number, (_, part) in enumerate(scored, 1):
                    parts += [part] if part else []
                    done = min(number / len(windows.windows), 1.0)
                    _tell((i + done) / len(request.probes))
            except VerificationError as error:
                if error.subject != printable(path):
                    raise  # the base itself
                keep(TypeProbePart(name=probe.name, n_tokens=(), kld_nats=()))
                continue
            text = text_result("", parts, 0)
        keep(
            TypeProbePart(
                name=probe.name,
                n_tokens=tuple(chunk.n_tokens for chunk in text.chunks),
                kld_nats=tuple(chunk.kld_nats or 0.0 for chunk in text.chunks),
            )
        )
        _tell((i + 1) / len(request.probes))


def _write(request: WritingRequest, model: Named) -> None:
    texts = self_text(
        model.model, request.n_documents, request.n_tokens, request.seed, _tell
    )
    Path(request.out).write_text("\n\n".join(texts), encoding="utf-8")


def _reference(job: Job, request: ReferenceRequest, model: LlamaModel) -> None:
    named = Named(model.path, model)
    texts = [windows_of(job, i, named, None) for i in range(len(job.texts))]
    write_reference(model, request, job.parameters, texts, _tell)


def _tell(share: float) -> None:
    """Say how far it is; and end the process, should it never say so again."""
    faulthandler.dump_traceback_later(stall_seconds(STAGE), exit=True)
    rss_bytes = psutil.Process().memory_info().rss
    sys.stdout.write(progress_line(share, rss_bytes, gpu_bytes()))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

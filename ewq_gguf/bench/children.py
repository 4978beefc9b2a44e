"""Child processes that load models: run to their end, and their errors explained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.files import identify
from ewq_gguf.bench.job import (
    Failure,
    Job,
    MemoryUse,
    is_out_of_memory,
    read_progress,
    stalled_for,
    too_large,
)
from ewq_gguf.errors import ChildError, EwqError, ResourceError, printable
from ewq_gguf.llamacpp.failures import explain_failure
from ewq_gguf.llamacpp.logs import child_log
from ewq_gguf.process import TIMEOUT_VARIABLE, python_argv, run

#: The working folder may hold any code.
_CHILD_ENV = {"PYTHONSAFEPATH": "1"}
#: Called with the share done, 0 to 1, and the child's memory.
OnProgress = Callable[[float, MemoryUse], None]


def run_job(job: Job, on_progress: OnProgress) -> None:
    """Run a child to its end.

    Args:
        job: everything that the child is told.
        on_progress: told the share done and the child's memory.

    Raises:
        EwqError: the child's own error, or the one that ended it.
    """

    def hear(line: str) -> None:
        if (told := read_progress(line)) is not None:
            on_progress(*told)

    failure, model = Path(job.failure), Path(job.model)
    failure.unlink(missing_ok=True)  # of a run whose parent was killed
    with TemporaryDirectory(prefix="ewq-bench-") as folder:
        file = Path(folder) / "job.json"
        file.write_text(job.model_dump_json(), encoding="utf-8")
        try:
            with child_log("bench", model) as log_path:
                run(
                    python_argv("ewq_gguf.bench.child", file),
                    stage=STAGE,
                    log_path=log_path,
                    env=_CHILD_ENV,
                    on_line=hear,
                )
        except ChildError as error:
            raise _explained(error, job) from error
        except ResourceError as error:
            needed = identify(model).size_bytes / 1e9
            error.subject = printable(model)
            error.problem += f"; its weights alone need {needed:.1f} GB"
            raise


def _explained(error: ChildError, job: Job) -> EwqError:
    """The error that a child wrote before it ended, or what its log tells."""
    failure, model = Path(job.failure), Path(job.model)
    if failure.exists():
        said = Failure.model_validate_json(failure.read_bytes())
        failure.unlink()
        return explain_failure(said.error())
    if is_out_of_memory("\n".join(error.log_tail)):
        return too_large(model, "ran out of memory")
    error.subject = printable(model)
    log = error.log_path.read_text(errors="replace") if error.log_path else ""
    if stalled := stalled_for(log):
        error.problem = f"made no progress for {stalled} and was ended"
        error.remedy = (
            f"where the machine is slow, set {TIMEOUT_VARIABLE} to more seconds"
        )
    if workers := ", ".join(job.parameters.setup.rpc):
        error.problem += f"; its RPC workers: {workers}"
    if job.reference is None:
        error.remedy += "; what it finished is kept: run again to go on"
    return explain_failure(error)

"""Child process: measure how far ggml's quantisers move tensors.

    python -m ewq_gguf.optimal.error_table_child JOB

ggml ends the process where it asserts: here that is not `ewq`. Each tensor and type is
announced before its quantiser runs, so that the parent can name it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ewq_gguf.bench.job import Failure
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.errors import EwqError
from ewq_gguf.llamacpp.ggml import Ggml
from ewq_gguf.llamacpp.imatrix import importance_values
from ewq_gguf.llamacpp.quant_error import quant_errors
from ewq_gguf.records import open_journal
from ewq_gguf.records.base import Part

#: Beginnings of the lines that the parent reads.
BEGIN, DONE = "begin ", "done "


class ErrorJob(Part):
    """Tensors and types that the child measures.

    Attributes:
        base: Path of the base GGUF.
        lib_dir: Folder of libggml-base.
        imatrix: Path of the importance matrix that weighs columns, or None.
        types: Types to measure by tensor.
        share: Share of each tensor's rows.
        n_threads: Tensors at once.
        journal: Path that gets each `QuantError`.
        failure: Path that gets the error that ended the child.
    """

    base: str
    lib_dir: str
    imatrix: str | None
    types: dict[str, tuple[str, ...]]
    share: float
    n_threads: int
    journal: str
    failure: str


def main(path: Path) -> int:
    """Do the job that a file describes; 1 where it failed and said why."""
    job = ErrorJob.model_validate_json(path.read_bytes())
    try:
        _measure(job)
    except EwqError as error:
        Path(job.failure).write_text(Failure.of(error).model_dump_json())
        return 1
    return 0


def _measure(job: ErrorJob) -> None:
    base = Path(job.base)
    tensors = {tensor.name: tensor for tensor in read_gguf(base).tensors}
    errors = quant_errors(
        base,
        [(tensors[name], types) for name, types in job.types.items()],
        Ggml(Path(job.lib_dir)),
        share=job.share,
        importance=importance_values(Path(job.imatrix)) if job.imatrix else None,
        n_threads=job.n_threads,
        on_begin=lambda name, ggml_type: _say(f"{BEGIN}{name} {ggml_type}"),
    )
    with open_journal(Path(job.journal)) as keep:
        for error in errors:
            keep(error)
            _say(f"{DONE}{error.name}")


def _say(line: str) -> None:
    # One write for each line: tensors are measured by several threads.
    os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

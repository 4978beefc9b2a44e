"""The error of each tensor in each type: measured once per base, kept in the cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.bench.files import identify
from ewq_gguf.bench.job import Failure
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.errors import ChildError
from ewq_gguf.ggml_types import FLOAT_TYPES
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.llamacpp.logs import child_log
from ewq_gguf.optimal.error_table_child import BEGIN, DONE, ErrorJob
from ewq_gguf.optimal.settings import DEFAULT, SearchSettings
from ewq_gguf.process import python_argv, run
from ewq_gguf.records import read_journal
from ewq_gguf.records.quant_error import QuantError
from ewq_gguf.stages.options import SILENT, Options, Progress

STAGE = "plan"


def error_table(
    base: Path,
    types: Mapping[str, Sequence[str]],
    lib_dir: Path,
    *,
    options: Options | None = None,
    progress: Progress = SILENT,
    settings: SearchSettings = DEFAULT,
) -> dict[str, dict[str, QuantError]]:
    """Measure how far each type moves each tensor.

    A run that was killed goes on where it was; other types add what is missing.

    Args:
        base: The base GGUF.
        types: Types by tensor; the error of float types counts as nothing.
        lib_dir: Folder of ggml's quantisers.
        options: Settings of the run; its importance matrix weighs columns.
        progress: Gets the share of the errors that are measured.
        settings: Constants of the search.

    Raises:
        InputError: the base or the matrix cannot be read.
        ChildError: ggml ended the process that measures.
    """
    options = options or Options()
    quantised = {
        name: [ggml_type for ggml_type in of_tensor if ggml_type not in FLOAT_TYPES]
        for name, of_tensor in types.items()
    }
    share = _row_share(base, types, settings)
    journal = _journal(base, options.imatrix, share)
    with store.locked(journal, stage=STAGE, wait=True):
        errors = read_journal(journal, QuantError)
        missing = {
            name: tuple(t for t in of_tensor if f"{name} {t}" not in errors)
            for name, of_tensor in quantised.items()
        }
        job = ErrorJob(
            base=str(base.absolute()),
            lib_dir=str(lib_dir.absolute()),
            imatrix=str(options.imatrix.absolute()) if options.imatrix else None,
            types={name: left for name, left in missing.items() if left},
            share=share,
            n_threads=options.n_threads,
            journal=str(journal),
            failure=str(journal.with_suffix(".failure")),
        )
        if job.types:
            _run(job, progress)
            errors = read_journal(journal, QuantError)
    return {
        name: {
            ggml_type: _lossless(name, ggml_type)
            if ggml_type in FLOAT_TYPES
            else errors[f"{name} {ggml_type}"]
            for ggml_type in of_tensor
        }
        for name, of_tensor in types.items()
    }


def _journal(base: Path, imatrix: Path | None, share: float) -> Path:
    matrix = store.sha256_file(imatrix) if imatrix else None
    key = store.cache_key(identify(base).sha256, matrix, LLAMA_CPP_COMMIT, share)
    return store.cache_dir("errors") / f"{key}.journal"


def _row_share(base: Path, names: Iterable[str], settings: SearchSettings) -> float:
    """Share of the tensors' rows that is sampled."""
    sizes = {tensor.name: prod(tensor.shape) for tensor in read_gguf(base).tensors}
    share = settings.max_sampled_weights / sum(sizes[name] for name in names)
    return min(max(share, settings.min_row_share), 1.0)


def _run(job: ErrorJob, progress: Progress) -> None:
    """Run the child that measures.

    Raises:
        EwqError: the child's own, or what ended it and at which tensor and type.
    """
    n_types = sum(map(len, job.types.values()))
    running: dict[str, str] = {}
    n_done = 0

    def hear(line: str) -> None:
        nonlocal n_done
        if line.startswith(BEGIN):
            name, _, ggml_type = line.removeprefix(BEGIN).rpartition(" ")
            running[name] = ggml_type
        elif line.startswith(DONE):
            n_done += 1
            running.pop(line.removeprefix(DONE).rpartition(" ")[0], None)
            tell(n_done / n_types)

    base, failure = Path(job.base), Path(job.failure)
    failure.unlink(missing_ok=True)  # of a run whose parent was killed
    with (
        progress.stage(f"errors of {n_types} types") as tell,
        store.work_dir(Path(job.journal), stage=STAGE) as folder,
    ):
        file = folder / "job.json"
        file.write_text(job.model_dump_json(), encoding="utf-8")
        argv = python_argv("ewq_gguf.optimal.error_table_child", file)
        try:
            with child_log("errors", base) as log_path:
                run(argv, stage=STAGE, log_path=log_path, on_line=hear)
        except ChildError as error:
            if failure.exists():
                said = Failure.model_validate_json(failure.read_bytes())
                failure.unlink()
                raise said.error() from error
            if running:
                pairs = ", ".join(f"{name} as {t}" for name, t in running.items())
                error.subject = f"ggml, quantising {pairs}"
            raise


def _lossless(name: str, ggml_type: str) -> QuantError:
    return QuantError(
        name=f"{name} {ggml_type}",
        error=0.0,
        error_stderr=0.0,
        plain_error=0.0,
        n_rows=0,
    )

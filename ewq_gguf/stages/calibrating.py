"""From a model and a text, its own where there is none, to an importance matrix."""

from __future__ import annotations

import shutil
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.bench.runner import CPU_SETUP
from ewq_gguf.bench.writing import written_text
from ewq_gguf.errors import InputError
from ewq_gguf.llamacpp.calibrate import STAGE, calibrate
from ewq_gguf.llamacpp.convertible import check_is_local
from ewq_gguf.llamacpp.imatrix import read_imatrix
from ewq_gguf.plan.importance import Importance
from ewq_gguf.stages.converting import base_file
from ewq_gguf.stages.run import Run

#: Documents of 512 tokens at most that a model writes.
N_DOCUMENTS = 64


def make_imatrix(
    run: Run,
    out: Path | None = None,
    *,
    calibration: Path | None = None,
    n_chunks: int | None = None,
    seed: int = 0,
) -> tuple[Path, Importance]:
    """The importance matrix of a model, made on first use.

    Args:
        run: the model and the options.
        out: path of the matrix; None for the cache alone.
        calibration: the text; None lets the model write one.
        n_chunks: windows of 512 tokens, at most; None for all.
        seed: seed of the text that the model writes.

    Raises:
        EwqError: a stage failed; the message says what to do.
    """
    if calibration is not None:
        check_calibration(calibration)
    checkpoint, toolchain, options = run.checkpoint, run.toolchain, run.options
    check_is_local(checkpoint)
    base = base_file(run)
    text = calibration or written_text(
        base,
        CPU_SETUP.model_copy(update={"n_threads": options.n_threads}),
        lambda: run.progress.measure(f"text by {checkpoint.identity.name}"),
        n_documents=N_DOCUMENTS,
        seed=seed,
    )
    inputs = (checkpoint.signature, store.sha256_file(text), n_chunks)
    key = store.cache_key(*inputs, toolchain.key)
    path = store.cache_dir("imatrix") / f"{checkpoint.identity.name}-{key[:16]}.gguf"
    with store.locked(path, stage=STAGE, wait=True):
        if not path.exists():
            with run.progress.stage("imatrix") as share:
                calibrate(
                    base,
                    text,
                    path,
                    toolchain,
                    n_threads=options.n_threads,
                    n_chunks=n_chunks,
                    on_progress=share,
                )
        importance = read_imatrix(path)
        if out is not None:
            with store.replacing(out, stage=STAGE) as temporary:
                shutil.copyfile(path, temporary)
    return out or path, importance


def check_calibration(text: Path) -> None:
    """Refuse a text that cannot be read, before any work.

    Raises:
        InputError: there is no such file, or it cannot be opened.
    """
    try:
        with text.open("rb") as file:
            file.read(1)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise InputError(STAGE, text, problem, "check the path") from error


def with_imatrix(run: Run) -> Run:
    """The same with the model's own importance matrix, where none was given."""
    if run.options.imatrix is not None:
        return run
    path, _ = make_imatrix(run, calibration=run.options.calibration)
    return run.with_options(imatrix=path)

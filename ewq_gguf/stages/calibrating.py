"""From a model and a text, its own where there is none, to an importance matrix."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.bench.runner import CPU_SETUP
from ewq_gguf.bench.writing import written_text
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.llamacpp.calibrate import STAGE, calibrate
from ewq_gguf.llamacpp.convert import check_is_local
from ewq_gguf.llamacpp.imatrix import read_imatrix
from ewq_gguf.llamacpp.toolchain import find_toolchain
from ewq_gguf.plan.importance import Importance
from ewq_gguf.stages.bases import base_file
from ewq_gguf.stages.options import SILENT, Options, Progress

#: Documents of 512 tokens at most that a model writes.
N_DOCUMENTS = 64


def make_imatrix(
    checkpoint: Checkpoint,
    out: Path | None = None,
    *,
    calibration: Path | None = None,
    n_chunks: int | None = None,
    seed: int = 0,
    options: Options | None = None,
    progress: Progress = SILENT,
) -> tuple[Path, Importance]:
    """The importance matrix of a model, made on first use.

    Args:
        checkpoint: of the model.
        out: where it goes; None for the cache alone.
        calibration: the text; None lets the model write one.
        n_chunks: windows of 512 tokens, at most; None for all.
        seed: of the text that the model writes.
        options: for the whole run.
        progress: who is told.

    Raises:
        EwqError: of the stage that failed, with what to do.
    """
    options = options or Options()
    check_is_local(checkpoint)
    toolchain = find_toolchain(options.llama_cpp)
    base = base_file(checkpoint, toolchain, progress=progress)
    text = calibration or written_text(
        base,
        CPU_SETUP.model_copy(update={"n_threads": options.n_threads}),
        lambda: progress.measure(f"text by {checkpoint.identity.name}"),
        n_documents=N_DOCUMENTS,
        seed=seed,
    )
    asked = f"{checkpoint.signature} {store.sha256_file(text)} {n_chunks}"
    key = store.sha256_text(f"{asked} {toolchain.key}")
    path = store.cache_dir("imatrix") / f"{checkpoint.identity.name}-{key[:16]}.gguf"
    with store.locked(path, stage=STAGE, wait=True):
        if not path.exists():
            with progress.stage("imatrix") as share:
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


def with_imatrix(
    checkpoint: Checkpoint, options: Options, progress: Progress = SILENT
) -> Options:
    """The same with the model's own importance matrix, where none was given."""
    if options.imatrix is not None:
        return options
    path, _ = make_imatrix(
        checkpoint,
        calibration=options.calibration,
        options=options,
        progress=progress,
    )
    return replace(options, imatrix=path)

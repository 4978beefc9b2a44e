"""A model of whatever kind a path names; only child processes load any."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ewq_gguf.bench.engines.llama import LlamaModel
from ewq_gguf.bench.engines.llama_log import Log
from ewq_gguf.bench.engines.precision import Precision
from ewq_gguf.bench.reference import ReferenceModel
from ewq_gguf.bench.reference_file import is_reference
from ewq_gguf.bench.texts.quality import Named
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.records import BenchSetup


def load(
    path: Path,
    setup: BenchSetup,
    log: Log,
    precisions: Mapping[str, Precision] | None = None,
) -> Named:
    """Load a GGUF file, a reference in the place of one, or a checkpoint's folder.

    Args:
        path: file or folder of any such model.
        setup: where it goes; a GGUF file goes beside a checkpoint.
        log: listener of this process.
        precisions: by the names of the tensors that bitsandbytes quantises.

    Raises:
        EwqError: as of `LlamaModel`, `ReferenceModel` and `TransformersModel`.
    """
    if path.is_dir():
        from ewq_gguf.bench.engines.transformers_model import TransformersModel

        return Named(path, TransformersModel(path, setup, precisions or {}))
    if is_reference(read_gguf(path)):
        return Named(path, ReferenceModel(path, setup.n_threads))
    return Named(path, LlamaModel(path, setup, log))

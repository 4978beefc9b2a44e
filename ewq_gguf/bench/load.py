"""A model of whatever kind a path names; only child processes load any."""

from __future__ import annotations

from pathlib import Path

from ewq_gguf.bench.llama import LlamaModel, Log
from ewq_gguf.bench.quality import Named
from ewq_gguf.bench.reference import ReferenceModel
from ewq_gguf.bench.reference_file import is_reference
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.records import BenchSetup


def load(path: Path, setup: BenchSetup, log: Log) -> Named:
    """Load a GGUF file, or a reference in the place of one.

    Raises:
        EwqError: as of `LlamaModel` and `ReferenceModel`.
    """
    if is_reference(read_gguf(path)):
        return Named(path, ReferenceModel(path, setup.n_threads))
    return Named(path, LlamaModel(path, setup, log))

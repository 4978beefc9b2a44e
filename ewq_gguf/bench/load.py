"""A model of whatever kind a path names; only child processes load any."""

from __future__ import annotations

from pathlib import Path

from ewq_gguf.bench.llama import LlamaModel, Log
from ewq_gguf.bench.quality import Named
from ewq_gguf.records import BenchSetup


def load(path: Path, setup: BenchSetup, log: Log) -> Named:
    """Load a GGUF file.

    Raises:
        EwqError: as of `LlamaModel`.
    """
    return Named(path, LlamaModel(path, setup, log))

"""Settings of a whole run, and the receiver of its progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ewq_gguf.bench.job import MemoryUse
from ewq_gguf.process import N_CPUS


class Progress(Protocol):
    """Receiver of notes, and of the share done of long work."""

    def note(self, text: str) -> None:
        """Say something once."""

    def stage(
        self, name: str, total_bytes: int | None = None
    ) -> AbstractContextManager[Callable[[float], None]]:
        """Begin a stage; the function it gives is told the share done, 0 to 1."""

    def measure(
        self, name: str
    ) -> AbstractContextManager[Callable[[float, MemoryUse], None]]:
        """Likewise; its function is also told the memory of the child."""


class Silent:
    """Progress that nobody sees."""

    def note(self, text: str) -> None:
        """Say nothing."""

    @contextmanager
    def stage(
        self, name: str, total_bytes: int | None = None
    ) -> Iterator[Callable[[float], None]]:
        """Show nothing."""
        yield lambda share: None

    @contextmanager
    def measure(self, name: str) -> Iterator[Callable[[float, MemoryUse], None]]:
        """Show nothing."""
        yield lambda share, use: None


SILENT = Silent()


@dataclass(frozen=True)
class Options:
    """Settings of a whole run.

    Attributes:
        n_threads: threads that read, count and quantise.
        llama_cpp: the user's own llama.cpp, or None.
        allow_nonfinite: count NaN and infinite weights instead of refusing them.
        force: replace outputs made from other inputs.
        load: load the finished file and let it answer.
        is_streamed: leave the weights on their server; only scans and plans can.
        imatrix: the importance matrix that files are planned and made with.
        calibration: the text that policy `optimal` computes one on, where none is
            given; None lets the model write it.
        adapters: LoRA adapters, folders or Hub ids, merged into the model in this
            order.
        scheduler: the Dask scheduler whose workers scan, or None for this machine.
        keep_lattice: plan what is quantised already so that it keeps its values.
        chat_template: a jinja file that goes into the GGUF in place of the
            checkpoint's own.
        pre: the pre-tokenizer's name, where the converter does not know the tokenizer.
        mtp: `keep`, `drop` or `separate`: the heads for further tokens.
        mmproj: `auto`, `none` or a ggml type: the file for images and sounds.
    """

    n_threads: int = N_CPUS
    llama_cpp: Path | None = None
    allow_nonfinite: bool = False
    force: bool = False
    load: bool = True
    is_streamed: bool = False
    imatrix: Path | None = None
    calibration: Path | None = None
    adapters: tuple[str, ...] = ()
    scheduler: str | None = None
    keep_lattice: bool = True
    chat_template: Path | None = None
    pre: str | None = None
    mtp: str = "keep"
    mmproj: str = "auto"

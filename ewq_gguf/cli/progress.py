"""Progress on stderr: bars on a terminal, one line per stage elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ewq_gguf.bench.job import MemoryUse
from ewq_gguf.cli import silence
from ewq_gguf.size_text import size_text


def memory_text(use: MemoryUse) -> str:
    """A child's memory, and what it has on GPUs where a driver tells it."""
    on_gpu = "" if use.gpu_bytes is None else f" + {size_text(use.gpu_bytes)} on GPU"
    return f"{size_text(use.rss_bytes)}{on_gpu}"


def console() -> Console:
    """Where people read: stderr; colour only where it is a terminal."""
    return _Console(stderr=True, highlight=False)


class _Console(Console):
    """A console on stderr whose reader may leave: the work goes on."""

    def on_broken_pipe(self) -> None:
        """Say no more."""
        silence(sys.stderr)


class BarProgress:
    """The pipeline's progress: bars on a terminal, one line per stage elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        """Draw nothing yet."""
        if quiet or not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        self.is_quiet = quiet
        self._console = console()
        self._noted: set[str] = set()

    def note(self, text: str) -> None:
        """Say something once."""
        if text not in self._noted:
            self._noted.add(text)
            self._print(text)

    def _print(self, text: str) -> None:
        if not self.is_quiet:
            self._console.print(f"ewq: {text}", markup=False)

    @contextmanager
    def stage(
        self, name: str, total_bytes: int | None = None
    ) -> Iterator[Callable[[float], None]]:
        """Show how far a stage is."""
        with self._bar(name, total_bytes) as update:
            yield lambda share: update(share, "")

    @contextmanager
    def measure(self, name: str) -> Iterator[Callable[[float, MemoryUse], None]]:
        """Show how far a stage is, and the memory that its child has."""
        with self._bar(name, None) as update:
            yield lambda share, use: update(share, memory_text(use))

    @contextmanager
    def _bar(
        self, name: str, total_bytes: int | None
    ) -> Iterator[Callable[[float, str], None]]:
        if self.is_quiet or not sys.stderr.isatty():
            self._print(name)
            yield lambda share, detail: None
            return
        columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
        if total_bytes:
            columns += [DownloadColumn(), TransferSpeedColumn()]
        else:
            columns += [TaskProgressColumn(), TimeElapsedColumn()]
        columns += [TimeRemainingColumn(), TextColumn("{task.fields[detail]}")]
        with Progress(*columns, console=self._console) as progress:
            task: TaskID = progress.add_task(name, total=None, detail="")

            def update(share: float, detail: str) -> None:
                total = total_bytes or 100
                progress.update(
                    task, completed=share * total, total=total, detail=detail
                )

            yield update

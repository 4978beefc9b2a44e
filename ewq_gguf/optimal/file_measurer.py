"""Candidates' files, measured on windows of two texts, and the time that this takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from ewq_gguf.bench.runner import Request
from ewq_gguf.llamacpp.devices import list_devices
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.optimal.settings import DEFAULT, SearchSettings
from ewq_gguf.records import Plan, TextResult
from ewq_gguf.stages.candidate_files import measure_plans, time_plans, types_sha256
from ewq_gguf.stages.options import Options, Progress


@dataclass
class FileMeasurer:
    """Measures files, and estimates the time that more of them take.

    Attributes:
        search: search text, base, and how models are loaded.
        final: the same with the final text, on which nothing is chosen before.
        toolchain: llama.cpp that quantises.
        options: settings of the run.
        progress: receiver of notes and of the share done.
        settings: constants of the search.
        seconds: time that each file took on the search text; known files take none.
    """

    search: Request
    final: Request
    toolchain: Toolchain
    options: Options
    progress: Progress
    settings: SearchSettings = DEFAULT
    seconds: list[float] = field(default_factory=list)

    def on_search_text(self, plans: Sequence[Plan]) -> list[TextResult | None]:
        """Measure plans' files on a few windows; None for a file that failed."""
        request = replace(self.search, n_chunks=self.settings.n_search_windows)
        return self._measure(plans, request, self.seconds.append)

    def on_final_text(self, plans: Sequence[Plan]) -> list[TextResult | None]:
        """The same on many windows of the final text."""
        request = replace(self.final, n_chunks=self.settings.n_final_windows)
        return self._measure(plans, request, lambda seconds: None)

    def _measure(
        self,
        plans: Sequence[Plan],
        request: Request,
        on_seconds: Callable[[float], None],
    ) -> list[TextResult | None]:
        parts = measure_plans(
            plans,
            request,
            self.toolchain,
            options=self.options,
            progress=self.progress,
            may_fail=True,
            on_seconds=on_seconds,
        )
        found = [parts.get(types_sha256(plan)) for plan in plans]
        return [part.quality if part else None for part in found]

    def expected_seconds(self, n_search: int, n_final: int) -> float:
        """Time for so many files on the search text and on the final one.

        The median of the files so far, in proportion to the windows.
        """
        settings = self.settings
        ratio = settings.n_final_windows / settings.n_search_windows
        per_file = median(self.seconds) if self.seconds else 0.0
        return per_file * (n_search + ratio * n_final)

    def speeds(self, plans: Sequence[Plan]) -> list[float]:
        """Tokens per second that plans' files generate; 0 for a file that failed."""
        return time_plans(
            plans,
            self.search,
            self.toolchain,
            options=self.options,
            progress=self.progress,
        )


def measuring_device(
    base: Path, toolchain: Toolchain, settings: SearchSettings = DEFAULT
) -> str:
    """Choose where files are measured: on the devices there are, if the base fits them.

    Each file is measured beside the base, and one device does not round as another.

    Args:
        base: base GGUF.
        toolchain: llama.cpp whose devices are used.
        settings: constants of the search.

    Raises:
        ToolError, ChildError: as of `list_devices`.
    """
    if toolchain.backend == "cpu":
        return "cpu"
    free = sum(device.free_bytes for device in list_devices(toolchain))
    needed = settings.device_memory_factor * base.stat().st_size
    return "auto" if needed <= free else "cpu"

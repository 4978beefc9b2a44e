"""Files of a search, measured: a few windows of one text, many of another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ewq_gguf.bench.runner import Request
from ewq_gguf.llamacpp.devices import list_devices
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.records import Plan, TextResult
from ewq_gguf.stages.candidate_files import measure_plans, time_plans, types_sha256
from ewq_gguf.stages.options import Options, Progress

#: Windows that every file is measured on, and the best ones.
_N_FEW, _N_MANY = 8, 32
#: Memory that a model takes while it is measured, of its file: buffers, a short cache.
_ROOM = 1.2


@dataclass
class Measuring:
    """Measures files, and knows how long that takes.

    Attributes:
        request: the text that is searched on, and the base.
        final: the text that the best are compared on: nothing was chosen on it.
        toolchain: that quantises.
        options: for the whole run.
        progress: who is told.
        seconds: of a file on few windows, the longest seen.
    """

    request: Request
    final: Request
    toolchain: Toolchain
    options: Options
    progress: Progress
    seconds: float = 0.0

    def on_few(self, plans: Sequence[Plan]) -> list[TextResult | None]:
        """What the files of plans are worth on a few windows; None: not measurable."""
        return self._measure(plans, self.request, _N_FEW)

    def on_many(self, plans: Sequence[Plan]) -> list[TextResult | None]:
        """The same on many windows of the final text."""
        return self._measure(plans, self.final, _N_MANY)

    def _measure(
        self, plans: Sequence[Plan], request: Request, n_windows: int
    ) -> list[TextResult | None]:
        started = time.monotonic()
        parts = measure_plans(
            plans,
            replace(request, n_chunks=n_windows),
            self.toolchain,
            options=self.options,
            progress=self.progress,
            may_fail=True,
        )
        taken = (time.monotonic() - started) / max(len(plans), 1)
        self.seconds = max(self.seconds, taken * _N_FEW / n_windows)
        found = [parts.get(types_sha256(plan)) for plan in plans]
        return [part.quality if part else None for part in found]

    def seconds_of(self, n_few: int, n_many: int) -> float:
        """What so many files take, some on few windows and some on many."""
        return self.seconds * (n_few + n_many * _N_MANY / _N_FEW)

    def speeds(self, plans: Sequence[Plan]) -> list[float]:
        """Tokens per second that the files of plans generate."""
        return time_plans(
            plans,
            self.request,
            self.toolchain,
            options=self.options,
            progress=self.progress,
        )


def device_for(base: Path, toolchain: Toolchain) -> str:
    """Where files are measured: on the devices there are, if the base fits them too.

    Each file is measured beside the base, and one device does not round as another.

    Args:
        base: the base GGUF.
        toolchain: whose devices are meant.

    Raises:
        ToolError, ChildError: as of `list_devices`.
    """
    if toolchain.backend == "cpu":
        return "cpu"
    free = sum(device.free_bytes for device in list_devices(toolchain))
    return "auto" if _ROOM * base.stat().st_size <= free else "cpu"

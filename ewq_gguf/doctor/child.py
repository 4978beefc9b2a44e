"""Children of the doctor: their logs stay out of a cache that may be what is broken."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from ewq_gguf.process import run


def output(argv: Sequence[str | Path], *, seconds: float) -> str:
    """The output of a child.

    Args:
        argv: its command line.
        seconds: the longest it may take.

    Raises:
        ToolError: it cannot be started.
        ChildError: it failed, or took too long; with the last lines it printed.
        ResourceError: it was killed, most likely for memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        return run(
            argv,
            stage="doctor",
            log_path=Path(folder) / "child.log",
            # The working folder may hold any code.
            env={"PYTHONSAFEPATH": "1"},
            timeout_seconds=seconds,
        )

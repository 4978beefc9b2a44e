"""GPUs and drivers that the system shows, whatever llama.cpp was built for."""

from __future__ import annotations

import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from ewq_gguf.doctor import child
from ewq_gguf.errors import ChildError

_DRIVER_SECONDS = 30.0
_DEVICE = Path("/dev/nvidia0")


@dataclass(frozen=True)
class Nvidia:
    """The answer of NVIDIA's driver.

    Attributes:
        gpus: their names; empty without one that a process may use.
        problem: why the driver does not answer, or None.
    """

    gpus: tuple[str, ...] = ()
    problem: str | None = None


def nvidia() -> Nvidia:
    """NVIDIA's GPUs, asked of the driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Nvidia(("a GPU of NVIDIA",) if _DEVICE.exists() else ())
    try:
        argv = [tool, "--query-gpu=name", "--format=csv,noheader"]
        text = child.output(argv, seconds=_DRIVER_SECONDS)
    except ChildError as error:
        return Nvidia(problem=error.problem)
    return Nvidia(tuple(line.strip() for line in text.splitlines() if line.strip()))


def is_apple_gpu() -> bool:
    """Whether this is a Mac whose GPU llama.cpp's Metal backend is made for."""
    return sys.platform == "darwin" and platform.machine() == "arm64"

"""GPUs and drivers that the system shows, whatever llama.cpp was built for."""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

from ewq_gguf.doctor import child
from ewq_gguf.errors import ChildError

_DRIVER_SECONDS = 30.0
_DEVICE = Path("/dev/nvidia0")


def nvidia_gpus() -> tuple[str, ...]:
    """The names of NVIDIA's GPUs that a process may use; empty without one.

    Raises:
        ChildError: there is a driver and it does not answer.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ("a GPU of NVIDIA",) if _DEVICE.exists() else ()
    argv = [tool, "--query-gpu=name", "--format=csv,noheader"]
    text = child.output(argv, seconds=_DRIVER_SECONDS)
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def driver_problem() -> str | None:
    """Why NVIDIA's driver does not answer, or None where it does or is not there."""
    try:
        nvidia_gpus()
    except ChildError as error:
        return error.problem
    return None


def is_apple_gpu() -> bool:
    """Whether this is a Mac whose GPU llama.cpp's Metal backend is made for."""
    return sys.platform == "darwin" and platform.machine() == "arm64"

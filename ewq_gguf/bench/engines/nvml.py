"""Memory of this process on NVIDIA's GPUs, as their driver counts it.

llama.cpp's log counts its own buffers; the driver also counts the CUDA context, the
libraries' code and what they cache, which is what another program can no longer have.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any


def gpu_bytes() -> int | None:
    """Bytes of this process on all NVIDIA GPUs; None where nobody tells.

    It is unknown without nvidia-ml-py, without a driver, or with one that does not name
    processes, as in some containers.
    """
    library = _library()
    return None if library is None else used_bytes(library, os.getpid())


def used_bytes(library: Any, pid: int) -> int | None:
    """Bytes of a process on all GPUs that `library` (pynvml, initialised) sees."""
    found = []
    try:
        for i in range(library.nvmlDeviceGetCount()):
            device = library.nvmlDeviceGetHandleByIndex(i)
            found += [
                process.usedGpuMemory
                for process in library.nvmlDeviceGetComputeRunningProcesses(device)
                if process.pid == pid and process.usedGpuMemory is not None
            ]
    except library.NVMLError:
        return None
    return sum(found) if found else None


@cache
def _library() -> Any:
    """Pynvml with the driver open, or None."""
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        library.nvmlInit()
    except library.NVMLError:
        return None
    return library

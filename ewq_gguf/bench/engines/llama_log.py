"""llama.cpp's log: kept while a model loads, and read for errors and buffer sizes.

Only child processes import this.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import llama_cpp

from ewq_gguf.bench.engines.scorer import STAGE, Buffers
from ewq_gguf.bench.job import is_out_of_memory, too_large
from ewq_gguf.errors import ChildError, EwqError, InputError
from ewq_gguf.llamacpp.logs import engine_reason

#: ggml_log_level; debugging tells of every forward pass.
_DEBUG, _CONTINUED = 1, 5
_BUFFER = re.compile(
    r"^\S+:\s+(\S+) .*?(model|KV|RS|state|compute|output) buffer size =\s+([\d.]+) MiB",
    re.MULTILINE,
)


class Log:
    """Listener to llama.cpp's messages: they go on to stderr, and are kept."""

    def __init__(self) -> None:
        """Begin to listen; llama.cpp has one listener per process."""
        self.text = ""
        self._level = 0
        self._callback = llama_cpp.llama_log_callback(self._hear)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _hear(self, level: int, line: bytes, _data: object) -> None:
        self._level = self._level if level == _CONTINUED else level
        if self._level == _DEBUG:
            return
        os.write(2, line)
        self.text += line.decode(errors="replace")


def load_error(path: Path, said: str) -> EwqError:
    """Why a model does not load, by llama.cpp's log."""
    if is_out_of_memory(said):
        return too_large(path, "does not fit into memory")
    problem = f"does not load: {_reason(said)}"
    remedy = "check it with `ewq verify`, or make it again"
    return ChildError(STAGE, path, problem, remedy)


def context_error(path: Path, said: str) -> EwqError:
    """Why a model gets no context, by llama.cpp's log."""
    if is_out_of_memory(said):
        return too_large(path, "leaves no memory for its context")
    return InputError(
        STAGE,
        path,
        f"allows no such context: {_reason(said)}",
        "use another --ctx, --cache-type-k or --cache-type-v",
    )


def _reason(text: str) -> str:
    """llama.cpp's reason, else the last line that tells of an error, else the last."""
    if reason := engine_reason(text):
        return reason
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line]
    return "".join((errors or lines)[-1:])


def buffers_in(text: str, devices: set[str]) -> Buffers:
    """The buffers that llama.cpp's log names, those of `devices` counted apart.

    A device's buffers in the host's memory are called `CUDA_Host` and the like.
    """
    sizes = {"weights": 0, "kv": 0, "compute": 0, "device": 0}
    names = {"model": "weights", "KV": "kv", "RS": "kv", "state": "kv"}
    for name, buffer, mib in _BUFFER.findall(text):
        n_bytes = round(float(mib) * (1 << 20))
        sizes[names.get(buffer, "compute")] += n_bytes
        # An RPC worker is named with its address: RPC0[10.0.0.2:50052].
        sizes["device"] += n_bytes if name.partition("[")[0] in devices else 0
    return Buffers(
        weights_bytes=sizes["weights"],
        kv_bytes=sizes["kv"],
        compute_bytes=sizes["compute"],
        device_bytes=sizes["device"],
    )

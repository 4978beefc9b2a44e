"""Child process: let llama.cpp load a GGUF's header alone; print one JSON line.

It looks for every tensor that the architecture needs and compares their shapes, but
reads and allocates none (`no_alloc`), so a header with a hole for its data will do.

    python -m ewq_gguf.llamacpp.header_load_child FILE
"""

from __future__ import annotations

import ctypes
import json
import sys

_ERROR = 4  # GGML_LOG_LEVEL_ERROR


def main(path: str) -> None:
    """Print `{"reason": ...}`: why it cannot be loaded, or an empty string."""
    import llama_cpp

    errors: list[str] = []

    @llama_cpp.llama_log_callback
    def note(level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            errors.append(text.decode(errors="replace").strip())

    llama_cpp.llama_log_set(note, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    params.n_gpu_layers = 0
    is_loaded = bool(llama_cpp.llama_model_load_from_file(path.encode(), params))
    reason = "" if is_loaded else next(iter(errors), "no reason given")
    sys.stdout.write(f"\n{json.dumps({'reason': reason})}\n")


if __name__ == "__main__":
    main(sys.argv[1])

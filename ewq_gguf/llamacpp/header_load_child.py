"""Child process: let llama.cpp load a GGUF's header alone; print JSON.

It looks for every tensor that the architecture needs and compares their shapes, but
reads and allocates none (`no_alloc`), so a header with a hole for its data will do.

    python -m ewq_gguf.llamacpp.header_load_child FILE...
"""

from __future__ import annotations

import ctypes
import json
import sys

_ERROR = 4  # GGML_LOG_LEVEL_ERROR


def main(paths: list[str]) -> None:
    """Print why each cannot be loaded; an empty string for one that can."""
    import llama_cpp

    errors: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def note(level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            errors.append(text.decode(errors="replace").strip())

    llama_cpp.llama_log_set(note, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    params.n_gpu_layers = 0
    reasons = []
    for path in paths:
        errors.clear()
        model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        reasons.append("" if model else next(iter(errors), "no reason given"))
        if model:
            llama_cpp.llama_model_free(model)
    sys.stdout.write(f"\n{json.dumps(reasons)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])

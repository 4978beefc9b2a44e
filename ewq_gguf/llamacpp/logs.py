"""The children's logs: where they are kept, and why llama.cpp failed by what they say.

No log is kept of a child that succeeded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.errors import ChildError

#: What llama.cpp's tools put before a line: 0.00.003.883 E
_STAMP = re.compile(r"^(?:\d+\.\d\d\.\d{3}\.\d{3} [A-Z] )", re.MULTILINE)
#: From the cause nearest to the failure to the vaguest; the first that is there counts.
_REASONS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        # /path/ggml/src/ggml-cpu/ops.cpp:4132: GGML_ASSERT(eps >= 0.0f) failed
        r"^\S*?([\w.+-]+:\d+: GGML_ASSERT\(.*\) failed)",
        # CUDA error: out of memory, before the line where ggml aborts for it
        r"^((?:CUDA|ROCm|MUSA|SYCL|Vulkan|Metal|OpenCL) error: .+)",
        # /path/ggml/src/ggml-cpu/ops.cpp:12: fatal error
        r"^\S*?([\w.+-]+\.(?:c|cc|cpp|cu|cuh|h|m|mm|inc):\d+: .+)",
        # gguf_init_from_reader: bad GGUF version: 0
        r"^gguf_init_from_\w+: (.+)",
        # llama_model_load: error loading model: check_tensor_dims: tensor 'x' not found
        r"error loading model: (?:error loading model \w+: )?(?:[a-z]+_\w+: )?(.+)",
        # llama_model_quantize: failed to quantize: key not found in model: x
        r"failed to quantize: (?:[a-z]+_\w+: )?(.+)",
        r"failed to initialize the context: (.+)",
        r"^(?:[\w:]+: )?((?:failed|unable) to allocate .+)",
        r"what\(\):\s+(.+)",
        r"^(llama_(?:decode|encode): .+)",
        r"^[\w:. ]+: (failed to decode.*)",
    )
)


def engine_reason(log: str) -> str | None:
    """Why llama.cpp failed to load or to compute, in its own words.

    Args:
        log: The output of a llama.cpp tool, or of a child with its bindings.

    Returns:
        Its assertion, its missing tensor or the like, one line; None where it says
        nothing of a cause.
    """
    text = _STAMP.sub("", log)
    found = (pattern.search(text) for pattern in _REASONS)
    return next((" ".join(match[1].split()) for match in found if match), None)


def log_file(what: str, path: Path) -> Path:
    """The log of what this process does to a file; no other run writes to it."""
    key = store.sha256_text(str(path.absolute()))[:8]
    name = f"{what}-{path.stem[:80]}-{key}-{os.getpid()}.log"
    return store.cache_dir("logs") / name


@contextmanager
def child_log(what: str, path: Path) -> Iterator[Path]:
    """A log for one child: removed when the block succeeds, kept when it fails.

    Raises:
        ChildError: the block's, with llama.cpp's own reason where its log tells one.
    """
    log_path = log_file(what, path)
    try:
        yield log_path
    except ChildError as error:
        if reason := engine_reason(error.output):
            ending = error.problem.partition("; its last line: ")[0]
            error.problem = f"{ending}: {reason}"
        raise
    log_path.unlink(missing_ok=True)

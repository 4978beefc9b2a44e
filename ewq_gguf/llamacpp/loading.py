"""Whether llama.cpp finds every tensor it needs in a file that is to be made."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from ewq_gguf.errors import ChildError, ResourceError
from ewq_gguf.llamacpp.logs import child_log, engine_reason
from ewq_gguf.llamacpp.self_test import can_load
from ewq_gguf.process import python_argv, run

_TENSORS = re.compile(
    r"tensor '\S+' not found|missing tensor|has wrong shape|wrong number"
)


def tensor_refusals(headers: Sequence[Path]) -> list[str]:
    """Why llama.cpp refuses files' tensors: one is missing or of a wrong shape.

    Args:
        headers: GGUF headers, with or without their data.

    Returns:
        llama.cpp's reason for each; empty where it takes them, refuses for another
        reason, or cannot be asked.
    """
    return [
        reason if _TENSORS.search(reason) else "" for reason in load_refusals(headers)
    ]


def load_refusals(headers: Sequence[Path]) -> list[str]:
    """Why llama.cpp does not load files.

    Args:
        headers: GGUF headers, with or without their data.

    Returns:
        llama.cpp's reason for each; empty where it takes them, or cannot be asked
        because the bindings are missing.
    """
    if not can_load():
        return [""] * len(headers)
    argv = python_argv(
        "ewq_gguf.llamacpp.header_load_child", *(path.absolute() for path in headers)
    )
    try:
        with child_log("header", headers[0]) as log_path:
            text = run(
                argv, stage="plan", log_path=log_path, env={"PYTHONSAFEPATH": "1"}
            )
    except (ChildError, ResourceError):
        # What crashes here is told where the finished file is loaded.
        return [""] * len(headers)
    said = json.loads(text.splitlines()[-1])
    return [engine_reason(reason) or reason for reason in said]

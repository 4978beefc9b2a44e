"""Whether llama.cpp finds every tensor it needs in a file that is to be made."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ewq_gguf.errors import ChildError, ResourceError
from ewq_gguf.llamacpp.logs import child_log
from ewq_gguf.llamacpp.verify import can_load
from ewq_gguf.process import python_argv, run

# llama_model_load: error loading model: check_tensor_dims: tensor 'x' not found
_REASON = re.compile(r"(?:\w+: )*(?:error loading model: )?(?:\w+: )?(.+)")
_TENSORS = re.compile(r"tensor '\S+' not found|missing tensor|has wrong shape|wrong number")


def tensor_refusal(header: Path) -> str:
    """Why llama.cpp refuses a file's tensors: one is missing or of a wrong shape.

    Args:
        header: a GGUF header, with or without its data.

    Returns:
        llama.cpp's reason; empty where it takes them, refuses for another reason, or
        cannot be asked because the bindings are missing.
    """
    if not can_load():
        return ""
    argv = python_argv("ewq_gguf.llamacpp.header_load_child", header.absolute())
    try:
        with child_log("header", header) as log_path:
            text = run(
                argv, stage="plan", log_path=log_path, env={"PYTHONSAFEPATH": "1"}
            )
    except (ChildError, ResourceError):
        return ""  # what crashes here is told where the finished file is loaded
    reason = str(json.loads(text.splitlines()[-1])["reason"])
    match = _REASON.fullmatch(reason)
    return match[1] if match and _TENSORS.search(reason) else ""

"""Whether a failure of llama.cpp is the toolchain's fault: its self-test decides."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ewq_gguf.errors import (
    ChildError,
    EwqError,
    ToolError,
    VerificationError,
)
from ewq_gguf.libraries import LIBRARY_VARIABLE, RECORD_NAME
from ewq_gguf.llamacpp.self_test import (
    STAGE,
    SelfTest,
    can_load,
    keep_self_test,
    run_self_test,
)

_REMEDY = "run `ewq setup`, which builds it again and leaves out what fails"


def explain_failure(error: EwqError) -> EwqError:
    """Tell whose fault it is that llama.cpp did not load or compute something.

    The self-test runs anew: where it fails, the toolchain is at fault, whatever the
    file; where it passes, the error stays what it is.

    Args:
        error: The error of a child that used the bindings or our build.

    Returns:
        A ToolError, or the same error.
    """
    # Others have a cause of their own: a missing device, full memory, a wrong option.
    if not isinstance(error, ChildError | VerificationError):
        return error
    lib_dir = os.environ.get(LIBRARY_VARIABLE)
    if not lib_dir or not can_load():
        return error
    record_path = Path(lib_dir).parent / RECORD_NAME
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    backend = str(record.get("backend", "cpu"))
    verdict = run_self_test(Path(lib_dir), backend)
    if record:
        keep_self_test(record_path.parent, record, verdict)
    return error if verdict.is_ok else failed(verdict)


def failed(verdict: SelfTest) -> ToolError:
    """The error for a build that has failed."""
    problem = f"fails its self-test on this machine ({verdict.problem})"
    return ToolError(STAGE, "llama.cpp", problem, _REMEDY)

"""Reading a GGUF back: is it, tensor by tensor, what its plan says?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.checkpoint.gguf_file import GgufFile, read_gguf
from ewq_gguf.errors import ChildError, ToolError, VerificationError, printable
from ewq_gguf.ggml_types import n_dims
from ewq_gguf.llamacpp.failures import explain_failure
from ewq_gguf.llamacpp.logs import child_log
from ewq_gguf.llamacpp.self_test import can_load as can_load
from ewq_gguf.plan.importance import file_keys
from ewq_gguf.process import TIMEOUT_VARIABLE, python_argv, run, stall_seconds
from ewq_gguf.records import Exactness, Plan, Verification, VerifiedTensor

#: What a file is asked when it is loaded.
PROMPT = "The capital of France is"
_N_TOKENS = 8
#: Bytes per second that a file is read at, at least.
_SLOWEST_DISK = 20e6


def verify_file(
    plan: Plan,
    path: Path,
    *,
    load: bool = True,
    exact: Mapping[str, Exactness] | None = None,
) -> Verification:
    """Compare a file with its plan; load it and let it answer.

    Args:
        plan: The plan that the file has to follow.
        path: the file.
        load: run it in a child process (where llama-cpp-python is installed).
        exact: The exact tensors' differences from the base.

    Raises:
        VerificationError: it is not what the plan says; all differences with it.
        ToolError, ChildError: it does not load; the toolchain's fault, or its own.
    """
    gguf = read_gguf(path)
    differences = tuple(_differences(plan, gguf))
    if differences:
        error = VerificationError(
            "verify",
            path,
            f"{len(differences)} differences from the plan, the first: "
            f"{differences[0]}",
            "do not use this file; make it again with the pinned llama.cpp",
        )
        error.differences = differences
        raise error
    answer = _answer(path) if load and can_load() else None
    found = {tensor.name: tensor.ggml_type for tensor in gguf.tensors}
    return Verification(
        plan_sha256=plan.sha256,
        file_sha256=store.sha256_file(path),
        planned_size_bytes=plan.totals.file_size_bytes,
        found_size_bytes=gguf.file_bytes,
        tensors=tuple(
            VerifiedTensor(
                name=tensor.name,
                planned_type=tensor.written_type,
                found_type=found[tensor.name],
            )
            for tensor in plan.tensors
        ),
        prompt=None if answer is None else PROMPT,
        answer=answer,
        exact=dict(exact or {}),
    )


def check_bindings(stage: str) -> None:
    """Refuse to begin what needs the bindings without them.

    Raises:
        ToolError: llama-cpp-python is missing.
    """
    if not can_load():
        raise ToolError(
            stage, "llama-cpp-python", "is not installed", "run `ewq setup`"
        )


def _differences(plan: Plan, gguf: GgufFile) -> Iterator[str]:
    planned = {tensor.name: tensor for tensor in plan.tensors}
    found = {tensor.name: tensor for tensor in gguf.tensors}
    for name in sorted(planned.keys() | found.keys()):
        if name not in found:
            yield f"{name}: planned {planned[name].written_type}, absent"
        elif name not in planned:
            yield f"{name}: found {found[name].ggml_type}, not planned"
        elif _ggml_shape(found[name].shape) != _ggml_shape(planned[name].shape):
            yield f"{name}: planned {planned[name].shape}, found {found[name].shape}"
        elif found[name].ggml_type != planned[name].written_type:
            yield (
                f"{name}: planned {planned[name].written_type}, "
                f"found {found[name].ggml_type}"
            )
    sha256 = gguf.kv.get("ewq.plan.sha256")
    if sha256 != plan.sha256:
        yield f"ewq.plan.sha256: planned {plan.sha256}, found {sha256}"
    for key, value in (file_keys(plan.imatrix) if plan.imatrix else {}).items():
        if gguf.kv.get(key) != value:
            yield f"{key}: planned {value}, found {gguf.kv.get(key)}"
    totals = plan.totals
    if not totals.is_estimate and gguf.file_bytes != totals.file_size_bytes:
        yield f"size: planned {totals.file_size_bytes}, found {gguf.file_bytes} bytes"


def _ggml_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the slowest dimensions of 1, which llama-quantize does not write."""
    return shape[-n_dims(shape) :]


def _answer(path: Path) -> str:
    """The file's answer to the prompt, from a child that may crash.

    Raises:
        ToolError: it does not load or compute because the toolchain is at fault.
        ChildError: it does not load or compute though it is what its plan says.
        VerificationError: its numbers are broken.
    """
    argv = python_argv(
        "ewq_gguf.llamacpp.speak_child", path.absolute(), PROMPT, str(_N_TOKENS)
    )
    try:
        with child_log("load", path) as log_path:
            text = run(
                argv,
                stage="verify",
                log_path=log_path,
                env={"PYTHONSAFEPATH": "1"},  # the working folder may hold any code
                timeout_seconds=stall_seconds("verify")
                + path.stat().st_size / _SLOWEST_DISK,
            )
    except ChildError as error:
        error.subject = printable(path)
        if "took longer" in error.problem:
            error.remedy = f"set {TIMEOUT_VARIABLE} to more seconds, or check the disk"
        error.problem = f"is what its plan says, and does not load: {error.problem}"
        raise explain_failure(error) from error
    result = json.loads(next(x for x in reversed(text.splitlines()) if x[:1] == "{"))
    if not result["is_finite"]:
        broken = VerificationError(
            "verify",
            path,
            "is numerically broken: its logits hold NaN",
            "do not use it",
        )
        raise explain_failure(broken)
    return str(result["answer"])

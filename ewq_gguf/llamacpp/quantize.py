"""From a plan and a base GGUF to the mixed GGUF, by llama-quantize.

Every quantisable tensor is named by a pattern of its own, anchored and escaped:
llama-quantize searches patterns anywhere in a name and takes the first that matches,
so `blk.1.*` would take layers 10 to 19 too. It exits with 0 when it ignores one, so
the file counts as made only when every tensor was read back (verify.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Required, TypedDict, Unpack

from ewq_gguf import store
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.checkpoint.gguf_source import open_gguf
from ewq_gguf.checkpoint.overflow import find_overflows, overflow_error
from ewq_gguf.errors import (
    ChildError,
    InputError,
    VerificationError,
)
from ewq_gguf.llamacpp.exact import write_exactly
from ewq_gguf.llamacpp.imatrix import check_imatrix
from ewq_gguf.llamacpp.logs import child_log
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.llamacpp.verify import verify_file
from ewq_gguf.plan.assemble import provenance
from ewq_gguf.plan.check import check_sound
from ewq_gguf.plan.importance import IMATRIX_FILE
from ewq_gguf.process import run
from ewq_gguf.records import Plan, Verification
from ewq_gguf.tensor_names import nearest_name

# Fixed relative names inside the work folder: no path can enter the file.
_BASE, _TYPES, _OUT = "base.gguf", "tensor-types.txt", "out.gguf"


class Work(TypedDict, total=False):
    """How `quantize` works, as its keyword arguments.

    Attributes:
        n_threads: Threads of llama-quantize.
        load: Whether to load the file and let it answer too; true by default.
        imatrix: The plan's importance matrix.
        on_progress: Called with the finished share, 0 to 1.
    """

    n_threads: Required[int]
    load: bool
    imatrix: Path | None
    on_progress: Callable[[float], None] | None


_PROGRESS = re.compile(r"^\[\s*(\d+)/\s*(\d+)\]")


def tensor_pattern(name: str) -> str:
    r"""A regular expression that matches this tensor name and no other.

    llama-quantize lowers the case of patterns, splits them at `=` and at blanks, and
    reads them as ECMAScript, byte by byte: every byte but [a-z0-9_] is written as
    `\xHH`, for legibility `.` and `-` as themselves.
    """
    escaped = (
        chr(byte)
        if byte in b"abcdefghijklmnopqrstuvwxyz0123456789_"
        else rf"\{chr(byte)}"
        if byte in b".-"
        else rf"\x{byte:02x}"
        for byte in name.encode()
    )
    return f"^{''.join(escaped)}$"


def tensor_types(plan: Plan) -> str:
    """The text of `--tensor-type-file`: one line per quantisable tensor.

    Raises:
        InputError: the plan contradicts itself.
    """
    check_sound(plan)
    return "".join(
        f"{tensor_pattern(tensor.name)}={tensor.ggml_type.lower()}\n"
        for tensor in plan.tensors
        if tensor.is_quantizable
    )


def quantize_argv(
    plan: Plan, tool: str | Path, *, base: str, types: str, out: str, n_threads: int
) -> list[str]:
    """llama-quantize's command line for a plan.

    The importance matrix stands under its fixed name where the command runs.
    """
    pairs = provenance(plan.model, plan.ewq_version, plan.sha256)
    overrides = [
        argument
        for key, value in sorted(pairs.items())
        for argument in ("--override-kv", f"{key}=str:{value}")
    ]
    imatrix = ["--imatrix", IMATRIX_FILE] if plan.imatrix else []
    return [
        str(tool),
        "--tensor-type-file",
        types,
        *imatrix,
        *overrides,
        base,
        out,
        plan.ftype,
        str(n_threads),
    ]


def quantize(
    plan: Plan,
    base: Path,
    out: Path,
    toolchain: Toolchain,
    **work: Unpack[Work],
) -> Verification:
    """Write the mixed GGUF; it appears at `out` only when it is what the plan says.

    Args:
        plan: A type for every tensor.
        base: the 16- or 32-bit GGUF of the same checkpoint.
        out: the final path; replaced when the new file is verified.
        toolchain: whose llama-quantize to use.
        work: see Work.

    Raises:
        InputError: the base GGUF is another model's, the importance matrix not the
            plan's, or the plan contradicts itself.
        ChildError: llama-quantize failed.
        VerificationError: it wrote something else than planned.
        ResourceError: the disk is full.
    """
    tool = toolchain.tool("llama-quantize")
    types = tensor_types(plan)
    check_base(plan, base)
    check_f16(plan, base)
    imatrix, on_progress = work.get("imatrix"), work.get("on_progress")
    check_imatrix(plan, imatrix)
    store.check_distinct(out, [base, *([imatrix] if imatrix else [])], "quantize")
    folder = store.ensure_dir(out.absolute().parent, "quantize")
    store.check_free(folder, plan.totals.file_size_bytes, "quantize")

    with store.work_dir(out, stage="quantize") as inside:
        (inside / _BASE).symlink_to(base.resolve())
        (inside / _TYPES).write_text(types)
        if imatrix:
            (inside / IMATRIX_FILE).symlink_to(imatrix.resolve())
        argv = quantize_argv(
            plan, tool, base=_BASE, types=_TYPES, out=_OUT, n_threads=work["n_threads"]
        )
        try:
            _run_quantize(argv, inside, out, on_progress)
        except ChildError as error:
            # All that llama-quantize says of a full disk; its folder is there.
            if any("iostream error" in text for text in error.log_tail):
                raise store.disk_full("quantize", folder) from error
            raise toolchain.explain(error) from error
        exact = write_exactly(
            plan,
            base,
            inside / _OUT,
            toolchain.lib_dir,
            n_threads=work["n_threads"],
        )
        verification = verify_file(
            plan, inside / _OUT, load=work.get("load", True), exact=exact
        )
        store.publish(inside / _OUT, out)
    return verification


def _run_quantize(
    argv: list[str],
    folder: Path,
    out: Path,
    on_progress: Callable[[float], None] | None,
) -> None:
    """Run llama-quantize in a work folder, with a log beside `out` if it fails."""

    def line(text: str) -> None:
        if on_progress and (match := _PROGRESS.match(text)):
            on_progress(int(match[1]) / int(match[2]))

    with child_log("quantize", out) as log_path:
        run(argv, stage="quantize", log_path=log_path, cwd=folder, on_line=line)


def check_base(plan: Plan, base: Path) -> None:
    """Refuse a base GGUF of another model than the plan's.

    Names, shapes and types are compared; whether the weights are the plan's is not
    known of a base that `ewq convert` wrote.

    Raises:
        InputError: it is no sound GGUF, or a tensor is missing or has another shape
            or type.
    """
    try:
        tensors = read_gguf(base).tensors
    except VerificationError as error:
        raise InputError(
            "quantize", base, error.problem, "make it with `ewq convert`"
        ) from error
    found = {t.name: (t.shape, t.ggml_type) for t in tensors}
    planned = {t.name: (t.shape, t.base_type) for t in plan.tensors}
    if found == planned:
        return
    if missing := min(planned.keys() - found.keys(), default=None):
        raise InputError(
            "quantize",
            base,
            f"is not the plan's base: it has no {missing}, the nearest name is "
            f"{nearest_name(missing, found)}",
            f"make the base of {plan.model.name} with `ewq convert`",
        )
    name = min(set(planned.items()) ^ set(found.items()))[0]
    raise InputError(
        "quantize",
        base,
        f"is not the plan's base: {name} is {found.get(name, 'absent')}, planned for "
        f"{planned.get(name, 'none')}",
        f"make the base of {plan.model.name} with `ewq convert`",
    )


def check_f16(plan: Plan, base: Path) -> None:
    """Refuse to write F16 tensors of weights in the base that F16 cannot hold.

    Raises:
        InputError: naming the first such weight.
    """
    names = {
        t.name for t in plan.tensors if t.written_type == "F16" != t.base_type
    }  # also where no block of the type asked for fits its rows
    if not names:
        return
    for overflow in find_overflows(open_gguf(base), names):
        raise overflow_error("quantize", overflow, "plan with --raw-type bf16")

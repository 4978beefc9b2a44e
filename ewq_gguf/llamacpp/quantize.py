"""From a plan and a base GGUF to the mixed GGUF, by llama-quantize.

Every quantisable tensor is named by a pattern of its own, anchored and escaped:
llama-quantize searches patterns anywhere in a name and takes the first that matches,
so `blk.1.*` would take layers 10 to 19 too. It exits with 0 when it ignores one, so
the file counts as made only when every tensor was read back (verify.py).
"""

from __future__ import annotations

import re
import shlex
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
    printable,
)
from ewq_gguf.llamacpp.converter import text_flags
from ewq_gguf.llamacpp.exact import write_exactly
from ewq_gguf.llamacpp.imatrix import check_imatrix
from ewq_gguf.llamacpp.logs import child_log
from ewq_gguf.llamacpp.self_test import explain_failure
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
        n_threads: for llama-quantize.
        load: also load the file and let it answer; the default.
        imatrix: the plan's importance matrix.
        on_progress: told the finished share, 0 to 1.
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
        plan: which type for which tensor.
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

    def line(text: str) -> None:
        if on_progress and (match := _PROGRESS.match(text)):
            on_progress(int(match[1]) / int(match[2]))

    with store.work_dir(out, stage="quantize") as inside:
        (inside / _BASE).symlink_to(base.resolve())
        (inside / _TYPES).write_text(types)
        if imatrix:
            (inside / IMATRIX_FILE).symlink_to(imatrix.resolve())
        argv = quantize_argv(
            plan, tool, base=_BASE, types=_TYPES, out=_OUT, n_threads=work["n_threads"]
        )
        try:
            with child_log("quantize", out) as log_path:
                run(argv, stage="quantize", log_path=log_path, cwd=inside, on_line=line)
        except ChildError as error:
            # All that llama-quantize says of a full disk; its folder is there.
            if any("iostream error" in text for text in error.log_tail):
                raise store.disk_full("quantize", folder) from error
            raise (explain_failure(error) if toolchain.lib_dir else error) from error
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


def export_sh(plan: Plan) -> str:
    """A shell script that makes the plan's file by hand.

    It needs llama.cpp's converter (LLAMA_CPP), llama-quantize (LLAMA_BIN) and a Python
    with the converter's packages (PYTHON), the checkpoint's folder as $1, the output as
    $2 and the plan's importance matrix, if it has one, as $3, and gives the same bytes,
    but for what is exact because it is quantised already. With a GGUF source as $1,
    nothing is converted.

    Raises:
        InputError: the plan contradicts itself, or the converter alone cannot make its
            base.
    """
    types = tensor_types(plan)
    _check_scriptable(plan)
    argv = quantize_argv(
        plan,
        '"$quantize"',
        base=_BASE,
        types=_TYPES,
        out='"$out"',
        n_threads=0,
    )
    quoted = [arg if arg.startswith('"$') else shlex.quote(arg) for arg in argv]
    source, base = (
        ("GGUF", f'ln -s "$(full "$1")" "$work/{_BASE}"\n')
        if plan.model.is_gguf
        else ("FOLDER", _convert_sh(plan))
    )
    usage = f"{source} OUT{' IMATRIX' if plan.imatrix else ''}"
    title, exact = printable(plan.model.name), exact_comment(plan)
    return f"""#!/bin/sh
# {title}, policy {plan.policy.name}: {plan.totals.file_size_bytes} bytes
{exact}# usage: LLAMA_CPP=SOURCE [LLAMA_BIN=BIN] [PYTHON=python3] sh {title}.sh {usage}
# (`ewq toolchain info` names its source_dir and bin_dir)
set -eu
: "${{LLAMA_CPP:?set LLAMA_CPP to the folder of convert_hf_to_gguf.py}}"
PATH="${{LLAMA_BIN:-$LLAMA_CPP/build/bin}}:$PATH"
[ ! -e "$2" ] || {{ echo "$2 exists" >&2; exit 2; }}
full() {{ (cd -- "$(dirname -- "$1")" && printf '%s\\n' "$PWD/$(basename -- "$1")"); }}
out=$(full "$2")
quantize=$(full "$(command -v llama-quantize)")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{_imatrix_sh(plan)}{base}cat > "$work/{_TYPES}" <<'TYPES'
{types}TYPES
cd "$work"
{" ".join(quoted)}
"""


def exact_comment(plan: Plan) -> str:
    """Lines for a shell on the tensors that llama-quantize alone would not keep."""
    n_exact = sum(tensor.is_exact for tensor in plan.tensors)
    return (
        f"# {n_exact} matrices that are quantised already are exact only as\n"
        "# `ewq quantize` writes them: llama-quantize alone moves their weights\n"
        if n_exact
        else ""
    )


def _check_scriptable(plan: Plan) -> None:
    """Refuse a plan whose base llama.cpp's converter does not make by itself.

    Raises:
        InputError: adapters are merged first, or the converter has no option for what
            was chosen.
    """
    model = plan.model
    needs = [f"--adapter {adapter.name}" for adapter in model.adapters]
    again = ["--adapter DIR"] * len(needs)
    if "chat_template" in model.chosen:
        needs.append("--chat-template")
        again.append("--chat-template FILE")
    if "pre" in model.chosen:  # the plan tells it to `ewq gguf`
        needs.append(f"--pre {model.chosen['pre']}")
    if needs:
        raise InputError(
            "plan",
            model.name,
            f"is planned with {', '.join(needs)}, which llama.cpp's converter has no "
            "option for: a script would make another file",
            f"make the file with `{' '.join(['ewq gguf MODEL --plan PLAN', *again])}`",
        )


def _imatrix_sh(plan: Plan) -> str:
    """The lines of the script that check and place the importance matrix."""
    if plan.imatrix is None:
        return ""
    sha256 = shlex.quote(plan.imatrix.file_sha256)
    return f"""[ "$(sha256sum < "$3")" = {sha256}"  -" ] || {{
  echo "$3 is not the plan's importance matrix" >&2; exit 3; }}
ln -s "$(full "$3")" "$work/{IMATRIX_FILE}"
"""


def _convert_sh(plan: Plan) -> str:
    """The lines of the script that make the base GGUF."""
    outtype = plan_outtype(plan).lower()
    name = shlex.quote(plan.model.name)
    flags = "".join(f" {flag}" for flag in text_flags(plan.model))
    return f"""mkdir "$work"/{name}
ln -s "$(cd "$1" && pwd)"/* "$work"/{name}/
"${{PYTHON:-python3}}" "$LLAMA_CPP/convert_hf_to_gguf.py" "$work"/{name} \\
  --outfile "$work/{_BASE}" --outtype {outtype} \\
  --model-name={name}{flags}
"""


def plan_outtype(plan: Plan) -> str:
    """The float type the plan's base GGUF was planned with."""
    types = {t.base_type for t in plan.tensors if t.is_quantizable}
    return types.pop() if len(types) == 1 else "F32"

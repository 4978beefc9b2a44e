"""The shell script that makes a plan's file without `ewq`."""

from __future__ import annotations

import shlex

from ewq_gguf.errors import (
    InputError,
    printable,
)
from ewq_gguf.llamacpp.converter import text_flags
from ewq_gguf.llamacpp.quantize import _BASE, _TYPES, quantize_argv, tensor_types
from ewq_gguf.plan.importance import IMATRIX_FILE
from ewq_gguf.records import Plan


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

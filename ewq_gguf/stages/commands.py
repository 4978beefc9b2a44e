"""Commands for a shell that do what stages do; none runs here."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from ewq_gguf.llamacpp.convert import convert_argv
from ewq_gguf.llamacpp.converter import content_flags
from ewq_gguf.llamacpp.export_script import exact_comment
from ewq_gguf.llamacpp.quantize import quantize_argv
from ewq_gguf.plan.importance import IMATRIX_FILE
from ewq_gguf.records import Plan
from ewq_gguf.stages.companions import companion_contents
from ewq_gguf.stages.converting import base_target
from ewq_gguf.stages.options import Options
from ewq_gguf.stages.run import Run

_TYPES_FILE = "tensor-types.txt"
#: Choices that llama.cpp's converter has no option for.
_BEYOND_CONVERTER = ("chat_template", "pre")


def choices_given(options: Options, names: Iterable[str]) -> list[str]:
    """Those of a run's choices that are not the defaults, each as a shell takes it."""
    default = Options()
    return [
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
        for name in names
        if (value := getattr(options, name)) != getattr(default, name)
    ]


def convert_commands(run: Run, out: Path | None, outtype: str) -> list[str]:
    """The converter's command line, after comments on what it is not told.

    Args:
        run: the model and the options.
        out: path of the base GGUF; None for `NAME-TYPE.gguf`.
        outtype: `F16`, `BF16`, `F32`, or `auto` for the checkpoint's own.

    Raises:
        InputError: the model is a GGUF already.
    """
    toolchain, checkpoint = run.toolchain, run.checkpoint
    out, ggml_type = base_target(run, out, outtype)
    flags, name = content_flags(checkpoint, "text"), run.identity.name
    argv = convert_argv(toolchain, checkpoint.folder, name, ggml_type, out, flags)
    return [
        *(
            f"# the converter has no option for {choice}"
            for choice in choices_given(run.options, _BEYOND_CONVERTER)
        ),
        shlex.join(["python3", *argv]),
        *(
            f"# and again with --{content} for what goes beside it"
            for content in companion_contents(run)
        ),
    ]


def quantize_commands(
    run: Run, plan: Plan, plan_path: str, base: str, out: str
) -> list[str]:
    """llama-quantize's command line, after those that write what it reads.

    Args:
        run: the options.
        plan: the finished plan.
        plan_path: the plan's file.
        base: the base GGUF.
        out: path of the file.
    """
    argv = quantize_argv(
        plan,
        run.toolchain.tool("llama-quantize"),
        base=base,
        types=_TYPES_FILE,
        out=out,
        n_threads=run.options.n_threads,
    )
    export = ["ewq", "plan", "export", plan_path, "--format", "tensor-type-file"]
    commands = [[*export, "-o", _TYPES_FILE]]
    if plan.imatrix and run.options.imatrix:
        # The file's name goes into the GGUF, and has to be the same everywhere.
        commands.append(["ln", "-s", str(run.options.imatrix), IMATRIX_FILE])
    return [
        *map(shlex.join, commands),
        *exact_comment(plan).splitlines(),
        shlex.join(argv),
    ]

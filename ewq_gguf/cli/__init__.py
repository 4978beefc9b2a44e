"""`ewq`: one command per file, each loaded when it is called."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TextIO

import click

from ewq_gguf import disk
from ewq_gguf._version import __version__
from ewq_gguf.errors import (
    ChildError,
    EwqError,
    ResourceError,
    ToolError,
    VerificationError,
    printable,
)

#: Commands by task, each with its help line. A command's module, which has its name,
#: is imported only when it is called.
_SECTIONS = {
    "Make a GGUF": {
        "gguf": "Make a verified mixed-precision GGUF of a checkpoint.",
    },
    "Step by step": {
        "scan": "Measure the entropy of every tensor of a checkpoint.",
        "plan": "Choose each tensor's type and predict the file's size.",
        "convert": "Write the unquantised base GGUF of a checkpoint.",
        "imatrix": "Compute an importance matrix (llama-imatrix).",
        "quantize": "Write the planned GGUF from a base GGUF (llama-quantize).",
        "verify": "Compare a GGUF with its plan, tensor by tensor.",
    },
    "Evaluate": {
        "bench": "Evaluate GGUF files: PPL, KLD, MMLU, speed, memory.",
        "reference": "Store the base model's logits once, for KL divergence.",
        "compare": "Compare mixed plans with presets of similar size.",
        "frontier": "Plot file size against KL divergence, best files included.",
    },
    "Study EWQ and FastEWQ": {
        "study": "Measure sensitivities, controls and factors with many files.",
        "fastewq": "Evaluate and train FastEWQ's classifier of layers.",
        "paper": "Recompute the figures in the paper's tables.",
    },
    "Installation": {
        "setup": "Build llama.cpp and install its Python bindings.",
        "doctor": "Check the installation and say how to repair it.",
        "toolchain": "Build or test llama.cpp, or say which build is used.",
        "demo": "Write the built-in model's checkpoint to a folder.",
    },
}


class _Commands(click.Group):
    """The commands by name, imported when called; their help lines are known."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for commands in _SECTIONS.values() for name in commands]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        command: click.Command = getattr(import_module(f"ewq_gguf.cli.{name}"), name)
        return command

    def format_commands(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(list(commands.items()))


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ewq")
@click.option("--debug", is_flag=True, help="Show tracebacks.  [EWQ_DEBUG=1]")
def ewq(debug: bool) -> None:
    """Mixed-precision GGUF files by weight entropy: planned, exact, verified.

    MODEL is a folder, a .safetensors or unquantised .gguf file, a Hub id (org/name),
    or `demo`.
    """
    if debug:
        os.environ["EWQ_DEBUG"] = "1"


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that children and temporary files go too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is errors.py's."""
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the terminal cannot spell is escaped, never a traceback.
            stream.reconfigure(errors="backslashreplace")
    try:
        # Not `ewq.main`: it has ideas of its own about interrupts and closed pipes.
        args = list(sys.argv[1:] if argv is None else argv)
        with ewq.make_context("ewq", args) as context:
            ewq.invoke(context)
        sys.stdout.flush()
    except EwqError as error:
        return _report(error)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        _tell(error.format_message())
        return error.exit_code
    except click.ClickException as error:
        _tell(f"ewq: usage: {printable(error.format_message())}")
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _tell("ewq: interrupted")
        return 130
    except _Terminated:
        _tell("ewq: terminated")
        return 143
    except SystemExit as stop:
        # rich turns a closed stdout into this; anybody else means it.
        if not isinstance(stop.__context__, BrokenPipeError):
            return stop.code if isinstance(stop.code, int) else 1
        return 0
    except BrokenPipeError:
        # The reader of stdout left, as `| head` does: nothing to say, nobody to tell.
        silence(sys.stdout)
        return 0
    except ImportError as error:
        if (error.name or "ewq_gguf").startswith("ewq_gguf"):
            raise  # a bug of ours
        problem = f"cannot be imported ({error})"
        return _report(ToolError("packages", error.name, problem, "run `ewq doctor`"))
    except OSError as error:  # a full or broken disk where nothing better was said
        return _report(_system_error(error))
    return 0


def _system_error(error: OSError) -> ResourceError:
    """The system's own message, where no better one was given."""
    path = error.filename or disk.full_folder(disk.usual_folders())
    remedy = "check the disk and its permissions"
    if disk.is_full(error) and path is not None:
        remedy = f"free some space, or {disk.advice(Path(path))}"
    return ResourceError("system", path, error.strerror or str(error), remedy)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _report(error: EwqError) -> int:
    if os.environ.get("EWQ_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    lines = [f"ewq: {error}"]
    if isinstance(error, VerificationError):
        lines += [f"  {printable(line)}" for line in error.differences]
    if isinstance(error, ChildError):
        lines += [f"  | {line}" for line in error.log_tail]
    _tell(*lines)
    return error.exit_code


def silence(stream: TextIO) -> None:
    """Let what is written to a stream whose reader has left go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _tell(*lines: str) -> None:
    """Say something on stderr, whose reader may have left, as with `2>&1 | head`."""
    try:
        for line in lines:
            click.echo(line, err=True)
    except BrokenPipeError:
        silence(sys.stderr)

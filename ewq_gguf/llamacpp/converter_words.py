"""The messages of llama.cpp's converter: the reason it stopped, and its warnings."""

from __future__ import annotations

import re

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.leftovers import no_place
from ewq_gguf.errors import ChildError, EwqError, InputError, printable

MAX_WARNINGS = 5

_EXCEPTION = re.compile(r"^([\w.]*(?:Error|Exception))(?:: (.*))?$")
_WARNING = re.compile(
    r"^WARNING:(?:hf-to-gguf|gguf[\w.-]*):(.*)|\b(RuntimeWarning: .*)"
)
_UNKNOWN_TENSOR = re.compile(r"Can not map tensor '(.*)'")
_HPARAM = re.compile(r"hparams\[|find_hparam")
#: What it says of sound checkpoints.
_NOISE = ("Unknown RoPE type: default", "Duplicated key name ")
#: What it raises about a checkpoint; anything else is about the machine, or a mistake.
_ABOUT_INPUT = (
    "ValueError", "KeyError", "NotImplementedError", "FileNotFoundError",
    "AssertionError", "IndexError", "TypeError", "UnicodeDecodeError",
)  # fmt: skip


def converter_error(checkpoint: Checkpoint, error: ChildError) -> EwqError:
    """A converter's traceback as one line with its reason.

    Args:
        checkpoint: it was given.
        error: how it ended.

    Returns:
        An InputError where it refuses the checkpoint, else the error as it was.
    """
    lines = error.output.splitlines()
    found = [(i, m) for i, line in enumerate(lines) if (m := _EXCEPTION.match(line))]
    if error.return_code < 0 or not found:
        return error
    index, match = found[-1]
    name, text = match[1].rpartition(".")[2], (match[2] or "").strip()
    if unknown := _UNKNOWN_TENSOR.search(text):
        return no_place(checkpoint, [unknown[1]])
    if name not in _ABOUT_INPUT:
        return error
    if name == "FileNotFoundError":  # its folder is ours, made for the converter
        text = re.sub(r"\S*/([^/\s']+)", r"\1", text)
    reason = f"{name}: {text}" if text else name
    if name == "KeyError" and index and _HPARAM.search(lines[index - 1]):
        reason = f"config.json has no {text}"
    elif name == "AssertionError" and index:
        reason = f"{reason} ({lines[index - 1].strip()})"
    return InputError(
        "convert",
        checkpoint.folder,
        f"llama.cpp's converter refuses it: {printable(reason)}",
        f"check the checkpoint's files; the converter's log is {error.log_path}",
    )


def converter_warnings(output: str) -> list[str]:
    """The converter's warnings, each once whatever its numbers, few enough to read.

    Args:
        output: all that it printed.
    """
    found: dict[str, str] = {}
    for line in output.splitlines():
        if match := _WARNING.search(line):
            text = (match[1] or match[2] or "").strip(" *")
            if text and not text.startswith(_NOISE):
                found.setdefault(re.sub(r"\d+", "N", text), text)
    texts = [printable(text) for text in found.values()]
    if len(texts) <= MAX_WARNINGS:
        return texts
    return [*texts[:MAX_WARNINGS], f"{len(texts) - MAX_WARNINGS} more warnings"]

"""Choices of a user that the converter is told beside the checkpoint's files.

A chat template, the pre-tokenizer's name, the heads for further tokens: each becomes
part of the checkpoint's identity, and with it of every cache key and of the plan. The
checkpoint itself is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.bench.answers.template_child import syntax_error
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.other_tensors import head_tensors
from ewq_gguf.checkpoint.other_tensors import n_promised as promised_heads
from ewq_gguf.errors import EwqError, InputError, UsageError
from ewq_gguf.llamacpp.converter import UnknownPreTokenizerError
from ewq_gguf.llamacpp.heads import can_leave_heads_out
from ewq_gguf.llamacpp.pretokenizer import check_name, fits
from ewq_gguf.llamacpp.self_test import can_load
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.stages.options import Options, Progress

_MAX_TEMPLATE_BYTES = 1 << 20
_TEMPLATE_NAME = "chat_template.jinja"
_N_NEAREST = 3


def with_choices(
    checkpoint: Checkpoint,
    options: Options,
    progress: Progress,
    toolchain: Callable[[], Toolchain],
) -> Checkpoint:
    """The checkpoint with what the user chose for its conversion, which is said.

    Args:
        checkpoint: the model as it was found.
        options: settings of the run, the choices among them.
        progress: receiver of notes.
        toolchain: finds llama.cpp; called only where it has to check a choice.

    Raises:
        UsageError: it is a GGUF file, or llama.cpp knows no such pre-tokenizer.
        InputError: the chat template cannot be read or is none.
    """
    chosen = {}
    files = dict(checkpoint.small_files)
    if options.chat_template is not None:
        chosen["chat_template"] = _check_template(options.chat_template)
        files[_TEMPLATE_NAME] = options.chat_template
    if options.pre is not None:
        check_name(options.pre, toolchain())
        chosen["pre"] = options.pre
    if checkpoint.identity.is_gguf and options.mtp != "keep":
        chosen["mtp"] = options.mtp
    elif _leaves_heads_out(checkpoint, options, progress, toolchain):
        chosen["mtp"] = "drop"
    if not chosen:
        return checkpoint
    if checkpoint.identity.is_gguf:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in chosen)
        raise UsageError(
            "convert",
            names,
            f"{checkpoint.folder} is a GGUF file, which is not converted",
            "give the checkpoint that it was made from",
        )
    if options.chat_template is not None:
        progress.note(f"chat template: {options.chat_template}, in place of its own")
    if options.pre is not None:
        progress.note(f"pre-tokenizer: {options.pre}, as chosen")
    identity = checkpoint.identity.model_copy(update={"chosen": chosen})
    return replace(checkpoint, identity=identity, small_files=files, opened="")


def same_tensors(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with those choices alone that decide which tensors there are."""
    chosen = {k: v for k, v in checkpoint.identity.chosen.items() if k == "mtp"}
    files = {k: v for k, v in checkpoint.small_files.items() if k != _TEMPLATE_NAME}
    identity = checkpoint.identity.model_copy(update={"chosen": chosen})
    return replace(checkpoint, identity=identity, small_files=files, opened="")


@contextmanager
def naming_the_nearest(
    checkpoint: Checkpoint, toolchain: Toolchain, progress: Progress
) -> Iterator[None]:
    """Where the pre-tokenizer is not known, say which known ones fit it best.

    Raises:
        UnknownPreTokenizerError: with the names to choose from.
    """
    try:
        yield
    except UnknownPreTokenizerError as error:
        remedy = "name the one it was trained with: --pre NAME"
        if can_load():
            with suppress(EwqError), progress.stage("compare pre-tokenizers"):
                best, *others = fits(checkpoint, toolchain)[:_N_NEAREST]
                equal = [fit.name for fit in others if fit.rank == best.rank]
                also = f" (and so is {' and '.join(equal)})" if equal else ""
                remedy = (
                    f"the nearest known one is {best.name}{also}: {best.text}; if it "
                    f"is right, give --pre {best.name}"
                )
        with_remedy = UnknownPreTokenizerError(
            error.stage, error.subject, error.problem, remedy
        )
        with_remedy.hash = error.hash
        raise with_remedy from error


def say_fit(checkpoint: Checkpoint, toolchain: Toolchain, progress: Progress) -> None:
    """Say how a chosen pre-tokenizer reads the converter's test text."""
    pre = checkpoint.identity.chosen.get("pre")
    if pre is None or not can_load():
        return
    with suppress(EwqError):
        for fit in fits(checkpoint, toolchain, [pre]):
            progress.note(f"pre-tokenizer {pre}: {fit.text}")


def _leaves_heads_out(
    checkpoint: Checkpoint,
    options: Options,
    progress: Progress,
    toolchain: Callable[[], Toolchain],
) -> bool:
    """Whether the converter is told to leave heads for further tokens out.

    It is also where config.json promises heads that the checkpoint does not have: the
    file would lack a layer, and not load.

    Raises:
        UsageError: they should be a file of their own, which cannot be written.
    """
    heads = head_tensors(checkpoint)
    n_promised = promised_heads(checkpoint.config)
    if not heads and options.mtp != "keep":
        progress.note(f"--mtp {options.mtp}: the model has no heads to leave out")
    if (heads and options.mtp == "keep") or not (heads or n_promised):
        return False
    if not heads and checkpoint.is_mapped_by_name:
        return False  # no converter of these families writes heads
    can = can_leave_heads_out(checkpoint, toolchain())
    if not heads:
        if can:
            progress.note(
                f"config.json promises {n_promised} heads for further tokens, the "
                "checkpoint has none: the GGUF has none either"
            )
        return can
    if not can and options.mtp == "separate":
        raise UsageError(
            "convert",
            "--mtp separate",
            f"llama.cpp's converter cannot write the {len(heads)} tensors of "
            f"{checkpoint.identity.hf_architecture}'s heads alone",
            "leave the option away",
        )
    return can


def _check_template(path: Path) -> str:
    """The SHA-256 of a chat template's file.

    Raises:
        InputError: it cannot be read, is too large, or is no template.
    """
    remedy = "give a jinja file such as a chat_template.jinja"
    try:
        n_bytes = path.stat().st_size if path.is_file() else 0
        text = path.read_text("utf-8") if n_bytes <= _MAX_TEMPLATE_BYTES else ""
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise InputError("convert", path, problem, remedy) from error
    except UnicodeDecodeError as error:
        raise InputError("convert", path, "is not UTF-8", remedy) from error
    if n_bytes > _MAX_TEMPLATE_BYTES:
        problem = f"{n_bytes:,} bytes are more than {_MAX_TEMPLATE_BYTES:,}"
        raise InputError("convert", path, problem, remedy)
    if not text.strip():
        raise InputError("convert", path, "is empty", remedy)
    _check_syntax(path, text)
    return store.sha256_file(path)


def _check_syntax(path: Path, text: str) -> None:
    """Let jinja2 parse it, where jinja2 is installed; nothing of it runs."""
    if problem := syntax_error(text):
        raise InputError(
            "convert", path, f"is no jinja template: {problem}", "check the file"
        )

"""The files beside a text model: made, verified, used again, and never lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.errors import InputError, UsageError, VerificationError
from ewq_gguf.llamacpp.companion import (
    CompanionLayout,
    can_look,
    check_header,
    make_companion,
    verify_companion,
)
from ewq_gguf.records import Companion, load_cached
from ewq_gguf.stages.run import Run


@dataclass(frozen=True)
class CompanionFile:
    """A companion where it lies.

    Attributes:
        path: the file.
        companion: its contents, as they were verified.
        is_reused: whether it was there already.
    """

    path: Path
    companion: Companion
    is_reused: bool


def place_companions(
    run: Run, layouts: Iterable[CompanionLayout], text_model: Path
) -> tuple[CompanionFile, ...]:
    """Make or use again the files beside a finished text model; note what it lacks.

    Raises:
        EwqError: a stage failed.
    """
    _say_missing_template(run, text_model)
    return tuple(place_companion(run, layout, text_model) for layout in layouts)


def _say_missing_template(run: Run, path: Path) -> None:
    """Say that a file which answers has no chat template, and how to put one in."""
    kv = read_gguf(path).kv
    if "tokenizer.chat_template" in kv or run.identity.is_gguf:
        return
    if f"{kv.get('general.architecture')}.pooling_type" in kv:
        return  # it makes embeddings
    run.progress.note(
        f"{path} has no chat template, as the model has none: chats take a default "
        "one; give one with --chat-template FILE"
    )


def check_names(run: Run, layouts: Iterable[CompanionLayout], folder: Path) -> None:
    """Refuse other files under the companions' names, before any work.

    Only headers are read; values are compared when the text model is there.

    Raises:
        UsageError: another file has the name of one.
    """
    for layout in layouts:
        out = _companion_path(run, layout, folder)
        if out.exists() and not run.options.force:
            with _not_lost(out, layout):
                check_header(layout, out)


def place_companion(
    run: Run, layout: CompanionLayout, text_model: Path
) -> CompanionFile:
    """A verified companion beside a text model, made where it is not there yet.

    Raises:
        UsageError: another file has its name.
        EwqError: a stage failed.
    """
    out = _companion_path(run, layout, text_model.parent)
    looker = text_model if run.options.load else None
    record = _record_path(run, layout, text_model)
    with store.locked(out, stage="convert"):
        if out.exists() and not run.options.force:
            companion = _existing(run.checkpoint, layout, out, looker, record)
            return CompanionFile(out, _keep(record, companion), True)
        with run.progress.stage(f"convert {layout.content}") as share:
            companion = make_companion(
                run.checkpoint,
                run.toolchain,
                layout,
                out,
                text_model=looker,
                on_progress=share,
            )
    return CompanionFile(out, _keep(record, companion), False)


def _companion_path(run: Run, layout: CompanionLayout, folder: Path) -> Path:
    """Such as `mmproj-NAME-F16.gguf`: llama.cpp's tools look for such names."""
    return folder / f"{layout.content}-{run.identity.name}-{layout.ggml_type}.gguf"


def _record_path(run: Run, layout: CompanionLayout, text_model: Path) -> Path:
    """Where it is kept what was verified of a companion and a text model."""
    stat = text_model.stat()
    key = store.cache_key(
        *(run.checkpoint.signature, run.toolchain.key, repr(layout.header)),
        *(text_model.absolute(), stat.st_size, stat.st_mtime_ns),
    )
    return store.cache_dir("verifications") / f"{layout.content}-{key[:32]}.json"


def _existing(
    checkpoint: Checkpoint,
    layout: CompanionLayout,
    out: Path,
    looker: Path | None,
    record: Path,
) -> Companion:
    """Verify a file that is there, or take what was verified before.

    Raises:
        UsageError: it is another file, or damaged.
    """
    verified = load_cached(Companion, record, "verify")
    must_look = looker is not None and can_look()
    if (
        verified is not None
        and (verified.is_loaded or not must_look)
        and verified.file_sha256 == store.sha256_file(out)
    ):
        return verified
    with _not_lost(out, layout):
        return verify_companion(checkpoint, layout, out, text_model=looker)


@contextmanager
def _not_lost(out: Path, layout: CompanionLayout) -> Iterator[None]:
    """Leave a file alone that turns out to be another one.

    Raises:
        UsageError: in place of the error that verifying it raised.
    """
    try:
        yield
    except (VerificationError, InputError) as error:
        raise UsageError(
            "convert",
            out,
            f"exists and is not this checkpoint's {layout.content} ({error.problem})",
            "use --force to replace it, or another -o",
        ) from error


def _keep(record: Path, companion: Companion) -> Companion:
    """Remember what was verified, for the next run."""
    store.write_text(record, companion.to_json(), stage="verify", force=True)
    return companion

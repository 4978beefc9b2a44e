"""The files beside a text model: made, verified, used again, and never lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.errors import InputError, UsageError, VerificationError
from ewq_gguf.llamacpp.companion import (
    CompanionLayout,
    can_look,
    check_header,
    make_companion,
    verify_companion,
)
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.records import Companion, load_cached
from ewq_gguf.stages.choosing import say_missing_template
from ewq_gguf.stages.options import Options, Progress


@dataclass(frozen=True)
class CompanionFile:
    """A companion where it lies.

    Attributes:
        path: of the file.
        found: what was verified in it.
        is_reused: whether it was there already.
    """

    path: Path
    found: Companion
    is_reused: bool


def place_companions(
    checkpoint: Checkpoint,
    toolchain: Toolchain,
    layouts: Iterable[CompanionLayout],
    text_model: Path,
    options: Options,
    progress: Progress,
) -> tuple[CompanionFile, ...]:
    """What goes beside a finished text model; what it lacks is said.

    Raises:
        EwqError: of the stage that failed.
    """
    say_missing_template(checkpoint, text_model, progress)
    return tuple(
        place_companion(checkpoint, toolchain, layout, text_model, options, progress)
        for layout in layouts
    )


def check_names(
    checkpoint: Checkpoint,
    layouts: Iterable[CompanionLayout],
    folder: Path,
    options: Options,
) -> None:
    """Refuse other files under the companions' names, before any work.

    Only headers are read; values are compared when the text model is there.

    Raises:
        UsageError: another file has the name of one.
    """
    for layout in layouts:
        out = _companion_path(checkpoint, layout, folder)
        if out.exists() and not options.force:
            with _not_lost(out, layout):
                check_header(layout, out)


def place_companion(
    checkpoint: Checkpoint,
    toolchain: Toolchain,
    layout: CompanionLayout,
    text_model: Path,
    options: Options,
    progress: Progress,
) -> CompanionFile:
    """A verified companion beside a text model, made where it is not there yet.

    Raises:
        UsageError: another file has its name.
        EwqError: of the stage that failed.
    """
    out = _companion_path(checkpoint, layout, text_model.parent)
    looker = text_model if options.load else None
    record = _record_path(checkpoint, layout, toolchain, text_model)
    with store.locked(out, stage="convert"):
        if out.exists() and not options.force:
            found = _existing(checkpoint, layout, out, looker, record)
            return CompanionFile(out, _keep(record, found), True)
        with progress.stage(f"convert {layout.content}") as share:
            found = make_companion(
                checkpoint,
                toolchain,
                layout,
                out,
                text_model=looker,
                on_progress=share,
            )
    return CompanionFile(out, _keep(record, found), False)


def _companion_path(
    checkpoint: Checkpoint, layout: CompanionLayout, folder: Path
) -> Path:
    """Such as `mmproj-NAME-F16.gguf`: llama.cpp's tools look for such names."""
    name = f"{layout.content}-{checkpoint.identity.name}-{layout.ggml_type}.gguf"
    return folder / name


def _record_path(
    checkpoint: Checkpoint,
    layout: CompanionLayout,
    toolchain: Toolchain,
    text_model: Path,
) -> Path:
    """Where it is kept what was verified of a companion and a text model."""
    stat = text_model.stat()
    key = store.sha256_text(
        f"{checkpoint.signature} {toolchain.key} {layout.header!r} "
        f"{text_model.absolute()} {stat.st_size} {stat.st_mtime_ns}"
    )
    return store.cache_dir("verifications") / f"{layout.content}-{key[:32]}.json"


def _existing(
    checkpoint: Checkpoint,
    layout: CompanionLayout,
    out: Path,
    looker: Path | None,
    record: Path,
) -> Companion:
    """What is known of a file that is there, or is found now.

    Raises:
        UsageError: it is another file, or damaged.
    """
    known = load_cached(Companion, record, "verify")
    must_look = looker is not None and can_look()
    if (
        known is not None
        and (known.is_loaded or not must_look)
        and known.file_sha256 == store.sha256_file(out)
    ):
        return known
    with _not_lost(out, layout):
        return verify_companion(checkpoint, layout, out, text_model=looker)


@contextmanager
def _not_lost(out: Path, layout: CompanionLayout) -> Iterator[None]:
    """Leave a file alone that turns out to be another one.

    Raises:
        UsageError: in place of what was found in it.
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


def _keep(record: Path, found: Companion) -> Companion:
    """Remember what was verified, for the next run."""
    store.write_text(record, found.to_json(), stage="verify", force=True)
    return found

"""The base GGUF of a checkpoint, in the cache."""

from __future__ import annotations

from pathlib import Path

from ewq_gguf import store
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.errors import InputError, VerificationError
from ewq_gguf.llamacpp.convert import base_type, convert
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.stages.choosing import naming_the_nearest
from ewq_gguf.stages.options import SILENT, Progress
from ewq_gguf.stages.overflow import check_base


def base_file(
    checkpoint: Checkpoint,
    toolchain: Toolchain,
    *,
    progress: Progress = SILENT,
) -> Path:
    """The base GGUF of a checkpoint in the cache, made on first use; or itself."""
    if checkpoint.identity.is_gguf:
        checkpoint.check_unchanged("quantize")
        return checkpoint.shards[0].path
    outtype = base_type(checkpoint)
    key = store.sha256_text(f"{checkpoint.signature} {outtype} {toolchain.key}")
    name = f"{checkpoint.identity.name}-{outtype}-{key[:16]}.gguf"
    path = store.cache_dir("base") / name
    with store.locked(path, stage="convert", wait=True):
        if not _is_sound(path):
            check_base(checkpoint, toolchain, outtype)
            with (
                naming_the_nearest(checkpoint, toolchain, progress),
                progress.stage("convert") as share,
            ):
                convert(checkpoint, toolchain, path, outtype=outtype, on_progress=share)
    return path


def _is_sound(base: Path) -> bool:
    """Whether a cached base GGUF is there and whole."""
    try:
        read_gguf(base)
    except (VerificationError, InputError):
        return False
    return True

"""The base GGUF under a name of the user's, and what goes beside it."""

from __future__ import annotations

from pathlib import Path

from ewq_gguf import store
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.llamacpp.convert import convert
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.stages.choosing import (
    naming_the_nearest,
)
from ewq_gguf.stages.companions import needs_companions, plan_companions
from ewq_gguf.stages.options import SILENT, Options, Progress
from ewq_gguf.stages.placing import CompanionFile, check_names, place_companions
from ewq_gguf.stages.scanning import layout


def convert_model(
    checkpoint: Checkpoint,
    toolchain: Toolchain,
    out: Path,
    outtype: str,
    *,
    options: Options,
    progress: Progress = SILENT,
) -> tuple[CompanionFile, ...]:
    """Write the base GGUF and its companions.

    Args:
        checkpoint: opened by `open_model`.
        toolchain: whose converter to use.
        out: of the base GGUF.
        outtype: `F16`, `BF16` or `F32`.
        options: for the whole run.
        progress: who is told.

    Raises:
        EwqError: of the stage that failed, with what to do.
    """
    beside = []
    if needs_companions(checkpoint, options):
        laid_out = layout(checkpoint, toolchain, progress)
        beside = plan_companions(checkpoint, laid_out, toolchain, options, progress)
        check_names(checkpoint, beside, out.parent, options)
    with (
        store.locked(out, stage="convert"),
        naming_the_nearest(checkpoint, toolchain, progress),
        progress.stage("convert") as share,
    ):
        warnings = convert(
            checkpoint, toolchain, out, outtype=outtype, on_progress=share
        )
    for warning in warnings:
        progress.note(f"llama.cpp's converter: {warning}")
    return place_companions(checkpoint, toolchain, beside, out, options, progress)

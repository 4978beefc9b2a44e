"""Which files go beside the text model.

What of a checkpoint is for images or sounds is seen before any weight is read: it goes
into an mmproj, or it is said that it is left out, and why.
"""

from __future__ import annotations

from ewq_gguf.checkpoint.buffers import is_buffer
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.header import TensorHeader
from ewq_gguf.checkpoint.heads import head_tensors
from ewq_gguf.checkpoint.media import is_media
from ewq_gguf.errors import (
    ChildError,
    InputError,
    UsageError,
)
from ewq_gguf.llamacpp.companion import (
    CompanionLayout,
    companion_layout,
)
from ewq_gguf.llamacpp.convert import base_type, converter_architectures
from ewq_gguf.llamacpp.converter import Content
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.records import Layout
from ewq_gguf.report.companion_view import described
from ewq_gguf.stages.choosing import say_heads
from ewq_gguf.stages.options import Options, Progress

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def plan_companions(
    checkpoint: Checkpoint,
    laid_out: Layout,
    toolchain: Toolchain,
    options: Options,
    progress: Progress,
) -> list[CompanionLayout]:
    """The files that will go beside the text model; what is left out is said.

    Raises:
        UsageError: one was asked for, and there is nothing to make it of.
        InputError, ChildError: one was asked for, and the converter refuses it.
    """
    if checkpoint.identity.is_gguf:
        if _is_asked(options):
            raise UsageError(
                "convert",
                f"--mmproj {options.mmproj}",
                f"{checkpoint.folder} is a GGUF file, which is not converted",
                "give the checkpoint that it was made from",
            )
        return []
    say_heads(checkpoint, laid_out, options, progress)
    layouts = []
    if _sets_heads_apart(checkpoint, options):
        ggml_type = base_type(checkpoint)
        layouts.append(companion_layout(checkpoint, toolchain, "mtp", ggml_type))
    left = unused_tensors(checkpoint, laid_out)
    if media := [tensor for tensor in left if is_media(tensor)]:
        layouts += _mmproj(checkpoint, media, toolchain, options, progress)
    else:
        _check_nothing_asked(options)
    return layouts


def _mmproj(
    checkpoint: Checkpoint,
    media: list[TensorHeader],
    toolchain: Toolchain,
    options: Options,
    progress: Progress,
) -> list[CompanionLayout]:
    """The mmproj, or none; which, and why, is said."""
    what = described(media)
    if options.mmproj == "none":
        progress.note(f"{what} are left out (--mmproj none)")
        return []
    try:
        layout = _mmproj_layout(checkpoint, toolchain, options)
    except (InputError, ChildError) as error:
        if options.mmproj != "auto":
            raise
        progress.note(
            f"{what} are left out, only text goes into the GGUF: {error.problem}; "
            f"{error.remedy}"
        )
        return []
    _say_rest(media, layout, progress)
    return [layout]


def needs_companions(checkpoint: Checkpoint, options: Options) -> bool:
    """Whether something may go beside the text model, from names alone."""
    return (
        _is_asked(options)
        or any(is_media(tensor) for _, tensor in checkpoint.tensors)
        or bool(head_tensors(checkpoint))
    )


def companion_contents(checkpoint: Checkpoint, options: Options) -> list[Content]:
    """What the converter is to write beside the text model, from names alone."""
    has_media = any(is_media(tensor) for _, tensor in checkpoint.tensors)
    contents: list[Content] = []
    if has_media and options.mmproj != "none":
        contents.append("mmproj")
    if _sets_heads_apart(checkpoint, options):
        contents.append("mtp")
    return contents


def _sets_heads_apart(checkpoint: Checkpoint, options: Options) -> bool:
    """Whether heads for further tokens become a file of their own."""
    return (
        options.mtp == "separate"
        and "mtp" in checkpoint.identity.chosen
        and bool(head_tensors(checkpoint))
    )


def unused_tensors(checkpoint: Checkpoint, laid_out: Layout) -> list[TensorHeader]:
    """The checkpoint's weights that the text model's file has no use for."""
    used = {s.hf_name for tensor in laid_out.tensors for s in tensor.sources}
    return [
        tensor
        for _, tensor in checkpoint.tensors
        if tensor.name not in used and not is_buffer(tensor)
    ]


def _is_asked(options: Options) -> bool:
    """Whether an mmproj has to be made, or the run fails."""
    return options.mmproj not in ("auto", "none")


def _check_nothing_asked(options: Options) -> None:
    """Refuse an mmproj of a model that reads text only.

    Raises:
        UsageError: one was asked for.
    """
    if _is_asked(options):
        raise UsageError(
            "convert",
            f"--mmproj {options.mmproj}",
            "the model has no weights for images or sounds",
            "leave the option away",
        )


def _mmproj_layout(
    checkpoint: Checkpoint, toolchain: Toolchain, options: Options
) -> CompanionLayout:
    """The mmproj as the converter would write it.

    Raises:
        InputError: the converter has none for this architecture, or a file is missing.
        ChildError: the converter refuses the checkpoint otherwise.
    """
    architecture = _mmproj_architecture(checkpoint)
    known = converter_architectures(toolchain, "mmproj")
    if known and architecture not in known:
        raise InputError(
            "convert",
            checkpoint.folder,
            f"llama.cpp's converter has no mmproj for {architecture}",
            "use a llama.cpp that has one, with --llama-cpp",
        )
    ggml_type = options.mmproj.upper()
    if options.mmproj == "auto":
        ggml_type = base_type(checkpoint)
    try:
        return companion_layout(checkpoint, toolchain, "mmproj", ggml_type)
    except (InputError, ChildError) as error:
        if any(name in checkpoint.small_files for name in _PROCESSORS):
            raise
        raise InputError(
            "convert",
            checkpoint.folder,
            f"an mmproj needs {' or '.join(_PROCESSORS)}, which is not there "
            f"({error.problem})",
            "download it too",
        ) from error


def _mmproj_architecture(checkpoint: Checkpoint) -> str:
    """The name under which the converter looks for an mmproj's class."""
    vision = checkpoint.config.get("vision_config")
    named = vision.get("architectures") if isinstance(vision, dict) else None
    if isinstance(named, list) and named:
        return str(named[0])
    return checkpoint.identity.hf_architecture


def _say_rest(
    media: list[TensorHeader], layout: CompanionLayout, progress: Progress
) -> None:
    """Say what goes into the mmproj, and what into neither file."""
    inside = [tensor for tensor in media if tensor.name in layout.hf_names]
    progress.note(f"{described(inside)} go into an mmproj of type {layout.ggml_type}")
    if rest := [tensor for tensor in media if tensor.name not in layout.hf_names]:
        progress.note(
            f"{described(rest)} are in neither file, the converter leaves them out; "
            f"the first is {rest[0].name}"
        )

"""Companions: the files beside the text model.

The parts of a checkpoint for images or audio are seen before any weight is read: they
go into an mmproj, or one line says that they are left out, and why.
"""

from __future__ import annotations

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.header import TensorHeader
from ewq_gguf.checkpoint.other_tensors import head_tensors, is_buffer, is_media
from ewq_gguf.errors import (
    ChildError,
    InputError,
    UsageError,
)
from ewq_gguf.llamacpp.companion import (
    CompanionLayout,
    companion_layout,
)
from ewq_gguf.llamacpp.convert import base_type
from ewq_gguf.llamacpp.converter import Content, converter_architectures
from ewq_gguf.records import Layout
from ewq_gguf.report.companion_view import described
from ewq_gguf.size_text import size_text
from ewq_gguf.stages.options import Options, Progress
from ewq_gguf.stages.run import Run

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def plan_companions(run: Run, layout: Layout) -> list[CompanionLayout]:
    """The files that will go beside the text model; what is left out is said.

    Args:
        run: the model and the options.
        layout: the layout of the text model.

    Raises:
        UsageError: one was asked for, and there is nothing to make it of.
        InputError, ChildError: one was asked for, and the converter refuses it.
    """
    checkpoint, options = run.checkpoint, run.options
    if checkpoint.identity.is_gguf:
        if _is_asked(options):
            raise UsageError(
                "convert",
                f"--mmproj {options.mmproj}",
                f"{checkpoint.folder} is a GGUF file, which is not converted",
                "give the checkpoint that it was made from",
            )
        return []
    say_heads(run, layout)
    companions = []
    if _sets_heads_apart(run):
        ggml_type = base_type(checkpoint)
        companions.append(companion_layout(checkpoint, run.toolchain, "mtp", ggml_type))
    left = unused_tensors(checkpoint, layout)
    if media := [tensor for tensor in left if is_media(tensor)]:
        companions += _mmproj(run, media)
    else:
        _check_nothing_asked(options)
    return companions


def say_heads(run: Run, layout: Layout) -> None:
    """Say what becomes of heads for further tokens, where there are any.

    Raises:
        UsageError: they should be left out, and the converter keeps them.
    """
    checkpoint, options, progress = run.checkpoint, run.options, run.progress
    heads = [] if checkpoint.identity.is_gguf else head_tensors(checkpoint)
    if not heads:
        return
    n_bytes = sum(tensor.end - tensor.begin for tensor in heads)
    what = (
        f"{len(heads)} tensors of heads for further tokens (MTP; {size_text(n_bytes)} "
        "in the checkpoint)"
    )
    used = {s.hf_name for tensor in layout.tensors for s in tensor.sources}
    n_kept = sum(1 for tensor in heads if tensor.name in used)
    if n_kept and options.mtp != "keep":
        raise UsageError(
            "convert",
            f"--mtp {options.mtp}",
            f"llama.cpp's converter keeps the {what}",
            "leave the option away",
        )
    if n_kept:
        progress.note(f"{what} are kept (--mtp keep); --mtp drop leaves them out")
    elif options.mtp == "separate":
        progress.note(f"{what} become a file of their own (--mtp separate)")
    else:
        why = "--mtp drop" if options.mtp == "drop" else "the converter takes none"
        progress.note(f"{what} are left out ({why})")


def _mmproj(run: Run, media: list[TensorHeader]) -> list[CompanionLayout]:
    """The mmproj, or none; which, and why, is said."""
    options, progress, what = run.options, run.progress, described(media)
    if options.mmproj == "none":
        progress.note(f"{what} are left out (--mmproj none)")
        return []
    try:
        layout = _mmproj_layout(run)
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


def needs_companions(run: Run) -> bool:
    """Whether something may go beside the text model, from names alone."""
    checkpoint = run.checkpoint
    return (
        _is_asked(run.options)
        or any(is_media(tensor) for _, tensor in checkpoint.tensors)
        or bool(head_tensors(checkpoint))
    )


def companion_contents(run: Run) -> list[Content]:
    """Companions that the converter would write, from the tensors' names alone."""
    has_media = any(is_media(tensor) for _, tensor in run.checkpoint.tensors)
    contents: list[Content] = []
    if has_media and run.options.mmproj != "none":
        contents.append("mmproj")
    if _sets_heads_apart(run):
        contents.append("mtp")
    return contents


def _sets_heads_apart(run: Run) -> bool:
    """Whether heads for further tokens become a file of their own."""
    return (
        run.options.mtp == "separate"
        and "mtp" in run.identity.chosen
        and bool(head_tensors(run.checkpoint))
    )


def unused_tensors(checkpoint: Checkpoint, layout: Layout) -> list[TensorHeader]:
    """The checkpoint's weights that the text model's file has no use for."""
    used = {s.hf_name for tensor in layout.tensors for s in tensor.sources}
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


def _mmproj_layout(run: Run) -> CompanionLayout:
    """The mmproj as the converter would write it.

    Raises:
        InputError: the converter has none for this architecture, or a file is missing.
        ChildError: the converter refuses the checkpoint otherwise.
    """
    checkpoint, toolchain, mmproj = run.checkpoint, run.toolchain, run.options.mmproj
    architecture = _mmproj_architecture(checkpoint)
    supported = converter_architectures(toolchain, "mmproj")
    if supported and architecture not in supported:
        raise InputError(
            "convert",
            checkpoint.folder,
            f"llama.cpp's converter has no mmproj for {architecture}",
            "use a llama.cpp that has one, with --llama-cpp",
        )
    ggml_type = base_type(checkpoint) if mmproj == "auto" else mmproj.upper()
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

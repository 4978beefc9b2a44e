"""Files beside the text model: an mmproj for images and sounds, heads that draft.

The converter writes them from the same checkpoint. Each is verified like the model: its
header is the one that was laid out, its values are the checkpoint's, and an mmproj
shows the text model an image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ewq_gguf import store
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.gguf_file import GgufFile, read_gguf
from ewq_gguf.errors import ChildError, VerificationError
from ewq_gguf.libraries import LIBRARY_VARIABLE
from ewq_gguf.llamacpp.convert import convert, header_of
from ewq_gguf.llamacpp.logs import child_log
from ewq_gguf.llamacpp.self_test import can_load
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.llamacpp.values import check_all
from ewq_gguf.process import python_argv, run
from ewq_gguf.records import Companion, Source

CompanionContent = Literal["mmproj", "mtp"]
_N_TOKENS = 8


@dataclass(frozen=True)
class CompanionLayout:
    """A companion as the converter would write it.

    Attributes:
        content: The mmproj or the MTP heads.
        ggml_type: The type asked for; tensors that it does not fit have another.
        header: its bytes before the data.
        gguf: the same, read.
        sources: the checkpoint's tensors that each tensor is made of.
        computed: the tensors whose values are not the checkpoint's own.
    """

    content: CompanionContent
    ggml_type: str
    header: bytes
    gguf: GgufFile
    sources: Mapping[str, tuple[Source, ...]]
    computed: frozenset[str]

    @property
    def hf_names(self) -> frozenset[str]:
        """The checkpoint's tensors that are in it, or feed it."""
        return frozenset(s.hf_name for parts in self.sources.values() for s in parts)

    @property
    def media(self) -> tuple[str, ...]:
        """The modalities it adds to the text model: images, audio."""
        return tuple(
            medium
            for medium in ("vision", "audio")
            if self.gguf.kv.get(f"clip.has_{medium}_encoder")
        )


def companion_layout(
    checkpoint: Checkpoint,
    toolchain: Toolchain,
    content: CompanionContent,
    ggml_type: str,
) -> CompanionLayout:
    """Ask the converter for a companion's header; no weight is read.

    Raises:
        ToolError: the converter's own packages are missing.
        InputError, ChildError: the converter refuses the checkpoint.
    """
    with header_of(checkpoint, toolchain, outtype=ggml_type, content=content) as header:
        with header.path.open("rb") as file:
            raw = file.read(header.gguf.data_offset)
        return CompanionLayout(
            content, ggml_type, raw, header.gguf, header.sources, header.computed
        )


def make_companion(
    checkpoint: Checkpoint,
    toolchain: Toolchain,
    layout: CompanionLayout,
    out: Path,
    *,
    text_model: Path | None,
    on_progress: Callable[[float], None] | None = None,
) -> Companion:
    """Write a companion; it appears at `out` only when it is verified.

    Args:
        checkpoint: it is made from.
        toolchain: whose converter to use.
        layout: The tensors that it has to have.
        out: the final path; replaced when the new file is verified.
        text_model: The GGUF that is shown an image through it; None does not load it.
        on_progress: told the finished share, 0 to 1.

    Raises:
        ChildError: the converter failed.
        VerificationError: it is not as laid out, its values are not the checkpoint's,
            or llama.cpp does not load it.
        ResourceError: the disk is full.
    """
    with store.work_dir(out, stage="convert") as folder:
        temporary = folder / out.name
        convert(
            checkpoint,
            toolchain,
            temporary,
            outtype=layout.ggml_type,
            content=layout.content,
            on_progress=on_progress,
        )
        found = verify_companion(checkpoint, layout, temporary, text_model=text_model)
        store.publish(temporary, out)
    return found


def verify_companion(
    checkpoint: Checkpoint,
    layout: CompanionLayout,
    path: Path,
    *,
    text_model: Path | None,
) -> Companion:
    """Compare a companion with its layout and its checkpoint, and let it be used.

    Args:
        checkpoint: it should be made from.
        layout: The tensors that it should have.
        path: the file.
        text_model: The GGUF that is shown an image through it; None does not load it.

    Raises:
        VerificationError: it is something else.
    """
    gguf = check_header(layout, path)
    equal = check_all(checkpoint, path, gguf.tensors, layout.sources, layout.computed)
    seen: dict[str, Any] = {}
    if text_model is not None and can_look():
        seen = _look(text_model, path, layout.content)
    names = layout.hf_names
    return Companion(
        content=layout.content,
        media=layout.media,
        file_sha256=store.sha256_file(path),
        file_bytes=gguf.file_bytes,
        n_sources=len(names),
        source_bytes=sum(
            t.end - t.begin for _, t in checkpoint.tensors if t.name in names
        ),
        n_tensors=len(gguf.tensors),
        n_equal=len(equal),
        computed=tuple(t.name for t in gguf.tensors if t.name not in equal),
        is_loaded=bool(seen),
        embedded=seen.get("embedded"),
        answer=seen.get("answer"),
    )


def check_header(layout: CompanionLayout, path: Path) -> GgufFile:
    """Compare a companion's header with its layout; no value is read.

    Raises:
        InputError, VerificationError: it is no GGUF file, or has another header.
    """
    gguf = read_gguf(path)
    with path.open("rb") as file:
        is_same = file.read(gguf.data_offset) == layout.header
    if not is_same:
        raise VerificationError(
            "verify",
            path,
            "its header is not the one that this checkpoint's file has",
            "use --force to replace it, or another -o",
        )
    return gguf


def can_look() -> bool:
    """Whether the bindings and llama.cpp's libmtmd are installed."""
    folder = os.environ.get(LIBRARY_VARIABLE)
    return bool(folder) and can_load() and any(Path(str(folder)).glob("libmtmd.*"))


def _look(text_model: Path, path: Path, content: CompanionContent) -> dict[str, Any]:
    """Load a companion with llama.cpp, in a child that may crash.

    Raises:
        VerificationError: llama.cpp does not load the two, or their numbers are broken.
    """
    argv = python_argv(
        "ewq_gguf.llamacpp.look_child",
        content,
        text_model.absolute(),
        path.absolute(),
        str(_N_TOKENS),
    )
    env = {
        "PYTHONSAFEPATH": "1",
        "MTMD_CPP_LIB": os.environ[LIBRARY_VARIABLE],
        "GGML_NO_BACKTRACE": "1",  # else a debugger's words follow the reason
    }
    try:
        with child_log("look", path) as log_path:
            text = run(argv, stage="verify", log_path=log_path, env=env)
    except ChildError as error:
        raise VerificationError(
            "verify",
            path,
            f"does not load: {error.problem}",
            f"{error.remedy}; `--{content} "
            f"{'none' if content == 'mmproj' else 'drop'}` makes the text model alone",
        ) from error
    result: dict[str, Any] = json.loads(text.splitlines()[-1])
    if not result["is_finite"]:
        raise VerificationError(
            "verify",
            path,
            "is numerically broken: its embeddings or the logits hold NaN",
            "make it in another type, such as --mmproj bf16 or f32",
        )
    return result

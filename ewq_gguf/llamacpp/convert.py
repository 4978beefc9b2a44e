"""From a checkpoint to a base GGUF, and to its header alone, by llama.cpp's converter.

The converter sees a staging folder of links: fixed names, no code, no `auto_map`,
so that nothing of the repository runs and no path of this machine enters the file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ewq_gguf import ggml_types, store
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.gguf_file import GgufFile, read_gguf
from ewq_gguf.errors import InputError
from ewq_gguf.llamacpp.converter import Content, content_flags, run_converter
from ewq_gguf.llamacpp.convertible import (
    check_is_local,
    check_is_no_gguf,
    check_packages,
    check_tokenizer,
)
from ewq_gguf.llamacpp.logs import child_log
from ewq_gguf.llamacpp.staging import left_out_env, read_sources, stage_checkpoint
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.process import python_argv
from ewq_gguf.records import Source

_PERCENT = re.compile(r"Writing:\s+(\d+)%")


def base_type(checkpoint: Checkpoint) -> str:
    """The base GGUF's float type: the one most weights of the checkpoint have."""
    weights: Counter[str] = Counter()
    for _, tensor in checkpoint.tensors:
        weights[ggml_types.type_of_dtype(tensor.dtype)] += tensor.n_weights
    return weights.most_common(1)[0][0]


def convert_argv(
    toolchain: Toolchain,
    staged: Path,
    name: str,
    outtype: str,
    out: Path,
    flags: Sequence[str] = (),
) -> list[str]:
    """The converter's command line, without the Python in front."""
    return [
        str(toolchain.converter),
        str(staged),
        "--outfile",
        str(out),
        "--outtype",
        outtype.lower(),
        f"--model-name={name}",
        *flags,
    ]


def convert(
    checkpoint: Checkpoint,
    toolchain: Toolchain,
    out: Path,
    *,
    outtype: str,
    content: Content = "text",
    on_progress: Callable[[float], None] | None = None,
) -> list[str]:
    """Write the base GGUF, or what goes beside it.

    Args:
        checkpoint: Opened by `open_checkpoint`.
        toolchain: The llama.cpp whose converter runs.
        out: The final path; replaced when the new file is whole.
        outtype: `F16`, `BF16`, `F32` or `Q8_0`.
        content: The text model, the mmproj or the MTP heads.
        on_progress: Called with the finished share, 0 to 1.

    Returns:
        The converter's warnings.

    Raises:
        ToolError: the converter's own packages are missing.
        InputError: the checkpoint has no tokenizer, the converter refuses it or does
            not know its tokenizer, or it is a GGUF file already.
        ChildError: the converter failed.
        ResourceError: the disk is full.
    """
    check_is_no_gguf(checkpoint)
    check_packages()
    check_tokenizer(checkpoint)
    check_is_local(checkpoint)
    checkpoint.check_unchanged("convert")
    store.check_distinct(out, [shard.path for shard in checkpoint.shards], "convert")
    _check_free(checkpoint, out)

    with (
        store.work_dir(out, stage="convert") as folder,
        child_log("convert", out) as log_path,
    ):
        staged = stage_checkpoint(checkpoint, folder)
        temporary = folder / "base.gguf"
        flags = content_flags(checkpoint, content)
        argv = convert_argv(
            toolchain, staged, checkpoint.identity.name, outtype, temporary, flags
        )
        left_out = left_out_env(checkpoint, folder)
        if left_out or "pre" in checkpoint.identity.chosen:
            argv = python_argv("ewq_gguf.llamacpp.left_out_child", *argv)
        else:
            argv = [_python(), *argv]
        on_line = _percent(on_progress)
        warnings = run_converter(
            checkpoint, toolchain, argv, log_path, env=left_out, on_line=on_line
        )
        read_gguf(temporary)  # a whole file, or an error
        checkpoint.check_unchanged("convert")
        store.publish(temporary, out)
    return warnings


def _check_free(checkpoint: Checkpoint, out: Path) -> None:
    """Refuse where the disk has no space for the base."""
    # FP8 weights have twice their bytes in the base.
    total = sum(max(t.end - t.begin, 2 * t.n_weights) for _, t in checkpoint.tensors)
    store.check_free(store.ensure_dir(out.parent, "convert"), total, "convert")


def _percent(
    on_progress: Callable[[float], None] | None,
) -> Callable[[str], None]:
    """A reader of the converter's lines that reports its progress, 0 to 1."""

    def line(text: str) -> None:
        if on_progress and (match := _PERCENT.search(text)):
            on_progress(int(match[1]) / 100)

    return line


@dataclass(frozen=True)
class BaseHeader:
    """The header that the converter would write, without data.

    Attributes:
        path: A file of the base GGUF's size with a hole for the data.
        gguf: The parsed header.
        sources: The checkpoint tensors that each GGUF tensor is made of, by its name.
        warnings: The converter's warnings.
        computed: The tensors whose weights are not the checkpoint's own.
    """

    path: Path
    gguf: GgufFile
    sources: Mapping[str, tuple[Source, ...]]
    warnings: tuple[str, ...] = ()
    computed: frozenset[str] = frozenset()


@contextmanager
def header_of(
    checkpoint: Checkpoint,
    toolchain: Toolchain,
    *,
    outtype: str,
    content: Content = "text",
) -> Iterator[BaseHeader]:
    """The base GGUF's header as the converter would write it, with a hole for data.

    No weight is read: the converter works on lazy tensors and is stopped before it
    writes data. The file has its full size but occupies the header's bytes only, so
    llama-quantize can plan on it (`--dry-run`).

    Yields:
        The header; its file is removed afterwards.

    Raises:
        ToolError: the converter's own packages are missing.
        InputError: the checkpoint has no tokenizer, or one the converter does not know.
        ChildError: the converter refuses the checkpoint.
    """
    check_packages()
    check_tokenizer(checkpoint)
    out = store.cache_dir("layouts") / f"{checkpoint.identity.fingerprint}.gguf"
    with (
        store.work_dir(out, stage="convert") as folder,
        child_log("convert", out) as log_path,
    ):
        staged = stage_checkpoint(checkpoint, folder)
        path = folder / "header.gguf"
        argv = python_argv(
            "ewq_gguf.llamacpp.header_child",
            staged,
            checkpoint.identity.name,
            outtype,
            path,
            folder / "sources.json",
            *content_flags(checkpoint, content),
        )
        left_out = left_out_env(checkpoint, folder)
        warnings = run_converter(checkpoint, toolchain, argv, log_path, env=left_out)
        header = _extend_to_data(path, checkpoint)
        sources = folder / "sources.json"
        entries = json.loads(sources.read_text())
        yield BaseHeader(
            path,
            header,
            read_sources(checkpoint, sources),
            tuple(warnings),
            frozenset(e["name"] for e in entries if not e["moved"]),
        )


def _extend_to_data(path: Path, checkpoint: Checkpoint) -> GgufFile:
    """Read a header's file, and give it its full size with a hole for the data.

    Raises:
        InputError: the converter has named no tensor.
    """
    header = read_gguf(path, header_only=True)
    if not header.tensors:
        raise InputError(
            "convert",
            checkpoint.folder,
            "llama.cpp's converter knows none of its tensors by name",
            "check the checkpoint's files, or use a newer llama.cpp",
        )
    end = max(tensor.offset + tensor.size_bytes for tensor in header.tensors)
    with path.open("r+b") as file:
        file.truncate(-(-end // 32) * 32)
    return header


def _python() -> str:
    return python_argv("")[0]

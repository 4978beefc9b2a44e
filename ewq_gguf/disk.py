"""Disks that are full: which one, and which option or variable names another."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import platformdirs

#: A disk with less is full: some file systems keep a last block to themselves.
_FULL_BYTES = 1 << 16
_TEMPORARY_PREFIXES = ("tmp", "ewq-")


def cache_root() -> Path:
    """The cache: EWQ_CACHE, else the platform's."""
    root = os.environ.get("EWQ_CACHE") or platformdirs.user_cache_dir("ewq-gguf")
    return Path(root).absolute()


def is_full(error: OSError) -> bool:
    """Whether a disk, a quota or the limit on a file's size ended."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def advice(path: Path, wanted: str = "on another disk") -> str:
    """The advice that makes a file go elsewhere: an option or a variable.

    Args:
        path: The file or its folder.
        wanted: The words that describe the other folder.
    """
    if path.absolute().is_relative_to(cache_root()):
        return f"let EWQ_CACHE name a folder {wanted}"
    if _is_temporary(path):
        return f"let TMPDIR name a folder {wanted}"
    return "choose another folder with -o"


def full_folder(folders: Iterable[Path]) -> Path | None:
    """The folder whose disk is full, or None."""
    free = {}
    for folder in folders:
        with suppress(OSError):
            if os.access(folder, os.W_OK):
                free[folder] = shutil.disk_usage(folder).free
    fullest = min(free, key=lambda folder: free[folder], default=None)
    return fullest if fullest and free[fullest] < _FULL_BYTES else None


def usual_folders() -> list[Path]:
    """Where we write besides the output: the cache, temporary files, where we are."""
    return [cache_root(), Path(tempfile.gettempdir()), Path.cwd()]


def _is_temporary(path: Path) -> bool:
    """Whether a file lies where Python's `tempfile` puts them, or is that folder."""
    folder = Path(tempfile.gettempdir()).absolute()
    if not path.absolute().is_relative_to(folder):
        return False
    inside = path.absolute().relative_to(folder).parts
    return not inside or inside[0].startswith(_TEMPORARY_PREFIXES)

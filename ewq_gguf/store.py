"""Writing that cannot lose anything: atomic, locked, refused where it would overwrite.

A file appears at its final path complete or not at all: it is written beside it under
a name of its own, flushed to the disk, and renamed.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ewq_gguf.disk import advice, cache_root, is_full
from ewq_gguf.errors import LockedError, ResourceError, UsageError

_WRITABLE = "that can be written"


def cache_dir(*parts: str) -> Path:
    """A folder below the cache (`EWQ_CACHE`, else the platform's), created."""
    return ensure_dir(cache_root().joinpath(*parts), "cache")


def ensure_dir(path: Path, stage: str) -> Path:
    """Create a folder, or say why it cannot be one.

    Raises:
        ResourceError: it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            stage,
            path,
            f"the folder cannot be created ({error.strerror})",
            advice(path, _WRITABLE),
        ) from error
    return path


def check_writable(path: Path, stage: str) -> None:
    """Refuse early where a file at `path` could not be written.

    Raises:
        UsageError: `path` is a folder, a link, a device or a pipe.
        ResourceError: its folder cannot be created or written.
    """
    if path.is_dir():
        raise UsageError(stage, path, "is a folder", "give the name of a file with -o")
    _check_replaceable(path, stage)
    folder = ensure_dir(path.absolute().parent, stage)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise write_error(stage, folder, error) from error


def _check_replaceable(path: Path, stage: str) -> None:
    """Refuse to put a file in the place of a link, a device or a pipe.

    Raises:
        UsageError: one is there.
    """
    if path.is_symlink() and not path.is_dir():
        problem = f"is a link to {path.readlink()}"
    elif path.exists() and not path.is_file() and not path.is_dir():
        problem = "is no regular file"
    else:
        return
    raise UsageError(stage, path, problem, "give the name of a file with -o")


def check_distinct(path: Path, inputs: Iterable[Path], stage: str) -> None:
    """Refuse with a UsageError an output that is one of its inputs, by any name."""
    for source in inputs:
        if path.exists() and source.exists() and path.samefile(source):
            raise UsageError(
                stage, path, f"is its own input {source}", "give another -o"
            )


def check_free(folder: Path, needed_bytes: int, stage: str) -> None:
    """Refuse early where a disk has too little space.

    Raises:
        ResourceError: fewer than `needed_bytes` are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ResourceError(
            stage,
            folder,
            f"{needed_bytes:,} bytes are needed and {free:,} are free",
            f"free some space, or {advice(folder)}",
        )


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """SHA-256 of a text in UTF-8, as hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def cache_key(*parts: object) -> str:
    """SHA-256 over everything that a cached file depends on, as hexadecimal."""
    return sha256_text(" ".join(map(str, parts)))


def write_text(path: Path, text: str, *, stage: str, force: bool = False) -> bool:
    """Write a whole text file, atomically.

    A file with the same text is left alone; one with another text is refused.

    Args:
        path: The final path.
        text: The whole content.
        stage: The stage that an error names.
        force: Whether a file with another text is replaced.

    Returns:
        True if it was written, False if it was there already.

    Raises:
        UsageError: a file with another text is there and `force` is not given.
        ResourceError: the disk is full or the folder cannot be written.
    """
    check_writable(path, stage)
    if path.exists():
        if path.read_bytes() == text.encode():
            return False
        if not force:
            raise already_exists(path, stage)
    with replacing(path, stage=stage) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return True


def already_exists(path: Path, stage: str) -> UsageError:
    """The error for an output that exists and was made from something else."""
    return UsageError(
        stage,
        path,
        "exists and was made from other inputs",
        "use --force to replace it, or another -o",
    )


@contextmanager
def replacing(path: Path, *, stage: str) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block succeeds.

    Raises:
        ResourceError: the disk is full or the folder cannot be written.
    """
    with work_dir(path, stage=stage) as folder:
        temporary = folder / path.name
        try:
            yield temporary
            publish(temporary, path)
        except OSError as error:
            raise write_error(stage, path, error) from error


def publish(temporary: Path, path: Path) -> None:
    """Flush a finished file to the disk and rename it to its final path."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def publish_folder(work: Path, folder: Path) -> None:
    """Flush a finished folder's files to the disk and rename it to its final path."""
    for path in work.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    work.replace(folder)


@contextmanager
def work_dir(path: Path, *, stage: str) -> Iterator[Path]:
    """A hidden folder beside `path`, on the same disk, removed at the end.

    The folder of a killed run of this host for the same path is removed first.

    Raises:
        UsageError: `path` is a link, a device or a pipe.
        ResourceError: it cannot be created.
    """
    _check_replaceable(path, stage)
    prefix = f".{path.name}.{socket.gethostname()}."
    parent = ensure_dir(path.absolute().parent, stage)
    for stale in parent.glob(f"{glob.escape(prefix)}*.ewq"):
        if not _is_alive(stale.name[len(prefix) : -len(".ewq")]):
            shutil.rmtree(stale, ignore_errors=True)
    try:
        folder = tempfile.mkdtemp(".ewq", f"{prefix}{os.getpid()}-", parent)
    except OSError as error:
        raise write_error(stage, parent, error) from error
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def abandoned_work(folder: Path) -> list[Path]:
    """Work folders below `folder` that killed runs of this host left behind."""
    host = f".{socket.gethostname()}."
    return [
        path
        for path in sorted(folder.rglob(".*.ewq"))
        if host in path.name
        and not _is_alive(path.name.rpartition(host)[2].removesuffix(".ewq"))
    ]


@contextmanager
def locked(path: Path, *, stage: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock of one output; a second run is told who holds it.

    Args:
        path: The output.
        stage: The stage that an error names.
        wait: Whether to wait for the other run, as for a file that both can use.

    Raises:
        LockedError: another process holds it.
    """
    # One lock per file, whatever links lead to its folder.
    real = path.parent.resolve() / path.name
    name = hashlib.sha256(os.fsencode(real)).hexdigest()[:32]
    folder = cache_dir("locks")
    owner = folder / f"{name}.owner"
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        who = "another process"
        with suppress(OSError):  # removed when the other run ends
            who = owner.read_text().strip() or who
        raise LockedError(
            stage,
            path,
            f"is being written by {who}",
            "wait for it to end, or choose another output with -o",
        ) from None
    try:
        owner.write_text(f"pid {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _is_alive(tag: str) -> bool:
    """Whether the process that made a work folder, by its tag `PID-random`, runs."""
    pid = tag.partition("-")[0]
    if not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write_error(stage: str, path: Path, error: OSError) -> ResourceError:
    """The error for a file that cannot be written, and where else it could go."""
    if not is_full(error):
        problem = f"cannot be written ({error.strerror})"
        return ResourceError(stage, path, problem, advice(path, _WRITABLE))
    return disk_full(stage, path)


def disk_full(stage: str, path: Path) -> ResourceError:
    """The error for a file whose disk is full, or a quota or limit on it is."""
    remedy = f"free some space, or {advice(path)}"
    return ResourceError(stage, path, "the disk is full, or a quota is", remedy)

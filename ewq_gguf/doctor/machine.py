"""CPU, memory, disks and the cache."""

from __future__ import annotations

import os
import platform
import resource
import shlex
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.doctor.check import Finding, failure, ok, size_text, warning
from ewq_gguf.errors import ResourceError
from ewq_gguf.libraries import cpu_name, machine_key
from ewq_gguf.process import N_CPUS, available_memory

_MIN_MEMORY_BYTES = 2 << 30
#: Below the first a disk is full, below the second it soon is.
_FULL_BYTES, _LOW_BYTES = 256 << 20, 5 << 30
_CGROUP = Path("/sys/fs/cgroup")
_MIN_FILES = 256


def cpu() -> Finding:
    """The CPU, and how much of it a container may use."""
    name = cpu_name() or platform.processor() or platform.machine()
    found = f"{name}, {N_CPUS} cores ({machine_key()})"
    quota = _cpu_quota()
    if quota is not None and quota < N_CPUS - 0.5:
        last = max(int(quota), 1) - 1
        return warning(
            f"{found}: the container may use {quota:g} of them, and as many threads as "
            "cores wait for each other",
            f"run `taskset -c 0-{last} ewq ...`",
        )
    return ok(found)


def memory() -> Finding:
    """The RAM that can be had, a container's limit included."""
    import psutil

    total, free = int(psutil.virtual_memory().total), available_memory()
    limit = _number(_CGROUP / "memory.max")
    found = f"{size_text(free)} of {size_text(total)} available"
    if limit is not None and limit < total:
        found += f", the container's limit is {size_text(limit)}"
    if free < _MIN_MEMORY_BYTES:
        return warning(
            f"{found}: 2 GiB are needed for small models",
            "end other programs, or give the container more memory",
        )
    return ok(found)


def limits() -> Finding:
    """The limits of this shell, as `ulimit` sets them."""
    for name, number, option, enough in (
        ("the size of a file", resource.RLIMIT_FSIZE, "-f", resource.RLIM_INFINITY),
        ("address space", resource.RLIMIT_AS, "-v", resource.RLIM_INFINITY),
        ("open files", resource.RLIMIT_NOFILE, "-n", _MIN_FILES),
    ):
        soft = resource.getrlimit(number)[0]
        if soft != resource.RLIM_INFINITY and (
            enough == resource.RLIM_INFINITY or soft < enough
        ):
            wanted = "unlimited" if enough == resource.RLIM_INFINITY else "1024"
            return warning(
                f"{name} is limited to {soft:,}",
                f"run `ulimit {option} {wanted}`, or ask who set the limit",
            )
    return ok("none that matters")


def cache() -> Finding:
    """Whether the cache can be written and locked, and what lies in it."""
    another = "name another folder: `export EWQ_CACHE=FOLDER`"
    try:
        folder = store.cache_dir()
        with (
            tempfile.TemporaryFile(dir=folder),
            store.locked(folder / "doctor", stage="doctor", wait=True),
        ):
            pass
    except (ResourceError, OSError) as error:
        return failure(f"cannot be written or locked: {error}", another)
    free = shutil.disk_usage(folder).free
    n_files, size_bytes = _content(folder)
    found = f"{folder}: {size_text(size_bytes)} in {n_files:,} files"
    found += f", {size_text(free)} free"
    if stale := store.abandoned_work(folder):
        size_bytes = sum(_content(path)[1] for path in stale)
        names = shlex.join(str(path) for path in stale)
        return warning(
            f"{found}; {size_text(size_bytes)} in {len(stale)} folders of runs that "
            "were killed",
            f"run `rm -r {names}`",
        )
    if free < _LOW_BYTES:
        found += ": a base of 16 bits is kept there for each model"
    return _by_free_space(free, found, f"free some space, or {another}")


def working_folder() -> Finding:
    """Where files go without -o."""
    try:
        folder = Path.cwd()
    except FileNotFoundError:
        return failure("the working folder was removed", "run `cd` to another one")
    free = shutil.disk_usage(folder).free
    found = f"{folder}, {size_text(free)} free"
    if not os.access(folder, os.W_OK):
        return warning(
            f"{folder} cannot be written", "run `cd` to another folder, or give -o FILE"
        )
    return _by_free_space(free, found, "free some space, or give -o FILE elsewhere")


def hub_cache() -> Finding:
    """Where models from the Hub are kept."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    home = Path(os.environ.get("HF_HOME") or root)
    folder = Path(named or home / "hub").expanduser().absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        return failure(
            f"{folder}: {there} is no folder that can be written",
            "name another one: `export HF_HOME=FOLDER`",
        )
    free = shutil.disk_usage(there).free
    found = f"{folder}, {size_text(free)} free"
    return _by_free_space(free, found, "free some space, or `export HF_HOME=FOLDER`")


def _by_free_space(free_bytes: int, found: str, remedy: str) -> Finding:
    if free_bytes < _FULL_BYTES:
        return failure(found, remedy)
    return warning(found, remedy) if free_bytes < _LOW_BYTES else ok(found)


def _cpu_quota() -> float | None:
    """Cores that the container may use at once, or None without a limit (cgroup v2)."""
    with suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return int(quota) / int(period)
    return None


def _number(path: Path) -> int | None:
    """The number in a file, or None: there is no file, or it says `max`."""
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _content(folder: Path) -> tuple[int, int]:
    """Files in a folder and their bytes; links are not followed."""
    n_files = size_bytes = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # gone meanwhile
                size_bytes += os.lstat(Path(root) / name).st_size
                n_files += 1
    return n_files, size_bytes

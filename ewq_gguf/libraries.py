"""Where the bindings find our llama.cpp: set before anyone imports `llama_cpp`.

The tools and the bindings use one build, so that they cannot disagree. A finished
build leaves a small pointer file in the cache; importing this package reads it, which
costs a few file-system calls.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

from ewq_gguf.disk import cache_root

LLAMA_CPP_COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
LIBRARY_VARIABLE = "LLAMA_CPP_LIB_PATH"
RECORD_NAME = "build.json"

_CPU_INFO = Path("/proc/cpuinfo")


def use_toolchain_libraries() -> None:
    """Point llama-cpp-python at our build's libraries, where there is a build.

    A path that the user set is left alone. Never raises: without a build, the first
    command that needs one says how to get it.
    """
    if LIBRARY_VARIABLE in os.environ:
        return
    try:
        build = default_build()
        if build and (build / RECORD_NAME).is_file() and (build / "bin").is_dir():
            os.environ[LIBRARY_VARIABLE] = str(build / "bin")
    except (OSError, ValueError):
        return


def default_build() -> Path | None:
    """The build folder that the pointer file names, or None without a usable one."""
    pointer = pointer_path()
    try:
        build = json.loads(pointer.read_text(encoding="utf-8"))["build"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # A name, not a path: the cache may have been moved or mounted elsewhere.
    if not isinstance(build, str) or not build or Path(build).name != build:
        return None
    return pointer.parent / build


def pointer_path() -> Path:
    """The file that names the build in use on this kind of machine."""
    name = f"{LLAMA_CPP_COMMIT[:9]}-{machine_key()}.default.json"
    return cache_root() / "toolchain" / name


def machine_key() -> str:
    """The architecture and a checksum of the CPU's features, such as x86_64-1f0c9a2b.

    Builds use every instruction of the CPU they are made on. On a cache that machines
    share, another CPU therefore has a pointer and a build of its own.
    """
    return f"{os.uname().machine}-{zlib.crc32(cpu_features().encode()):08x}"


def cpu_features() -> str:
    """The first CPU's feature list, sorted; empty where the system has no such file."""
    return " ".join(sorted(_cpu_info({"flags", "Features"}).split()))


def cpu_name() -> str:
    """The first CPU's product name; empty where the system has no such file."""
    return _cpu_info({"model name", "CPU part"})


def _cpu_info(names: set[str]) -> str:
    """The first entry of /proc/cpuinfo that has one of these names."""
    try:
        with _CPU_INFO.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() in names:
                    return value.strip()
    except OSError:
        pass
    return ""

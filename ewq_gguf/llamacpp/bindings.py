"""llama-cpp-python, installed without a llama.cpp of its own.

It loads the libraries of our build (libraries.py says where they are), so its own build
would be compiled for nothing. A wheel that has one works as well.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from ewq_gguf import packages, store
from ewq_gguf.errors import ChildError, ToolError
from ewq_gguf.libraries import LIBRARY_VARIABLE
from ewq_gguf.llamacpp.source import BINDINGS_VERSION, STAGE, Note, download_sdist
from ewq_gguf.process import python_argv, run

DISTRIBUTION = "llama-cpp-python"

#: Neither llama.cpp nor its library for images.
_CMAKE_ARGS = "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"
_LOAD_SECONDS = 120.0


def are_installed() -> bool:
    """Whether the bindings of the pinned llama.cpp are there."""
    return packages.installed_version(DISTRIBUTION) == BINDINGS_VERSION


def install_bindings(note: Note) -> None:
    """Install the bindings that fit the pinned llama.cpp, if they are not there.

    Args:
        note: told what is installed.

    Raises:
        ToolError: a package or a tool is missing, or the bindings cannot be built.
        NetworkError: their source cannot be fetched.
        ResourceError: disk or memory ran out.
    """
    if are_installed():
        return
    packages.check_installable(STAGE)
    # One lock per environment: another run may be doing the same.
    with store.locked(Path(sys.prefix) / DISTRIBUTION, stage=STAGE, wait=True):
        if not are_installed():
            install_build_packages(note)
            _install(download_sdist(note), note)


def _install(archive: Path, note: Note) -> None:
    other = packages.installed_version(DISTRIBUTION)
    instead = f" in place of {other}" if other else ""
    note(f"installing {DISTRIBUTION} {BINDINGS_VERSION}{instead}")
    log_path = store.cache_dir("logs") / "bindings.log"
    try:
        packages.install(
            ["--no-build-isolation", archive],
            stage=STAGE,
            log_path=log_path,
            env={"CMAKE_ARGS": _CMAKE_ARGS},
        )
    except ChildError as error:
        raise ToolError(
            STAGE,
            f"{DISTRIBUTION} {BINDINGS_VERSION}",
            f"cannot be installed ({_reason(error)})",
            f"its log is {log_path}",
        ) from error
    if not are_installed():
        found = packages.installed_version(DISTRIBUTION)
        raise ToolError(
            STAGE,
            DISTRIBUTION,
            f"is {found or 'absent'} after installing {BINDINGS_VERSION}",
            f"another one comes before it in PYTHONPATH; the log is {log_path}",
        )
    log_path.unlink(missing_ok=True)


def install_build_packages(note: Note) -> None:
    """Install CMake, Ninja and what else the extra `build` lists, where it is missing.

    Raises:
        ToolError: they cannot be installed.
        ResourceError: disk or memory ran out.
    """
    missing = packages.unmet(packages.requirements("build"))
    if not missing:
        return
    names = [each.requirement for each in missing]
    note(f"installing {', '.join(names)}")
    log_path = store.cache_dir("logs") / "build-packages.log"
    try:
        packages.install(names, stage=STAGE, log_path=log_path)
    except ChildError as error:
        raise ToolError(
            STAGE,
            ", ".join(map(str, missing)),
            f"cannot be installed ({_reason(error)})",
            f"run `{packages.install_line(*names)}`",
        ) from error
    log_path.unlink(missing_ok=True)


def loaded_library(lib_dir: Path | None = None) -> Path:
    """The libllama that the bindings load, tried in a child.

    Args:
        lib_dir: holds the one to load; None for what the environment names.

    Raises:
        ToolError: they do not load.
    """
    chosen = {} if lib_dir is None else {LIBRARY_VARIABLE: str(lib_dir)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            text = run(
                python_argv("ewq_gguf.llamacpp.bindings_child"),
                stage=STAGE,
                log_path=Path(folder) / "load.log",
                env={"PYTHONSAFEPATH": "1", **chosen},
                timeout_seconds=_LOAD_SECONDS,
            )
        except ChildError as error:
            problem = f"does not load ({_reason(error)})"
            raise ToolError(STAGE, DISTRIBUTION, problem, "run `ewq setup`") from error
    return Path(text.splitlines()[-1])


def _reason(error: ChildError) -> str:
    """The line of an installer's log that says most."""
    told = [line for line in error.log_tail if line.lower().startswith("error")]
    return (told or list(error.log_tail) or [error.problem])[-1]

"""Everything that the commands need besides Python packages: bindings and llama.cpp."""

from __future__ import annotations

from collections.abc import Callable

from ewq_gguf.libraries import default_build
from ewq_gguf.llamacpp import bindings
from ewq_gguf.llamacpp.build import STAGE, is_built, read_record, recipe_for
from ewq_gguf.llamacpp.compilers import check_build_tools
from ewq_gguf.llamacpp.tested_build import build_toolchain
from ewq_gguf.llamacpp.toolchain import Toolchain


def set_up(
    backend: str | None = None,
    *,
    jobs: int | None = None,
    on_line: Callable[[str], None],
) -> Toolchain:
    """Install the bindings and build llama.cpp, where they are not there already.

    Args:
        backend: cpu, cuda, metal or vulkan; None for that of the build in use, else
            cpu.
        jobs: compilers at once; None for one per CPU.
        on_line: called with each line printed, as by `build_toolchain`.

    Returns:
        The llama.cpp that the commands and the bindings use from now on.

    Raises:
        ToolError: a compiler or a package is missing and cannot be installed, the
            bindings do not load, or no build passes its self-test.
        ChildError: CMake or a compiler failed.
        NetworkError: a source cannot be fetched.
        LockedError: another process is building.
        ResourceError: disk or memory ran out.
    """

    def note(text: str) -> None:
        on_line(f"{STAGE}: {text}")

    recipe = recipe_for(backend or _backend_in_use() or "cpu")
    has_bindings = bindings.are_installed()
    if not (has_bindings and is_built(recipe)):
        # What somebody has to install by hand is said before anything is done.
        check_build_tools(recipe.backend)
        bindings.install_build_packages(note)
    # First: a build is tested through them.
    bindings.install_bindings(note)
    built = build_toolchain(recipe.backend, jobs=jobs, on_line=on_line)
    if not has_bindings:
        bindings.loaded_library(built.lib_dir)
    return built


def _backend_in_use() -> str | None:
    folder = default_build()
    record = None if folder is None else read_record(folder)
    return str(record["backend"]) if record and "backend" in record else None

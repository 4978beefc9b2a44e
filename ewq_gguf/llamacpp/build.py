"""Building llama.cpp with CMake and Ninja, in a folder of the cache.

A build is complete when its record is there, which is written last, with the verdict of
its self-test. Everything else in the folder may be half done: Ninja goes on from it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ewq_gguf import store
from ewq_gguf.errors import ChildError, ToolError
from ewq_gguf.libraries import (
    LLAMA_CPP_COMMIT,
    RECORD_NAME,
    cpu_features,
    machine_key,
)
from ewq_gguf.llamacpp.compilers import check_build_tools, cuda_compiler, find_program
from ewq_gguf.llamacpp.repairs import (
    CMAKE_HOOK,
    Repair,
    has_short_tile_read,
    repairs_for,
    user_flags,
)
from ewq_gguf.process import run

STAGE = "toolchain"
BACKENDS = ("cpu", "cuda", "metal", "vulkan")
LLAMA_CPP_BUILD = 11312
TOOLS = (
    "llama-quantize",
    "llama-imatrix",
    "llama-perplexity",
    "llama-bench",
    "llama-gguf-split",
    "llama-mtmd-cli",
    "ggml-rpc-server",
)

_SHORT_COMMIT = LLAMA_CPP_COMMIT[:9]
_NEEDED_BYTES = {"cpu": 200_000_000, "cuda": 4_000_000_000}
_VERSION_SECONDS = 60.0

OnLine = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """The choices that decide a build; each is built once on a machine.

    Attributes:
        backend: cpu, cuda, metal or vulkan.
        flags: CMake's arguments.
        environment: the user's CC, CXX, CFLAGS, CXXFLAGS and LDFLAGS, as NAME=VALUE.
    """

    backend: str
    flags: tuple[str, ...]
    environment: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the build lives in the cache."""
        text = "\n".join([*self.flags, *self.environment, machine_key()])
        key = f"{zlib.crc32(text.encode()):08x}"
        name = f"{_SHORT_COMMIT}-{self.backend}-{key}"
        return store.cache_dir("toolchain") / name


def recipe_for(backend: str) -> Recipe:
    """The CMake flags of a backend on this system.

    Raises:
        ToolError: there is no such backend here.
    """
    if backend not in BACKENDS:
        choices = ", ".join(BACKENDS)
        raise ToolError(STAGE, backend, "is not a backend", f"choose one of {choices}")
    if backend == "metal" and sys.platform != "darwin":
        raise ToolError(STAGE, "metal", "is there on macOS only", "use cpu or vulkan")
    flags = [
        "-DCMAKE_BUILD_TYPE=Release",
        # Libraries are found beside the binaries, wherever the cache is mounted.
        "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
        "-DBUILD_SHARED_LIBS=ON",
        "-DLLAMA_BUILD_SERVER=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        # Nothing here downloads: a system OpenSSL would only make builds differ.
        "-DLLAMA_OPENSSL=OFF",
        "-DGGML_RPC=ON",
        # The tree may be an export without git, or lie inside our own work tree.
        f"-DLLAMA_BUILD_COMMIT={_SHORT_COMMIT}",
        f"-DLLAMA_BUILD_NUMBER={LLAMA_CPP_BUILD}",
    ]
    if backend in {"cuda", "vulkan"}:
        flags.append(f"-DGGML_{backend.upper()}=ON")
    if sys.platform == "darwin":
        flags.append(f"-DGGML_METAL={'ON' if backend == 'metal' else 'OFF'}")
    return Recipe(backend=backend, flags=tuple(flags), environment=user_flags())


def repairs_here() -> tuple[Repair, ...]:
    """The ways to build on this machine, the usual one first."""

    def ask(command: list[str]) -> str:
        with TemporaryDirectory() as folder:
            log_path = Path(folder) / "compiler.log"
            return run(
                command,
                stage=STAGE,
                log_path=log_path,
                timeout_seconds=_VERSION_SECONDS,
            )

    compiler = find_program("CXX", ("c++", "g++", "clang++"))
    return repairs_for(cpu_features(), lambda: has_short_tile_read(compiler, ask))


def is_built(recipe: Recipe) -> bool:
    """Whether all files of this recipe are there; whether they compute is not asked."""
    folder = recipe.folder
    record = read_record(folder)
    return (
        record is not None
        and record.get("commit") == LLAMA_CPP_COMMIT
        and record.get("flags") == list(recipe.flags)
        and missing_files(folder) == []
    )


def read_record(folder: Path) -> dict[str, object] | None:
    """A build's record, or None where the build is not complete."""
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def missing_files(folder: Path) -> list[str]:
    """The tools and libraries that a build should have and has not."""
    libraries = ("libllama.dylib" if sys.platform == "darwin" else "libllama.so",)
    names = (*TOOLS, *libraries)
    return [name for name in names if not (folder / "bin" / name).is_file()]


def build_tree(
    source: Path, recipe: Recipe, repair: Repair, *, jobs: int | None, on_line: OnLine
) -> dict[str, object]:
    """Build a source tree, going on from an interrupted build.

    A folder left by an earlier run may hold a broken CMake cache or objects of a
    killed compiler: where building on it fails, it is wiped and built once afresh.

    Args:
        source: a folder with CMakeLists.txt.
        recipe: the flags.
        repair: how this build differs from the usual one.
        jobs: compilers at once; None for one per CPU.
        on_line: called with each line that CMake and Ninja print.

    Returns:
        The record of the build, to be completed by its self-test and written last.

    Raises:
        ToolError: a compiler, CMake or Ninja is missing, or the tree is not the
            pinned commit's.
        ChildError: CMake or a compiler failed.
        ResourceError: disk or memory ran out.
    """
    check_build_tools(recipe.backend)
    folder = recipe.folder
    store.check_free(folder.parent, _NEEDED_BYTES.get(recipe.backend, 10**9), STAGE)
    # From here on the build is not complete, until its record is written again.
    (folder / RECORD_NAME).unlink(missing_ok=True)
    resumed = folder.is_dir()
    try:
        _configure_and_build(source, folder, recipe, repair, jobs, on_line)
    except (ChildError, ToolError):
        if not resumed:
            raise
        on_line("toolchain: the earlier build is broken; starting afresh")
        shutil.rmtree(folder)
        _configure_and_build(source, folder, recipe, repair, jobs, on_line)
    return {
        "backend": recipe.backend,
        "build": LLAMA_CPP_BUILD,
        "commit": LLAMA_CPP_COMMIT,
        "compiler": _compiler_of(folder),
        "environment": list(recipe.environment),
        "flags": list(recipe.flags),
        "machine": machine_key(),
        "repair": repair.name,
        "source_dir": str(source),
    }


def _configure_and_build(
    source: Path,
    folder: Path,
    recipe: Recipe,
    repair: Repair,
    jobs: int | None,
    on_line: OnLine,
) -> None:
    cmake, ninja = wheel_program("cmake"), wheel_program("ninja")
    store.ensure_dir(folder, STAGE)
    hook = folder / "repair.cmake"
    store.write_text(hook, CMAKE_HOOK, stage=STAGE, force=True)
    env = {"NINJA_STATUS": "[%f/%t] "}
    if recipe.backend == "cuda" and (nvcc := cuda_compiler()):
        env["CUDACXX"] = nvcc
    make = f"-DCMAKE_MAKE_PROGRAM={ninja}"
    targets = [part for name in TOOLS for part in ("--target", name)]
    parallel = str(jobs or os.cpu_count() or 1)
    steps: dict[str, list[str | Path]] = {
        "configure": [
            *(str(part) for part in ("-S", source, "-B", folder, "-G", "Ninja", make)),
            *recipe.flags,
            f"-DCMAKE_PROJECT_TOP_LEVEL_INCLUDES={hook}",
            *repair.cmake_flags(),
        ],
        "build": ["--build", folder, "--parallel", parallel, *targets],
    }
    for name, arguments in steps.items():
        run(
            [cmake, *arguments],
            stage=STAGE,
            log_path=folder / f"{name}.log",
            env=env,
            on_line=on_line,
        )
    _check_version(folder)


def _check_version(folder: Path) -> None:
    """Refuse binaries that do not name the pinned commit."""
    try:
        printed = run(
            [folder / "bin" / "llama-perplexity", "--version"],
            stage=STAGE,
            log_path=folder / "version.log",
            timeout_seconds=_VERSION_SECONDS,
        )
    except ChildError as error:
        if error.return_code < 0:
            return  # It crashes or hangs: the self-test says so, and leads to a repair.
        raise
    if _SHORT_COMMIT not in printed or str(LLAMA_CPP_BUILD) not in printed:
        lines = printed.strip().splitlines() or ["no version"]
        raise ToolError(
            STAGE,
            folder,
            f"built for another commit ({lines[0]}), {_SHORT_COMMIT} is needed",
            f"run `rm -r {folder}`, then `ewq toolchain build`",
        )


def wheel_program(name: str) -> Path:
    """CMake or Ninja: from its wheel in this environment, else from PATH.

    Raises:
        ToolError: neither has it.
    """
    if importlib.util.find_spec(name) is not None:
        module = importlib.import_module(name)
        names = (f"{name.upper()}_BIN_DIR", "BIN_DIR")
        folder = next((getattr(module, n) for n in names if hasattr(module, n)), None)
        if folder is not None and (Path(folder) / name).is_file():
            return Path(folder) / name
    found = shutil.which(name)
    if found is None:
        remedy = "run `pip install cmake ninja`"
        raise ToolError(STAGE, name, "is not installed", remedy)
    return Path(found)


def _compiler_of(folder: Path) -> str:
    """The C++ compiler's name and version, as CMake found them."""
    for path in sorted(folder.glob("CMakeFiles/*/CMakeCXXCompiler.cmake")):
        parts = []
        text = path.read_text(encoding="utf-8", errors="replace")
        for key in ("CMAKE_CXX_COMPILER_ID", "CMAKE_CXX_COMPILER_VERSION"):
            _, _, rest = text.partition(f'set({key} "')
            parts.append(rest.partition('"')[0])
        return " ".join(parts)
    return "unknown"

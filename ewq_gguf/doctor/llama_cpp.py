"""llama.cpp, the bindings, and what they are built with."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from pathlib import Path

from ewq_gguf import packages
from ewq_gguf.doctor import child, gpus
from ewq_gguf.doctor.check import Finding, failure, ok, size_text, warning
from ewq_gguf.errors import ChildError, EwqError, ToolError
from ewq_gguf.libraries import (
    LIBRARY_VARIABLE,
    LLAMA_CPP_COMMIT,
    default_build,
    machine_key,
    pointer_path,
)
from ewq_gguf.llamacpp import bindings, compilers
from ewq_gguf.llamacpp.build import (
    missing_files,
    read_record,
    repairs_here,
    wheel_program,
)
from ewq_gguf.llamacpp.compilers import check_build_tools, cuda_compiler
from ewq_gguf.llamacpp.devices import list_devices
from ewq_gguf.llamacpp.source import BINDINGS_VERSION, cached_source, find_source
from ewq_gguf.llamacpp.toolchain import Toolchain, find_toolchain

_COMPILE_SECONDS = 120.0
_MIN_FREE_BYTES = 1 << 30
_SETUP = "run `ewq setup`"
#: What llama.cpp needs of a compiler and its headers: C++17 with threads.
_CPP = """\
#include <filesystem>
#include <thread>
int main() { std::thread([] {}).join(); return std::filesystem::exists("/") ? 0 : 1; }
"""
_CU = "__global__ void nothing() {}\nint main() { nothing<<<1, 1>>>(); return 0; }\n"


def toolchain() -> Finding:
    """Whether there is a llama.cpp, whole, and made for this CPU."""
    found = _in_use()
    _ = found.tool("llama-imatrix"), found.tool("llama-perplexity"), found.converter
    if found.backend != "user":
        return ok(f"{found.commit[:9]} for {found.backend}, {found.bin_dir.parent}")
    if not (found.source_dir / "gguf-py").is_dir():
        version = packages.installed_version("gguf")
        return warning(
            f"{found.converter} has no gguf-py beside it: it takes gguf {version} of "
            "this environment, which may be older than it",
            "let EWQ_LLAMA_CPP name a whole checkout of llama.cpp",
        )
    return ok(f"your own, commit {found.commit}, in {found.bin_dir}")


def self_test() -> Finding | None:
    """The verdict of the build's self-test, which runs where it has not yet."""
    try:
        found = _in_use()
    except EwqError:
        return None
    if found.backend == "user":
        return None
    try:
        verdict = find_toolchain().self_test
    except ToolError as error:
        return failure(error.problem, error.remedy)
    if verdict is None:
        return warning("the build was not tested: the bindings are missing", _SETUP)
    text = str(verdict)
    if found.repair != "none":
        text += f"; built with the repair {found.repair}"
    return ok(text)


def bindings_version() -> Finding:
    """Whether the bindings are those of the pinned llama.cpp."""
    found = packages.installed_version(bindings.DISTRIBUTION)
    if found is None:
        problem = f"{bindings.DISTRIBUTION} is not installed: no file can be measured"
        return failure(problem, _SETUP)
    if found != BINDINGS_VERSION:
        return failure(
            f"{bindings.DISTRIBUTION} {found} does not fit the pinned llama.cpp, "
            f"{BINDINGS_VERSION} does",
            _SETUP,
        )
    return ok(f"{bindings.DISTRIBUTION} {found}")


def bindings_load() -> Finding | None:
    """Whether the bindings load, and load our build."""
    if packages.installed_version(bindings.DISTRIBUTION) is None:
        return None
    folder = default_build()
    ours = None if folder is None else folder / "bin"
    named = os.environ.get(LIBRARY_VARIABLE)
    is_elsewhere = named is not None and (ours is None or Path(named) != ours)
    unset = f"run `unset {LIBRARY_VARIABLE}`"
    try:
        library = bindings.loaded_library()
    except EwqError as error:
        if is_elsewhere:
            return failure(f"{LIBRARY_VARIABLE}={named}: {error.problem}", unset)
        raise
    if is_elsewhere:
        return warning(
            f"{LIBRARY_VARIABLE} points to {named}, which may not be the pinned "
            "llama.cpp",
            unset,
        )
    return ok(str(library))


def compiler() -> Finding:
    """Whether the C++ compiler, CMake and Ninja work; needed to build only."""
    try:
        check_build_tools("cpu")
        for tool in ("cmake", "ninja"):
            wheel_program(tool)
        version = _compile(_cpp_compiler(), ["-std=c++17", "-pthread"], "a.cpp", _CPP)
    except EwqError as error:
        subject = f"{error.subject}: " if error.subject else ""
        problem, remedy = f"{subject}{error.problem}", error.remedy
        if isinstance(error, ChildError):
            problem = f"{subject}cannot compile C++17 ({error.problem})"
            set_ones = [name for name in ("CC", "CXX") if os.environ.get(name)]
            remedy = compilers.remedy("compiler")
            if set_ones:
                remedy = f"run `unset {' '.join(set_ones)}`, or {remedy}"
        if _is_set_up():
            return warning(f"{problem}; needed at the next build only", remedy)
        return failure(problem, remedy)
    repair = repairs_here()[0]
    return ok(
        f"{version}; builds here are made {repair.what}" if repair.what else version
    )


def backend() -> Finding | None:
    """Whether the build uses the GPU that is there, and finds the driver it needs."""
    try:
        found = _in_use()
    except EwqError:
        return None
    nvidia = gpus.nvidia()
    if nvidia.problem:
        tell = failure if found.backend == "cuda" else warning
        return tell(
            f"NVIDIA's driver does not answer: {nvidia.problem}",
            "run `nvidia-smi`; restart the machine after an update of the driver",
        )
    if found.backend == "cuda" and not nvidia.gpus:
        return failure(
            "llama.cpp is built for CUDA, and there is no GPU or driver of NVIDIA",
            "install the driver, or run `ewq setup --backend cpu`",
        )
    if found.backend == "cpu" and nvidia.gpus:
        first = "" if cuda_compiler() else f"{compilers.remedy('nvcc')}, then "
        return warning(
            f"llama.cpp is built for the CPU only, and {nvidia.gpus[0]} is there",
            f"{first}run `ewq setup --backend cuda`",
        )
    if found.backend == "cpu" and gpus.is_apple_gpu():
        return warning(
            "llama.cpp is built for the CPU only, and this Mac has a GPU",
            "run `ewq setup --backend metal`",
        )
    return ok(found.backend if found.backend != "user" else "as your llama.cpp has it")


def nvcc() -> Finding | None:
    """Whether CUDA's compiler takes the C++ compiler that is there."""
    path = cuda_compiler()
    if path is None or not gpus.nvidia().gpus:
        return None
    host = os.environ.get("CUDAHOSTCXX")
    arguments = ["-ccbin", host] if host else []
    try:
        return ok(_compile(path, arguments, "a.cu", _CU, version_line=-1))
    except EwqError as error:
        return warning(
            f"{path} cannot compile ({error.problem}); needed at the next build only",
            "name a C++ compiler that this CUDA knows: `export CUDAHOSTCXX=g++-13`",
        )


def devices() -> Finding | None:
    """The devices that llama.cpp finds: its tools run, or do not."""
    try:
        found = _in_use()
        tool = found.tool("llama-bench")
    except EwqError:
        return None
    try:
        listed = list_devices(found)
    except EwqError as error:
        is_own = found.backend == "user"
        again = "build it on this machine" if is_own else _rebuild(found.bin_dir.parent)
        return failure(f"{tool.name} cannot run: {error.problem}", again)
    if not listed:
        if found.backend in ("cuda", "metal", "vulkan"):
            return failure(
                f"llama.cpp is built for {found.backend} and finds no device",
                "install the GPU's driver, or run `ewq setup --backend cpu`",
            )
        return ok("the CPU")
    text = ", ".join(
        f"{d.name} {d.description}: {size_text(d.free_bytes)} of "
        f"{size_text(d.total_bytes)} free"
        for d in listed
    )
    if max(d.free_bytes for d in listed) < _MIN_FREE_BYTES:
        return warning(text, "end what uses the GPU's memory, or use --device cpu")
    return ok(text)


def _in_use() -> Toolchain:
    """The llama.cpp in use, tested or not.

    Raises:
        ToolError: there is none, it lacks something, or another CPU's is here instead.
    """
    folder = default_build()
    record = None if folder is None else read_record(folder)
    if os.environ.get("EWQ_LLAMA_CPP"):
        return find_toolchain()
    if folder is None or record is None:
        others = sorted(pointer_path().parent.glob("*.default.json"))
        problem = "is not built"
        if others and pointer_path() not in others:
            problem = f"is built for {len(others)} other kinds of CPU, not for this one"
        raise ToolError("doctor", "llama.cpp", problem, _SETUP)
    for what, key, needed in (
        ("CPU", "machine", machine_key()),
        ("commit", "commit", LLAMA_CPP_COMMIT),
    ):
        if record.get(key) != needed:
            problem = f"was built for another {what} ({record.get(key)}; not {needed})"
            raise ToolError("doctor", folder, problem, _rebuild(folder))
    if missing := missing_files(folder):
        problem = f"{', '.join(missing)} vanished from it"
        raise ToolError("doctor", folder, problem, _SETUP)
    return Toolchain(
        commit=LLAMA_CPP_COMMIT,
        source_dir=find_source() or cached_source(),
        bin_dir=folder / "bin",
        lib_dir=folder / "bin",
        backend=str(record.get("backend")),
        flags=(),
        repair=str(record.get("repair", "none")),
    )


def _rebuild(folder: Path) -> str:
    return f"run `rm -r {shlex.quote(str(folder))} && ewq setup`"


def _is_set_up() -> bool:
    """Whether nothing has to be built before the commands work."""
    try:
        _in_use()
    except EwqError:
        return False
    return bindings.are_installed()


def _cpp_compiler() -> str:
    """The C++ compiler that CMake takes, after it was found to be there."""
    chosen = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, chosen)))


def _compile(
    compiler: str, arguments: list[str], name: str, text: str, version_line: int = 0
) -> str:
    """Compile a small program; its compiler's version.

    Raises:
        ToolError, ChildError: it cannot be compiled.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / name
        source.write_text(text)

        program = Path(folder) / "program"
        argv = [compiler, *arguments, str(source), "-o", str(program)]
        child.output(argv, seconds=_COMPILE_SECONDS)
    text = child.output([compiler, "--version"], seconds=_COMPILE_SECONDS)
    return text.strip().splitlines()[version_line]

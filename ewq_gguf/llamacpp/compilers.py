"""The compilers that a build needs, and the line that installs a missing one."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from ewq_gguf.errors import ToolError

_STAGE = "toolchain"
_USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
#: What a package manager calls the packages that builds need. The first one that is
#: in PATH counts; with conda's environment active, nobody has to be root.
_MANAGERS: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        "apt",
        "apt install",
        {
            "compiler": "build-essential",
            "nvcc": "nvidia-cuda-toolkit",
            "glslc": "libvulkan-dev glslc spirv-headers",
        },
    ),
    (
        "dnf",
        "dnf install",
        {
            "compiler": "gcc-c++",
            "nvcc": "cuda-toolkit",
            "glslc": "vulkan-loader-devel glslc spirv-headers-devel",
        },
    ),
    (
        "pacman",
        "pacman -S",
        {
            "compiler": "base-devel",
            "nvcc": "cuda",
            "glslc": "vulkan-headers vulkan-icd-loader shaderc spirv-headers",
        },
    ),
    (
        "zypper",
        "zypper install",
        {
            "compiler": "gcc-c++",
            "nvcc": "cuda-toolkit",
            "glslc": "vulkan-devel shaderc spirv-headers",
        },
    ),
    (
        "apk",
        "apk add",
        {
            "compiler": "build-base",
            "glslc": "vulkan-loader-dev vulkan-headers shaderc spirv-headers",
        },
    ),
)
_CONDA = {
    "compiler": "cxx-compiler",
    "nvcc": "cuda-toolkit",
    "glslc": "libvulkan-headers libvulkan-loader shaderc spirv-headers",
}
_OTHERWISE = {
    "compiler": "GCC or Clang (Debian, Ubuntu: `apt install build-essential`)",
    "nvcc": "NVIDIA's CUDA toolkit",
    "glslc": "the Vulkan SDK",
}


def install_line(what: str) -> str | None:
    """The command that installs something here, or None where we know of none.

    Args:
        what: `compiler` (C and C++), `nvcc` or `glslc` (with Vulkan's headers).
    """
    conda = os.environ.get("CONDA_PREFIX")
    if conda and Path(sys.prefix) == Path(conda):
        return f"conda install -c conda-forge {_CONDA[what]}"
    if sys.platform == "darwin":
        return {
            "compiler": "xcode-select --install",
            "glslc": "brew install vulkan-headers vulkan-loader shaderc spirv-headers",
        }.get(what)
    for program, words, names in _MANAGERS:
        if shutil.which(program):
            return f"{words} {names[what]}" if what in names else None
    return None


def remedy(what: str) -> str:
    """The remedy of an error: that command, or what to do where no manager is known."""
    line = install_line(what)
    return f"run `{line}`" if line else f"install {_OTHERWISE[what]}"


def check_build_tools(backend: str) -> None:
    """Refuse before CMake starts where a compiler is missing.

    Raises:
        ToolError: with the line that installs it.
    """
    for variable, names, language in (
        ("CC", ("cc", "gcc", "clang"), "C"),
        ("CXX", ("c++", "g++", "clang++"), "C++"),
    ):
        if find_program(variable, names) is None:
            raise ToolError(
                _STAGE,
                f"{language} compiler",
                f"none of {', '.join(names)} is in PATH",
                remedy("compiler"),
            )
    if backend == "cuda" and cuda_compiler() is None:
        raise ToolError(
            _STAGE,
            "nvcc",
            "is not in PATH, and the CUDA backend needs it",
            remedy("nvcc")
            + ", add its bin folder to PATH if it is elsewhere, or use --backend cpu",
        )
    if backend == "vulkan" and shutil.which("glslc") is None:
        raise ToolError(
            _STAGE,
            "glslc",
            "is not in PATH, and the Vulkan backend needs it",
            remedy("glslc") + ", or use --backend cpu",
        )


def cuda_compiler() -> str | None:
    """The path of nvcc, also in CUDA's usual folder."""
    return find_program("CUDACXX", ("nvcc", _USUAL_NVCC))


def find_program(variable: str, names: tuple[str, ...]) -> str | None:
    """A program that the user's variable names, else the first one in PATH."""
    chosen = os.environ.get(variable, "").split()[:1]
    for name in chosen or names:
        if found := shutil.which(name):
            return found
    return None

"""What installs a compiler or an SDK here: the line of the package manager."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

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
    """That command as an error says it, or what to do where no manager is known."""
    line = install_line(what)
    return f"run `{line}`" if line else f"install {_OTHERWISE[what]}"

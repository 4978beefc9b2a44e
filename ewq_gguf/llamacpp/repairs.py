"""Ways to build llama.cpp again where a build fails its self-test, least loss first.

Only ggml's CPU backend is compiled for the CPU at hand (`-march=native`), so that a
repair adds options to the objects of that target alone: Ninja compiles no others again.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: GCC's header declares that `ldtilecfg` reads a pointer, 8 of 64 bytes.
_SHORT_TILE_READ = re.compile(
    r'ldtilecfg[^;]*"m"\s*\(\*\(\(const void \*\*\)\s*__config\)\)'
)
_INSTRUCTION_SETS = ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C")
#: Cache entries that a repair may set; they are cleared before each configuration.
CLEARED = ("GGML_NATIVE", *(f"GGML_{name}" for name in _INSTRUCTION_SETS))

#: Read by CMake in its first `project()` call; acts when all targets are known.
CMAKE_HOOK = """\
function(ewq_gguf_repair)
  if(NOT TARGET ggml-cpu)
    return()
  endif()
  if(EWQ_CPU_OPTIONS)
    target_compile_options(ggml-cpu PRIVATE ${EWQ_CPU_OPTIONS})
  endif()
  if(EWQ_AMX_OPTIONS)
    get_target_property(folder ggml-cpu SOURCE_DIR)
    set_property(
      SOURCE "${folder}/ggml-cpu/amx/mmq.cpp" TARGET_DIRECTORY ggml-cpu
      APPEND PROPERTY COMPILE_OPTIONS ${EWQ_AMX_OPTIONS})
  endif()
endfunction()
cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL ewq_gguf_repair)
"""


@dataclass(frozen=True)
class Repair:
    """Options that take the suspected cause of a failure away.

    Attributes:
        name: in the build's record.
        what: The change to the build, for the line that the user reads.
        cost: Its cost in speed, for the same line.
        cpu_options: compiler options for the CPU backend.
        amx_options: compiler options for its AMX kernels only.
        flags: More arguments of CMake.
    """

    name: str
    what: str = ""
    cost: str = ""
    cpu_options: tuple[str, ...] = ()
    amx_options: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def cmake_flags(self) -> list[str]:
        """CMake's arguments; entries of an earlier repair are cleared."""
        return [
            *(f"-U{name}" for name in CLEARED),
            f"-DEWQ_CPU_OPTIONS={';'.join(self.cpu_options)}",
            f"-DEWQ_AMX_OPTIONS={';'.join(self.amx_options)}",
            *self.flags,
        ]


NONE = Repair("none")
# Dead stores are removed on two levels of GCC, and either one alone drops them.
_KEEP_TILE_CONFIGURATION = Repair(
    "amx-tile-configuration",
    "with -fno-tree-dse -fno-dse for its AMX kernels (GCC drops stores that they need)",
    "no speed that could be measured",
    amx_options=("-fno-tree-dse", "-fno-dse"),
)
_NO_AMX_OPTIONS = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
_NO_AMX = Repair(
    "no-amx",
    "without AMX",
    "prompts are read more slowly, answers come as fast",
    cpu_options=_NO_AMX_OPTIONS,
)
_NO_AVX512 = Repair(
    "no-avx512",
    "without AVX-512",
    "prompts are read more slowly",
    cpu_options=("-mno-avx512f",),
)
_NO_AVX512_NOR_AMX = Repair(
    "no-avx512",
    "without AVX-512 and AMX",
    "prompts are read more slowly",
    cpu_options=(*_NO_AMX_OPTIONS, "-mno-avx512f"),
)
_PORTABLE = Repair(
    "portable",
    "for the oldest CPU of this architecture",
    "everything is several times slower; tell llama.cpp's developers",
    flags=("-DGGML_NATIVE=OFF", *(f"-DGGML_{n}=OFF" for n in _INSTRUCTION_SETS)),
)


def repairs_for(
    cpu_features: str, has_short_tile_read: Callable[[], bool]
) -> tuple[Repair, ...]:
    """The builds to try on this machine, in order; the first is the usual one.

    Args:
        cpu_features: /proc/cpuinfo's list of flags; empty where there is none.
        has_short_tile_read: whether the compiler's header has GCC's fault; asked only
            on CPUs with AMX.

    Returns:
        At least two; each takes away more than the one before.
    """
    features = set(cpu_features.split())
    has_amx = "amx_tile" in features
    usual: tuple[Repair, ...] = (NONE,)
    if has_amx:
        # A known cause is not built first to be seen failing.
        known = has_short_tile_read()
        usual = (_KEEP_TILE_CONFIGURATION,) if known else (NONE,)
        usual += (_NO_AMX,) if known else (_KEEP_TILE_CONFIGURATION, _NO_AMX)
    if "avx512f" in features:
        usual += (_NO_AVX512_NOR_AMX if has_amx else _NO_AVX512,)
    return (*usual, _PORTABLE)


def has_short_tile_read(compiler: str | None, ask: Callable[[list[str]], str]) -> bool:
    """Whether a compiler's header says that `ldtilecfg` reads 8 bytes only.

    Args:
        compiler: The C++ compiler; None where there is none.
        ask: runs a command and returns what it prints.
    """
    if compiler is None or platform.machine() not in {"x86_64", "AMD64"}:
        return False
    name = "include/amxtileintrin.h"
    path = Path(ask([compiler, f"-print-file-name={name}"]).strip() or name)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return bool(_SHORT_TILE_READ.search(text))


def user_flags() -> tuple[str, ...]:
    """The compiler and the flags that the environment names, for a build's key."""
    names = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS")
    return tuple(f"{name}={os.environ[name]}" for name in names if os.environ.get(name))

"""Build llama.cpp with AMX kernels and test them on a CPU without AMX.

    python -m benchmarks.amx [FOLDER]

A library that is loaded in front of the self-test (amx_emulator.c) carries out the tile
instructions when the CPU refuses them. Two builds are tested: as GCC compiles the
kernels, and with the flags that keep the tile configuration. It needs Linux on x86 with
AVX-512, a C compiler, and the time of one build of llama.cpp. FOLDER holds the builds
and is kept; without it a temporary folder is used.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from ewq_gguf import store
from ewq_gguf.libraries import cpu_features
from ewq_gguf.llamacpp import build
from ewq_gguf.llamacpp.tested_build import build_toolchain
from ewq_gguf.process import run

_AMX = "amx_bf16 amx_int8 amx_tile"
_OPTIONS = "-mamx-tile -mamx-int8 -mamx-bf16"
_SOURCE = Path(__file__).with_name("amx_emulator.c")


def main(folder: Path) -> None:
    """Build, test, and print what the self-test says of each build."""
    emulator = folder / "amx_emulator.so"
    flags = ["-shared", "-fPIC", "-O2", "-ftls-model=initial-exec"]
    run(
        ["cc", *flags, _SOURCE, "-o", emulator, "-ldl"],
        stage="benchmark",
        log_path=folder / "cc.log",
    )
    os.environ |= {
        "EWQ_CACHE": str(store.ensure_dir(folder / "cache", "benchmark")),
        "LD_PRELOAD": str(emulator),
        "CFLAGS": _OPTIONS,
        "CXXFLAGS": _OPTIONS,
    }
    features = f"{cpu_features()} {_AMX}"
    with patch.object(build, "cpu_features", lambda: features):
        # As if the compiler's header did not tell: the first build has no flags.
        with patch.object(build, "has_short_tile_read", lambda *_: False):
            toolchain = build_toolchain(on_line=_print)
        print(f"repair: {toolchain.repair}; self-test {toolchain.self_test}")


def _print(line: str) -> None:
    if line.startswith("toolchain: ") and "steps)" not in line:
        print(line, flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(store.ensure_dir(Path(sys.argv[1]).absolute(), "benchmark"))
    else:
        with TemporaryDirectory() as name:
            main(Path(name))

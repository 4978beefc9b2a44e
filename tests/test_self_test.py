"""The self-test of a build: tiny models against numpy, crashes, wrong numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from ewq_gguf.cli import main
from ewq_gguf.errors import ChildError, ToolError
from ewq_gguf.llamacpp import self_test
from ewq_gguf.llamacpp.hardware import hardware_key
from ewq_gguf.llamacpp.repairs import has_short_tile_read, repairs_for
from ewq_gguf.llamacpp.self_test import error_share, run_self_test
from ewq_gguf.llamacpp.tiny_models import (
    N_VOCAB,
    TINY_MODELS,
    random_blocks,
)
from ewq_gguf.llamacpp.verify import verify_file

pytest_plugins = ["tests.toolchain_fixtures"]

pytestmark = pytest.mark.llamacpp

# ggml's kernels are reached through a table of pointers: a library that is loaded
# before them takes a kernel's place. This type has no other kernel on any CPU.
KERNEL = "ggml_vec_dot_iq3_s_q8_K"
BROKEN = {
    "raises SIGILL": "__builtin_trap();",
    "computes wrong numbers": "*s = 0.25f;",
    "computes NaN": "*s = 0.0f / 0.0f;",
    "hangs": "for (;;) pause();",
}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A function that puts a broken kernel in front of the real one."""
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("needs Linux's LD_PRELOAD and a C compiler")

    def break_kernel(fault: str) -> None:
        source = tmp_path / "kernel.c"
        source.write_text(
            f"#include <unistd.h>\nvoid {KERNEL}(int n, float *s) {{ {BROKEN[fault]} }}"
        )
        library = tmp_path / "kernel.so"
        argv = ["cc", "-shared", "-fPIC", "-O1", "-o", library, source]
        subprocess.run(argv, check=True)
        monkeypatch.setenv("LD_PRELOAD", str(library))

    return break_kernel


# --- The reference -------------------------------------------------------------------


@pytest.mark.parametrize("ggml_type", sorted({m.ggml_type for m in TINY_MODELS}))
def test_random_blocks_have_the_spread_asked_for_and_no_bias(ggml_type):
    rng = np.random.default_rng(1)
    data = random_blocks(ggml_type, (64, 256), 0.0625, rng)
    values = dequantize(data, GGMLQuantizationType[ggml_type])

    assert values.shape == (64, 256)
    # MXFP4 has powers of two for scales, so that it cannot meet a spread exactly.
    assert 0.03 < values.std() < 0.13
    assert abs(values.mean()) < 0.2 * values.std()


def test_the_difference_that_counts_is_of_the_logits_own_size():
    right = np.random.default_rng(2).standard_normal((8, N_VOCAB))
    assert error_share(right.astype(np.float32), right, "Q4_K") < 0.01
    assert error_share((right * 1.2).astype(np.float32), right, "Q4_K") > 1
    assert error_share(np.full_like(right, np.nan), right, "Q4_K") == np.inf
    one = right.astype(np.float32)
    one[3, 5] += 2.0  # a single wrong logit among 512
    assert error_share(one, right, "Q4_K") > 1


# --- The build -----------------------------------------------------------------------


def test_the_build_computes_what_numpy_does(toolchain):
    verdict = run_self_test(toolchain.lib_dir, toolchain.backend)
    assert verdict.is_ok, verdict.problem
    assert verdict.devices[0] == "CPU"
    # Each model by one thread and by several, on the CPU.
    assert verdict.n_evaluations >= 2 * len(TINY_MODELS)
    assert 0 < verdict.worst_error < 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raises SIGILL", "ended by SIGILL at CPU: IQ3_S rows of 256, 1 threads"),
        ("computes wrong numbers", "computes wrong numbers with IQ3_S, rows of 256"),
        ("computes NaN", "computes wrong numbers with IQ3_S, rows of 256"),
        ("hangs", "took longer than 8 s and was stopped at CPU: IQ3_S rows of 256"),
    ],
)
def test_a_broken_kernel_is_found_and_named(toolchain, broken, fault, reason):
    broken(fault)
    verdict = run_self_test(toolchain.lib_dir, "cpu", timeout_seconds=8)
    assert not verdict.is_ok
    assert verdict.failed_device == "CPU"
    assert reason in str(verdict.problem)


def test_a_crash_leaves_a_log_with_signal_stack_and_command(toolchain, broken):
    broken("raises SIGILL")
    verdict = run_self_test(toolchain.lib_dir, "cpu")
    log = Path(str(verdict.problem).partition("its log is ")[2]).read_text()
    assert "Fatal Python error: Illegal instruction" in log
    assert "in _evaluate" in log  # the call that was being made
    assert "ended by SIGILL; to repeat it: " in log
    assert "ewq_gguf.llamacpp.self_test_child" in log.splitlines()[-1]


# --- Whose fault it is ---------------------------------------------------------------


@pytest.fixture
def no_vocabulary(tiny, toolchain, tmp_path):
    """A file that is what its plan says, and its plan; llama.cpp cannot load it."""
    from ewq_gguf.llamacpp.quantize import quantize

    plan = tiny.plan("Q8_0")
    out = tmp_path / "t.gguf"
    quantize(plan, tiny.base, out, toolchain, n_threads=1, load=False)
    spoilt = out.read_bytes().replace(b"tokenizer.ggml.model", b"tokenizer.ggml.modem")
    out.write_bytes(spoilt)
    return plan, out


def test_a_file_that_does_not_load_is_at_fault_where_the_toolchain_computes(
    no_vocabulary, own_cache, monkeypatch, toolchain
):
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(toolchain.lib_dir))
    with pytest.raises(ChildError) as caught:
        verify_file(*no_vocabulary)
    assert caught.value.exit_code == 5


def test_the_toolchain_is_at_fault_where_its_self_test_fails(
    no_vocabulary, broken, own_cache, monkeypatch, toolchain, tmp_path
):
    # A build of the test's own: the verdict is kept in its record.
    own = tmp_path / "own-build"
    own.mkdir()
    (own / "bin").symlink_to(toolchain.lib_dir)
    (own / "build.json").write_text(json.dumps({"backend": "cpu"}))
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(own / "bin"))
    broken("raises SIGILL")
    with pytest.raises(
        ToolError, match="fails its self-test on this .*SIGILL"
    ) as caught:
        verify_file(*no_vocabulary)
    assert caught.value.exit_code == 4
    assert "run `ewq setup`" in caught.value.remedy
    assert json.loads((own / "build.json").read_text())["self_test"]["is_ok"] is False


def test_the_command_that_tests_prints_the_verdict(own_cache, broken, capfd):
    assert main(["toolchain", "test"]) == 0
    assert "self-test passed: " in capfd.readouterr().out


# --- Repairs -------------------------------------------------------------------------

AMX = "sse2 avx2 avx512f amx_tile amx_int8 amx_bf16"


@pytest.mark.parametrize(
    ("features", "has_fault", "names"),
    [
        ("", False, ["none", "portable"]),
        ("sse2 avx2", True, ["none", "portable"]),
        ("sse2 avx512f", False, ["none", "no-avx512", "portable"]),
        (AMX, True, ["amx-tile-configuration", "no-amx", "no-avx512", "portable"]),
        (
            AMX,
            False,
            ["none", "amx-tile-configuration", "no-amx", "no-avx512", "portable"],
        ),
    ],
)
def test_repairs_take_away_the_least_first_and_known_causes_at_once(
    features, has_fault, names
):
    repairs = repairs_for(features, lambda: has_fault)
    assert [repair.name for repair in repairs] == names


@pytest.fixture(scope="module")
def gxx():
    """GCC, on x86: its header has the fault, or has it no more."""
    import platform

    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    if "Free Software Foundation" not in said.stdout:
        pytest.skip("g++ is another compiler here")
    return compiler


TILE_CONFIGURATION = """\
#include <immintrin.h>
#include <cstdint>
#include <cstring>
struct tile_config_t {
    uint8_t palette_id; uint8_t start_row; uint8_t reserved[14];
    uint16_t colsb[16]; uint8_t rows[16];
};
void init() {
    tile_config_t tc = {};
    tc.palette_id = 1;
    for (int i = 0; i < 8; ++i) { tc.rows[i] = 13; tc.colsb[i] = 52; }
    _tile_loadconfig(&tc);
}
"""


def ask(argv):
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def test_the_flags_keep_the_stores_that_gcc_drops(gxx, tmp_path):
    """The rows and columns of the tiles, 13 and 52, are in the code or are not."""
    source = tmp_path / "tiles.cpp"
    source.write_text(TILE_CONFIGURATION)

    def keeps_rows(*options: str) -> bool:
        argv = [gxx, "-O3", "-march=sapphirerapids", *options, "-S", "-o", "-", source]
        # 13 as eight bytes, 52 as four pairs of bytes, wherever the compiler puts them.
        text = ask(argv)
        return any(f"${n}" in text or f"\t{n}\n" in text for n in _patterns(13, 1))

    repair = repairs_for(AMX, lambda: True)[0]
    assert keeps_rows(*repair.amx_options)
    assert keeps_rows() == (not has_short_tile_read(gxx, ask))


def _patterns(value: int, n_bytes: int) -> set[int]:
    """A value repeated over 1, 2, 4 and 8 bytes, as the compiler may store it."""
    single = value.to_bytes(n_bytes, "little")
    return {
        int.from_bytes(single * (width // n_bytes), "little") for width in (1, 2, 4, 8)
    }


def test_a_header_without_the_fault_is_no_cause(tmp_path):
    header = tmp_path / "amxtileintrin.h"
    start = '__asm__ volatile ("ldtilecfg\\t%X0" :: "m" '
    header.write_text(start + "(*((const char (*)[64]) __config)));")
    assert not has_short_tile_read("c++", lambda argv: f"{header}\n")
    header.write_text(start + "(*((const void **)__config)));")
    assert has_short_tile_read("c++", lambda argv: f"{header}\n")
    assert not has_short_tile_read(None, ask)
    assert not has_short_tile_read("c++", lambda argv: "no-such-file\n")


def test_the_verdict_of_other_hardware_does_not_count():
    verdict = self_test.SelfTest(True, None, hardware_key("cpu"), devices=("CPU",))
    record: dict[str, object] = {"self_test": verdict.to_record()}
    assert self_test.read_self_test(record, "cpu") == verdict
    other: dict[str, object] = {
        "self_test": {**verdict.to_record(), "hardware": "x86_64-0; another CPU"}
    }
    assert self_test.read_self_test(other, "cpu") is None
    assert self_test.read_self_test({"self_test": {"hardware": 1}}, "cpu") is None

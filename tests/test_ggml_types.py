"""Sizes and names against gguf and libggml, the fallback against llama-quantize."""

from __future__ import annotations

import ctypes
import re
import sys

import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ewq_gguf import ggml_types
from ewq_gguf.errors import ChildError
from ewq_gguf.process import run
from tests.gguf_files import dry_run, write_gguf

pytest_plugins = ["tests.toolchain_fixtures"]

ROWS = (256, 512, 2048, 96, 576, 64, 32, 40, 1)


@pytest.fixture(scope="module")
def libggml(toolchain):
    """libggml-base of the build that everything else uses."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    library = ctypes.CDLL(str(toolchain.bin_dir / f"libggml-base.{suffix}"))
    library.ggml_type_name.argtypes = [ctypes.c_int]
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_blck_size.argtypes = [ctypes.c_int]
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_row_size.restype = ctypes.c_size_t
    return library


def test_the_table_has_the_types_of_gguf_and_their_sizes():
    assert {name: row.number for name, row in ggml_types.TYPES.items()} == {
        member.name: int(member) for member in GGMLQuantizationType
    }
    assert {
        name: (row.block_size, row.block_bytes)
        for name, row in ggml_types.TYPES.items()
    } == {member.name: size for member, size in GGML_QUANT_SIZES.items()}


@pytest.mark.parametrize("row", ggml_types.TYPES.values(), ids=lambda row: row.name)
def test_functions_read_the_table(row):
    n_columns = 3 * row.block_size

    assert ggml_types.row_bytes(row.name, n_columns) == 3 * row.block_bytes
    assert ggml_types.bits_per_weight(row.name) == 8 * row.block_bytes / row.block_size
    assert ggml_types.type_number(row.name) == row.number
    assert ggml_types.type_name(row.number) == row.name


@pytest.mark.llamacpp
@pytest.mark.parametrize("ggml_type", ggml_types.PLANNABLE)
def test_plannable_types_are_those_of_the_built_libggml(libggml, ggml_type):
    number = ggml_types.type_number(ggml_type)

    assert libggml.ggml_type_name(number).decode().upper() == ggml_type
    assert libggml.ggml_blck_size(number) == ggml_types.block_size(ggml_type)
    for n_columns in (256, 512, 4096):
        assert libggml.ggml_row_size(number, n_columns) == ggml_types.row_bytes(
            ggml_type, n_columns
        )


def test_four_and_a_half_bits_are_144_bytes_for_256_weights():
    assert ggml_types.row_bytes("Q4_K", 256) == 144
    assert ggml_types.bits_per_weight("Q4_K") == 4.5
    assert ggml_types.tensor_bytes("Q8_0", (3, 5, 64)) == 3 * 5 * 2 * 34
    assert ggml_types.tensor_bytes("F32", (7,)) == 28


def test_a_row_that_is_no_whole_number_of_blocks_has_no_size():
    with pytest.raises(ValueError, match="row length 2080 is not a multiple of Q4_K"):
        ggml_types.row_bytes("Q4_K", 2080)


def test_an_unknown_number_has_no_name():
    assert ggml_types.type_name(4) is None  # Q4_2, removed from ggml
    assert ggml_types.type_name(1 << 31) is None
    with pytest.raises(KeyError):
        ggml_types.type_number("Q4_K_M")


def test_plannable_types_are_known_and_float_types_never_fall_back():
    assert len(set(ggml_types.PLANNABLE)) == len(ggml_types.PLANNABLE)
    assert set(ggml_types.PLANNABLE) >= ggml_types.FLOAT_TYPES
    assert set(ggml_types.PLANNABLE) >= ggml_types.IMATRIX_TYPES
    for name in ggml_types.FLOAT_TYPES:
        assert all(ggml_types.written_type(name, row) == name for row in ROWS)


@pytest.mark.parametrize("ggml_type", ggml_types.PLANNABLE)
def test_what_is_written_fits_its_rows(ggml_type):
    for n_columns in range(1, 1025):
        written = ggml_types.written_type(ggml_type, n_columns)
        assert n_columns % ggml_types.block_size(written) == 0
        assert ggml_types.written_type(written, n_columns) == written


@pytest.mark.llamacpp
@pytest.mark.parametrize("ggml_type", ggml_types.PLANNABLE)
def test_fallback_is_what_llama_quantize_does(toolchain, tmp_path, ggml_type):
    names = {f"blk.0.r{n_columns}.weight": n_columns for n_columns in ROWS}
    base = write_gguf(tmp_path / "rows.gguf", {n: (2, c) for n, c in names.items()})
    types = "".join(f"^{name}$={ggml_type.lower()}\n" for name in names)

    assert dry_run(toolchain, base, types) == {
        name: ggml_types.written_type(ggml_type, n_columns)
        for name, n_columns in names.items()
    }


class CpuTraits(ctypes.Structure):
    """ggml_type_traits_cpu (ggml/include/ggml-cpu.h)."""

    _fields_ = (
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )


@pytest.mark.llamacpp
def test_dot_types_are_those_of_the_built_cpu_library(toolchain, libggml):
    suffix = "dylib" if sys.platform == "darwin" else "so"
    library = ctypes.CDLL(str(toolchain.bin_dir / f"libggml-cpu.{suffix}"))
    library.ggml_get_type_traits_cpu.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits_cpu.restype = ctypes.POINTER(CpuTraits)
    traits = {
        row.name: library.ggml_get_type_traits_cpu(row.number)[0]
        for row in ggml_types.TYPES.values()
    }

    assert {
        name: ggml_types.type_name(known.vec_dot_type)
        for name, known in traits.items()
        if known.vec_dot
    } == {row.name: row.dot_type for row in ggml_types.TYPES.values() if row.dot_type}


def test_activations_are_rounded_by_the_blocks_of_the_dot_type():
    blocks = {name: ggml_types.activation_block(name) for name in ggml_types.TYPES}

    assert blocks["NVFP4"] == 32  # its own blocks are of 64
    assert blocks["MXFP4"] == blocks["IQ4_NL"] == 32
    assert blocks["IQ4_XS"] == blocks["TQ1_0"] == 256
    assert ggml_types.finest_types() == {32: "Q8_0", 256: "Q6_K"}
    assert {blocks[name] for name in ggml_types.QUANTISED_TYPES} == {32, 256}


@pytest.mark.llamacpp
def test_ftypes_are_among_those_that_llama_quantize_lists(toolchain, tmp_path):
    tool = toolchain.tool("llama-quantize")
    with pytest.raises(ChildError):  # its help ends with 1
        run([tool, "--help"], stage="test", log_path=tmp_path / "log")
    listed = set(re.findall(r"^ *\d+ +or +(\w+)", (tmp_path / "log").read_text(), re.M))

    for name in ggml_types.PLANNABLE:
        ftype = ggml_types.TYPES[name].ftype
        assert ftype is not None
        assert ftype in listed
        assert ftype.startswith(name)


@pytest.mark.llamacpp
@pytest.mark.parametrize("ggml_type", ggml_types.PLANNABLE)
def test_imatrix_types_are_those_that_llama_quantize_refuses(
    toolchain, tmp_path, ggml_type
):
    name = "blk.0.ffn_up.weight"
    base = write_gguf(tmp_path / "one.gguf", {name: (2, 256)})

    dry_run(toolchain, base, f"^{name}$={ggml_type.lower()}\n")

    log = (tmp_path / "one.gguf.log").read_text()
    refused = "will require an imatrix" in log
    assert refused == (ggml_type in ggml_types.IMATRIX_TYPES)

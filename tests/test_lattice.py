"""Quantised already: a type's lattice is recognised, packed and read back exactly."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from ewq_gguf.entropy.blocks import pack
from ewq_gguf.entropy.intervals import intervals
from ewq_gguf.entropy.lattice import fit, holding
from ewq_gguf.ggml_types import LATTICE_TYPES, TYPES

N_BLOCKS = 2000


def as_codes(values, dtype):
    """Float64 rounded to a dtype, ties to even, as the scan reads it."""
    if dtype == "F32":
        return values.astype(np.float32)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def as_values(codes, dtype):
    if dtype == "F32":
        return codes.astype(np.float64)
    if dtype == "F16":
        return codes.view(np.float16).astype(np.float64)
    return (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def blocks_of(name, rng, *, low=0.001, high=0.01):
    """Random weights on a type's lattice, float64, (n, block)."""
    row = TYPES[name]
    assert row.lattice is not None
    shape = N_BLOCKS, row.block_size
    if name == "MXFP4":
        scales = 2.0 ** rng.integers(-12, -4, (N_BLOCKS, 1))
    else:
        scales = rng.uniform(low, high, (N_BLOCKS, 1)).astype(np.float16)
        scales = scales.astype(np.float64) * rng.choice([-1, 1], (N_BLOCKS, 1))
    if name == "Q4_1":
        return scales * (rng.integers(0, 16, shape) - 8)
    return scales * rng.choice(row.lattice.integers, shape)


CASES = [
    pytest.param(name, dtype, id=f"{name}-{dtype}")
    for name in LATTICE_TYPES
    for dtype in ("F32", "BF16", "F16")
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_types_own_values_are_on_its_lattice(name, dtype):
    data = as_codes(blocks_of(name, np.random.default_rng(1)).ravel(), dtype)

    assert name in holding(LATTICE_TYPES, data, dtype)


@pytest.mark.parametrize(("name", "dtype"), CASES[6:])
def test_packed_blocks_read_by_gguf_are_the_weights(name, dtype):
    data = as_codes(blocks_of(name, np.random.default_rng(2)).ravel(), dtype)

    found = fit(name, *intervals(data, dtype))
    assert found is not None
    read = dequantize(pack(name, found), GGMLQuantizationType[name]).ravel()

    rounded = as_values(as_codes(read.astype(np.float64), dtype), dtype)
    np.testing.assert_array_equal(rounded, as_values(data, dtype))
    if dtype == "F32":
        np.testing.assert_array_equal(read, data)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("seed", range(20))
def test_normal_weights_are_never_taken_for_a_lattice(dtype, seed):
    rng = np.random.default_rng(seed)
    data = as_codes(rng.standard_normal(256) * 0.02, dtype)

    assert holding(LATTICE_TYPES, data, dtype) == ()


def test_one_weight_beside_the_lattice_is_enough_to_refuse_it():
    values = blocks_of("Q4_0", np.random.default_rng(3)).ravel()
    values[-1] += 1e-5

    assert "Q4_0" not in holding(LATTICE_TYPES, as_codes(values, "F32"), "F32")


def test_a_block_without_its_lowest_integer_is_on_the_lattice():
    rng = np.random.default_rng(4)
    values = np.float16(0.0123).astype(np.float64) * rng.integers(-7, 8, 32 * N_BLOCKS)

    assert "Q4_0" in holding(LATTICE_TYPES, as_codes(values, "F32"), "F32")


def test_a_scale_that_f16_cannot_write_is_refused():
    values = (0.01 + 2.0**-30) * np.arange(-8, 8).repeat(16)

    assert holding(LATTICE_TYPES, as_codes(values, "F32"), "F32") == ()


def test_rounded_products_of_bf16_scales_give_the_scales_back():
    rng = np.random.default_rng(5)
    scales = as_values(as_codes(rng.uniform(1e-3, 1e-2, N_BLOCKS), "BF16"), "BF16")
    integers = rng.integers(-8, 8, (N_BLOCKS, 32))
    data = as_codes((scales[:, None] * integers).ravel(), "BF16")

    found = fit("Q4_0", *intervals(data, "BF16"))

    assert found is not None
    same = found.scales == scales
    assert same.mean() > 0.9


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_zeros_are_on_every_lattice_and_nan_on_none(dtype):
    assert (
        holding(LATTICE_TYPES, as_codes(np.zeros(512), dtype), dtype) == LATTICE_TYPES
    )
    broken = as_codes(np.full(512, np.nan), dtype)
    assert holding(LATTICE_TYPES, broken, dtype) == ()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_intervals_hold_what_is_rounded_to_the_code_and_nothing_else(dtype):
    rng = np.random.default_rng(6)
    values = rng.standard_normal(20_000) * 10.0 ** rng.integers(-6, 3, 20_000)
    data = as_codes(values.astype(np.float32).astype(np.float64), dtype)
    low, high = intervals(data, dtype)

    for edge, beyond in ((low, -np.inf), (high, np.inf)):
        as_float = edge.astype(np.float32).astype(np.float64)
        inside = as_float == edge  # the midpoints themselves
        found = as_values(as_codes(edge[inside], dtype), dtype)
        np.testing.assert_array_equal(found, as_values(data[inside], dtype))
        outside = np.nextafter(edge.astype(np.float32), np.float32(beyond))
        outside = np.nextafter(outside, np.float32(beyond)).astype(np.float64)
        found = as_values(as_codes(outside, dtype), dtype)
        assert (found != as_values(data, dtype)).all()
    assert ((low <= values) & (values <= high)).mean() > 0.999

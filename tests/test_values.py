"""The values of a converted file are the checkpoint's, compared in bounded pieces."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.gguf_file import GgufTensor
from ewq_gguf.checkpoint.source import open_checkpoint
from ewq_gguf.errors import VerificationError
from ewq_gguf.llamacpp.values import ValueCheck
from ewq_gguf.records import Source
from tests.checkpoints import write_llama, write_shard

NAME = "model.experts.weight"


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    """Values with few bits, so that BF16, F16 and F32 hold them."""
    drawn = np.random.default_rng(3).integers(-127, 128, (8, 64, 64))
    return (drawn * 2.0**-9).astype(np.float32)


def checkpoint_of(folder: Path, weights: np.ndarray, dtype: str) -> Checkpoint:
    write_llama(folder, n_layers=1)
    write_shard(folder / "model.safetensors", {NAME: (dtype, weights)})
    return open_checkpoint(str(folder))


def file_of(path: Path, weights: np.ndarray, ggml_type: str) -> GgufTensor:
    """A file with nothing but one tensor's data, behind some other bytes."""
    data = quantize(weights, GGMLQuantizationType[ggml_type]).tobytes()
    path.write_bytes(bytes(64) + data)
    shape = tuple(reversed(weights.shape))
    return GgufTensor("experts", shape, ggml_type, 64, len(data))


def compare(tmp_path, weights, stored, *, dtype="BF16", ggml_type="BF16") -> bool:
    checkpoint = checkpoint_of(tmp_path / "model", weights, dtype)
    tensor = file_of(tmp_path / "file", stored, ggml_type)
    check = ValueCheck(checkpoint, tmp_path / "file", piece_bytes=1 << 12)
    return check.compare(tensor, (Source(hf_name=NAME),), computed=False)


@pytest.mark.parametrize("ggml_type", ["BF16", "F16", "F32", "Q8_0"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_values_may_be_moved_and_rounded_to_the_type(
    tmp_path, weights, dtype, ggml_type
):
    moved = np.ascontiguousarray(weights.swapaxes(1, 2))

    assert compare(tmp_path, weights, moved, dtype=dtype, ggml_type=ggml_type)


@pytest.mark.parametrize(
    ("ggml_type", "factor"),
    [
        ("BF16", 1 + 2.0**-7),
        ("F16", 1 + 2.0**-10),
        ("F32", 1 + 2.0**-13),
        ("F32", 1 + 2.0**-23),  # less than what is kept of a value
        ("Q8_0", 1 + 2.0**-6),
    ],
)
def test_one_value_that_is_off_is_found(tmp_path, weights, ggml_type, factor):
    stored = weights.copy()
    stored[5, 3, 7] = stored.max()
    weights = stored.copy()
    stored[5, 3, 7] *= np.float32(factor)

    with pytest.raises(VerificationError, match=r"experts .*off by"):
        compare(tmp_path, weights, stored, dtype="F32", ggml_type=ggml_type)


def test_two_values_that_make_up_for_each_other_are_found(tmp_path, weights):
    stored = weights.copy()
    stored[0, 0, :2] = 1.0, 1.0
    weights = stored.copy()
    stored[0, 0, :2] = 1 + 2.0**-20, 1 - 2.0**-20

    with pytest.raises(VerificationError, match="off by"):
        compare(tmp_path, weights, stored, dtype="F32", ggml_type="F32")


def test_values_that_are_not_finite_are_counted(tmp_path, weights):
    stored = weights.copy()
    stored[0, 0, 0], stored[7, 5, 1] = np.nan, np.inf

    with pytest.raises(VerificationError, match="2 values are not finite"):
        compare(tmp_path, weights, stored, ggml_type="F32")


@pytest.mark.parametrize("ggml_type", ["BF16", "Q8_0"])
def test_a_large_tensor_is_compared_in_bounded_memory(tmp_path, ggml_type):
    weights = np.random.default_rng(4).standard_normal((64, 256, 256), np.float32)
    weights = (weights.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    checkpoint = checkpoint_of(tmp_path / "model", weights, "BF16")
    tensor = file_of(tmp_path / "file", weights, ggml_type)
    check = ValueCheck(checkpoint, tmp_path / "file", piece_bytes=1 << 18)

    tracemalloc.start()
    try:
        assert check.compare(tensor, (Source(hf_name=NAME),), computed=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < weights.nbytes / 2

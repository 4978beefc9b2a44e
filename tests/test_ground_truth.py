"""Every dtype's numbers against slow float64 references, to 12 digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ewq_gguf.checkpoint import regions, scan_jobs
from ewq_gguf.checkpoint.scan import Work, scan_checkpoint
from ewq_gguf.checkpoint.source import open_checkpoint
from ewq_gguf.errors import InputError
from ewq_gguf.records import Layout, Measures, TensorScan
from ewq_gguf.records.layout import LayoutTensor, Source
from tests.checkpoints import write_raw
from tests.references import assert_agrees, decode, reference

NAME = "model.embed_tokens.weight"
SHAPE = (150, 300)

#: Bits of a code, and the mask of all of them but the exponent's.
LAYOUTS = {
    "BF16": (16, 0x807F),
    "F16": (16, 0x83FF),
    "F32": (32, 0x807F_FFFF),
    "F64": (64, 0x800F_FFFF_FFFF_FFFF),
    "F8_E4M3": (8, 0x87),
    "F8_E5M2": (8, 0x83),
}
FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = {"tensor": (1, 1), "row": (150, 1), "block": (2, 3)}


def random_codes(dtype: str, kind: str) -> Any:
    """Weights of a kind, as the integers a file holds."""
    bits, rest = LAYOUTS[dtype]
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 2**bits - 1, SHAPE, f"<u{bits // 8}", endpoint=True)
    if kind == "subnormal":
        return codes & codes.dtype.type(rest)
    if kind == "any":
        with np.errstate(invalid="ignore"):  # signalling NaN
            values = decode(codes.tobytes(), dtype).reshape(SHAPE)
        usable = np.abs(values) <= np.finfo(np.float32).max
        return np.where(usable, codes, codes.dtype.type(0))
    # normal: the codes whose values are nearest from below
    values = rng.normal(scale=0.05, size=SHAPE)
    if bits == 64:
        return values.view("<u8")
    single = values.astype(np.float32)
    if dtype == "F32":
        return single.view("<u4")
    if dtype == "BF16":
        return (single.view("<u4") >> 16).astype("<u2")
    half = single.astype("<f2")
    if dtype == "F16":
        return half.view("<u2")
    codes8 = np.arange(128, dtype=np.uint8)
    table = decode(codes8.tobytes(), dtype)
    table = table[np.isfinite(table)]
    nearest = np.searchsorted(table, np.abs(values), side="right") - 1
    return nearest.astype(np.uint8) | (values < 0).astype(np.uint8) << 7


def write(folder: Path, dtype: str, codes: NDArray[Any], scales=None) -> Layout | None:
    """A checkpoint with one tensor; with scales, the layout that pairs them."""
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {NAME: (dtype, list(codes.shape), codes.tobytes())}
    if scales is None:
        write_raw(folder / "model.safetensors", tensors)
        return None
    name = f"{NAME}_scale_inv"
    tensors[name] = ("F32", list(scales.shape), scales.tobytes())
    write_raw(folder / "model.safetensors", tensors)
    tensor = LayoutTensor(
        name="token_embd.weight",
        shape=SHAPE,
        ggml_type="BF16",
        sources=(Source(hf_name=NAME), Source(hf_name=name)),
    )
    return Layout(
        converter_commit="",
        model_fingerprint="",
        kv_bytes=0,
        added_kv_bytes=0,
        tensors=(tensor,),
        preset_bytes={},
    )


def measured(
    folder: Path, layout: Layout | None, epsilon: float, **options: bool
) -> TensorScan:
    found = scan_checkpoint(
        open_checkpoint(str(folder)),
        Measures(epsilon=epsilon),
        layout=layout,
        work=Work(n_threads=2, **options),  # type: ignore[arg-type]
    )
    return found.tensors[0]


@pytest.fixture(params=[None, (8000, 2400), (2400, 800)], ids=["whole", "8000", "2400"])
def parts(request, monkeypatch):
    """Parts and buffers so small that a tensor has many of each."""
    if request.param:
        monkeypatch.setattr(regions, "PART_BYTES", request.param[0])
        monkeypatch.setattr(scan_jobs, "BUFFER_BYTES", request.param[1])
        # Buffers are made once per thread: these threads have none yet.
        monkeypatch.setattr(scan_jobs, "_scratch", scan_jobs._Scratch())


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("epsilon", [0.0, 0.01, 1e-6])
@pytest.mark.parametrize("kind", ["normal", "subnormal", "any"])
@pytest.mark.parametrize("dtype", [dtype for dtype in LAYOUTS if dtype not in FP8])
def test_every_number_agrees_with_the_definition(tmp_path, dtype, kind, epsilon):
    codes = random_codes(dtype, kind)
    entry = measured(tmp_path, write(tmp_path, dtype, codes), epsilon)
    assert_agrees(entry, reference(decode(codes.tobytes(), dtype), epsilon))
    assert (entry.n_weights, entry.n_nonfinite) == (codes.size, 0)
    assert (entry.shape, entry.dtype) == (SHAPE, dtype)


@pytest.mark.fault(14)
@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("epsilon", [0.0, 0.01])
@pytest.mark.parametrize("kind", ["normal", "subnormal", "any"])
@pytest.mark.parametrize("scaling", SCALES)
@pytest.mark.parametrize("dtype", FP8)
def test_scaled_fp8_agrees_with_the_definition(tmp_path, dtype, scaling, kind, epsilon):
    codes = random_codes(dtype, kind)
    low = np.exp2(np.random.default_rng(2).uniform(-12, 0, SCALES[scaling]))
    scales = low.astype(np.float32)
    entry = measured(tmp_path, write(tmp_path, dtype, codes, scales), epsilon)
    rows = scales.astype(np.float64).repeat(128 if scaling == "block" else 1, axis=0)
    every = rows.repeat(128 if scaling == "block" else 1, axis=1)
    if scaling == "block":
        every = every[: SHAPE[0], : SHAPE[1]]
    weights = decode(codes.tobytes(), dtype).reshape(SHAPE) * every
    assert_agrees(entry, reference(weights.ravel(), epsilon))
    assert (entry.n_weights, entry.dtype) == (codes.size, dtype)


@pytest.mark.parametrize("scale", [1e-30, 1e-100, 1e-160, 1e-300])
def test_tiny_64_bit_weights_have_finite_numbers(tmp_path, scale):
    values = np.random.default_rng(3).normal(scale=scale, size=SHAPE)
    entry = measured(tmp_path, write(tmp_path, "F64", values.view("<u8")), 0.01)
    # Squares below the smallest float64 are lost, and with them the spread.
    if scale > 1e-150:
        assert_agrees(entry, reference(values.ravel(), 0.01))
        z = (values - values.mean()) / values.std()
        assert entry.excess_kurtosis == pytest.approx((z**4).mean() - 3, rel=1e-9)
    assert entry.max == values.max()


@pytest.mark.fault(15)
@pytest.mark.parametrize("value", [1e39, -1e200, 1.7e308])
def test_64_bit_weights_that_no_gguf_type_holds_count_as_infinite(tmp_path, value):
    values = np.random.default_rng(4).normal(size=SHAPE)
    values[1, 2] = value
    write(tmp_path, "F64", values.view("<u8"))
    with pytest.raises(InputError, match="1 NaN or infinite .* first at index 302;"):
        measured(tmp_path, None, 0.01)
    entry = measured(tmp_path, None, 0.01, allow_nonfinite=True)
    finite = values[np.abs(values) < 1e38]
    assert_agrees(entry, reference(finite, 0.01))
    assert entry.n_nonfinite == 1

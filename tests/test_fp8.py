"""FP8 checkpoints: codes are measured and converted with their scales, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ewq_gguf import api
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.checkpoint.mapping import Region, Scales
from ewq_gguf.checkpoint.reader import RangeReader
from ewq_gguf.checkpoint.regions import parts_of
from ewq_gguf.checkpoint.source import open_checkpoint
from ewq_gguf.cli import main
from ewq_gguf.errors import InputError
from ewq_gguf.llamacpp.staging import stage_checkpoint
from ewq_gguf.records import EwqPolicy
from tests.checkpoints import write_llama, write_raw
from tests.families import write_family
from tests.range_server import Faults, serve
from tests.references import decode

FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
AUTO = {"quant_method": "fp8", "activation_scheme": "static"}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}


def compressed(strategy: str, **weights: object) -> dict[str, object]:
    told = {"num_bits": 8, "type": "float", "strategy": strategy, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {"weights": told, "targets": ["Linear"]},
            "group_1": {"weights": told, "targets": ["re:.*down_proj"]},
        },
    }


def hf_quant_config(algorithm: str) -> dict[str, object]:
    return {
        "producer": {"name": "modelopt", "version": "0.23.0"},
        "quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8"},
    }


def to_fp8(
    folder: Path,
    config: Mapping[str, object] | None,
    shape: str,
    *,
    ending: str = "_scale",
    others: tuple[str, ...] = (),
    block: tuple[int, int] = (128, 128),
) -> dict[str, NDArray[np.float64]]:
    """Make the matrices called `proj` of a checkpoint FP8; their true weights, by name.

    Args:
        folder: of a checkpoint in one file.
        config: its quantization_config; None for none.
        shape: of the scales: `scalar`, `one`, `rows`, `rows1` or `block`.
        ending: of their names.
        others: of further scalars, such as `.input_scale`.
        block: its rows and columns.
    """
    rng = np.random.default_rng(0)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    tensors: dict[str, tuple[str, list[int], bytes]] = {}
    true = {}
    for _, tensor in open_checkpoint(str(folder)).tensors:
        size, name = list(tensor.shape), tensor.name
        if "proj" not in name or len(size) < 2:
            tensors[name] = (tensor.dtype, size, data[tensor.begin : tensor.end])
            continue
        n_blocks = [-(-n // b) for n, b in zip(size, block, strict=True)]
        scale_shape = {
            "scalar": [],
            "one": [1],
            "rows": size[:1],
            "rows1": [size[0], 1],
            "block": n_blocks,
        }[shape]
        codes = rng.integers(0, 0x7F, size, np.uint8)
        codes |= rng.integers(0, 2, size, np.uint8) << 7
        scales = rng.uniform(0.001, 0.01, scale_shape).astype(np.float32)
        tensors[name] = ("F8_E4M3", size, codes.tobytes())
        tensors[name + ending] = ("F32", scale_shape, scales.tobytes())
        for other in others:
            stem = name.removesuffix(".weight")
            one = np.float32(0.5).tobytes()
            tensors[stem + other] = ("F32", [], one)
        wide = np.asarray(scales, np.float64)
        if shape == "block":
            wide = wide.repeat(block[0], 0).repeat(block[1], 1)[: size[0], : size[1]]
        elif shape == "rows":
            wide = wide[:, None]
        true[name] = decode(codes.tobytes(), "F8_E4M3").reshape(size) * wide
    write_raw(path, tensors)
    if config is not None:
        told = json.loads((folder / "config.json").read_text())
        told["quantization_config"] = config
        (folder / "config.json").write_text(json.dumps(told))
    return true


def bf16(values: NDArray[Any]) -> NDArray[np.float32]:
    """The BF16 nearest to float32 weights."""
    import torch

    rounded = torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16)
    return rounded.float().numpy()


#: Of each of the converter's methods: the config, shape and names of the scales, other
#: tensors, and the method that the converter gets.
VARIANTS: Mapping[
    str, tuple[Mapping[str, object] | None, str, str, tuple[str, ...], str]
] = {
    "blocks of 128 x 128": (BLOCKS, "block", "_scale_inv", (), "fp8"),
    "Mistral": (AUTO, "scalar", "_scale_inv", (".activation_scale",), "fp8"),
    "AutoFP8": (AUTO, "scalar", "_scale", (".input_scale",), "modelopt"),
    "FBGEMM": (FBGEMM, "rows1", "_scale", (), "modelopt"),
    "ModelOpt": (MODELOPT, "scalar", "_scale", (".k_scale",), "modelopt"),
    "ModelOpt, a row each": (MODELOPT, "rows", "_scale", (), "modelopt"),
    "compressed-tensors": (compressed("tensor"), "one", "_scale", (), "modelopt"),
    "its channels": (compressed("channel"), "rows1", "_scale", (), "modelopt"),
    "its blocks": (
        compressed("block", block_structure=[128, 128]),
        "block",
        "_scale",
        (),
        "compressed-tensors",
    ),
    "told by nothing": (None, "rows1", "_scale", (), "modelopt"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_whatever_the_maker_calls_it_the_converter_gets_its_own_word(tmp_path, variant):
    config, shape, ending, others, method = VARIANTS[variant]
    folder = write_llama(tmp_path / "m", n_layers=1, hidden=256, ffn=320)
    to_fp8(folder, config, shape, ending=ending, others=others)
    assert staged_config(folder)["quantization_config"]["quant_method"] == method


def staged_config(folder: Path) -> dict[str, Any]:
    """The config.json that the converter sees."""
    work = folder.parent / "work"
    work.mkdir()
    staged = stage_checkpoint(open_checkpoint(str(folder)), work)
    assert not (staged / "hf_quant_config.json").exists()
    values = json.loads((staged / "config.json").read_text())
    assert isinstance(values, dict)
    return values


@pytest.mark.llamacpp
@pytest.mark.parametrize("variant", ["Mistral", "ModelOpt, a row each", "its blocks"])
def test_the_base_and_the_scan_have_code_times_scale(tmp_path, variant):
    config, shape, ending, others, _ = VARIANTS[variant]
    folder = write_llama(tmp_path / "m", n_layers=1, hidden=256, ffn=320)
    true = to_fp8(folder, config, shape, ending=ending, others=others)
    assert_true_weights(folder, true)


def assert_true_weights(folder: Path, true: dict[str, NDArray[np.float64]]) -> None:
    """Scan and base file have these weights."""
    scanned = {t.hf_names[0]: t for t in api.scan(api.Run(str(folder))).tensors}
    out = folder.parent / "base.gguf"
    assert main(["convert", str(folder), "-o", str(out), "-q"]) == 0
    written = {t.name: t for t in read_gguf(out).tensors}
    data = out.read_bytes()
    for name, weights in true.items():
        entry = scanned[name]
        assert entry.std == pytest.approx(weights.std(), rel=1e-9), name
        assert (entry.min, entry.max) == (weights.min(), weights.max())
        if "q_proj" in name or "k_proj" in name:
            continue  # their rows are reordered in the GGUF
        tensor = written[entry.name]
        raw = data[tensor.offset : tensor.offset + tensor.size_bytes]
        found = decode(raw, tensor.ggml_type).reshape(weights.shape)
        np.testing.assert_array_equal(found, bf16(weights), name)


def test_fp8_may_be_told_in_hf_quant_config_alone(tmp_path):
    folder = write_llama(tmp_path / "m", n_layers=1)
    to_fp8(folder, None, "scalar", others=(".input_scale", ".v_scale"))
    told = json.dumps(hf_quant_config("FP8"))
    (folder / "hf_quant_config.json").write_text(told)
    checkpoint = open_checkpoint(str(folder))
    assert not checkpoint.is_mapped_by_name
    assert checkpoint.fp8 is not None
    assert staged_config(folder)["quantization_config"] == {"quant_method": "modelopt"}


@pytest.mark.llamacpp
def test_blocks_have_the_size_that_the_config_tells(tmp_path):
    folder = write_llama(tmp_path / "m", n_layers=1, hidden=256, ffn=320)
    config = {"quant_method": "fp8", "weight_block_size": [64, 96]}
    assert_true_weights(
        folder, to_fp8(folder, config, "block", ending="_scale_inv", block=(64, 96))
    )


@pytest.mark.parametrize(
    ("scale_shape", "block"),
    [((2, 2, 3), (128, 128)), ((2, 1, 1), None), ((2,), None), ((2, 130, 1), None)],
)
def test_stacked_experts_have_their_own_scales(tmp_path, scale_shape, block):
    write_llama(tmp_path, n_layers=1)
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 120, (2, 130, 300), np.uint8)
    scales = rng.uniform(0.01, 0.1, scale_shape).astype(np.float32)
    write_raw(
        tmp_path / "model.safetensors",
        {
            "w": ("F8_E5M2", [2, 130, 300], codes.tobytes()),
            "w_scale": ("F32", list(scale_shape), scales.tobytes()),
        },
    )
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.fp8 is not None
    assert checkpoint.fp8.block_size == block
    (shard, weight), (_, scale) = checkpoint.tensors
    region = Region(shard, weight, None, Scales(shard, scale, block))
    wide = scales.astype(np.float64).reshape(*scale_shape, *[1] * (3 - scales.ndim))
    if block:
        wide = wide.repeat(128, 1).repeat(128, 2)[:, :130, :300]
    exact = decode(codes.tobytes(), "F8_E5M2").reshape(codes.shape) * wide
    with RangeReader() as reader:
        reader.open(shard)
        found = np.concatenate(
            [
                piece.copy()
                for part in parts_of(region, reader)
                for piece in part.pieces(reader, np.empty(1000, np.uint8))
            ]
        )
    np.testing.assert_array_equal(found, exact.ravel())


@pytest.mark.llamacpp
def test_a_scaled_matrix_that_is_split_feeds_each_part(tmp_path):
    """DeepSeek's kv_b_proj becomes two tensors of the GGUF, experts become one."""
    folder = write_family(tmp_path / "m", "DeepSeek V3")
    true = to_fp8(folder, BLOCKS, "block", ending="_scale_inv")
    found = api.scan(api.open_model(str(folder)))
    entries = {t.name: t for t in found.tensors if t.layer_idx == 0}
    k, v = entries["blk.0.attn_k_b.weight"], entries["blk.0.attn_v_b.weight"]
    weights = true["model.layers.0.self_attn.kv_b_proj.weight"]
    assert k.n_weights + v.n_weights == weights.size
    assert max(k.max, v.max) == weights.max()
    assert min(k.min, v.min) == weights.min()
    total = k.mean * k.n_weights + v.mean * v.n_weights
    assert total == pytest.approx(weights.sum(), rel=1e-9)


@pytest.mark.llamacpp
@pytest.mark.slow
def test_an_fp8_checkpoint_goes_the_whole_way_local_and_streamed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_llama(tmp_path / "tiny-fp8", n_layers=2, hidden=256, ffn=512)
    to_fp8(folder, BLOCKS, "block", ending="_scale_inv")
    policy = EwqPolicy(measure="histogram")
    made = api.make_gguf(str(folder), tmp_path / "out.gguf", policy)
    assert made.verification.found_size_bytes == made.plan.totals.file_size_bytes
    (q,) = (t for t in made.plan.tensors if t.name == "blk.0.attn_q.weight")
    assert q.base_type == "BF16"
    with serve(tmp_path, Faults()) as url:
        streamed = api.plan(api.Run(f"{url}/tiny-fp8"), policy)
    assert streamed == made.plan


def test_a_bf16_checkpoint_that_kept_its_fp8_config_is_read_as_bf16(tmp_path):
    folder = write_llama(tmp_path / "m", n_layers=1)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = compressed("tensor")
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(str(folder)).is_mapped_by_name
    assert "quantization_config" not in staged_config(folder)


@pytest.mark.parametrize("command", ["scan", "plan", "convert", "gguf"])
def test_codes_without_scales_are_refused_by_every_command(tmp_path, capsys, command):
    folder = write_llama(tmp_path / "m", n_layers=1)
    to_fp8(folder, BLOCKS, "one", ending="_zero_point")
    assert main([command, str(folder), "-o", str(tmp_path / "out")]) == 3
    told = capsys.readouterr().err
    assert "q_proj.weight is F8_E4M3 and has no _scale or _scale_inv tensor" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    ("shape", "ending", "others", "message"),
    [
        ("block", "_scale_inv", (), r"shape \(4, 4\), .* \(64, 64\): not in every"),
        ("one", "_scale", (".prob_scale",), "holds 7 tensors like .*prob_scale"),
        ("one", "_scale_inv", (".input_scale",), "tensors like .*input_scale beside"),
    ],
)
def test_scales_that_the_converter_cannot_apply_are_refused(
    tmp_path, shape, ending, others, message
):
    folder = write_llama(tmp_path, n_layers=1)
    to_fp8(folder, None, shape, ending=ending, others=others, block=(16, 16))
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(str(folder))
    assert "use the BF16 checkpoint" in caught.value.remedy


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt NVFP4"),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {
                    "a": {"quant_algo": "FP8"},
                    "b": {"quant_algo": "W4A16_NVFP4"},
                },
            },
            "modelopt MIXED_PRECISION",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float"}}},
            },
            "compressed-tensors nvfp4-pack-quantized",
        ),
    ],
)
def test_weights_of_four_bits_are_quantised_already(tmp_path, config, name):
    folder = write_llama(tmp_path, n_layers=1)
    told = json.loads((folder / "config.json").read_text())
    told["text_config"] = {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match=rf"quantised already \({name}\)"):
        open_checkpoint(str(folder))


def test_nvfp4_told_in_hf_quant_config_alone_is_refused(tmp_path):
    folder = write_llama(tmp_path, n_layers=1)
    told = json.dumps(hf_quant_config("NVFP4"))
    (folder / "hf_quant_config.json").write_text(told)
    with pytest.raises(InputError, match=r"quantised already \(modelopt NVFP4\)"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("ending", ["weight", "weight_packed"])
def test_fp8_scales_of_packed_weights_are_no_weights(tmp_path, ending):
    """NVFP4 that no config tells of."""
    write_llama(tmp_path, n_layers=1)
    name = "model.layers.0.mlp.up_proj"
    write_raw(
        tmp_path / "model.safetensors",
        {
            f"{name}.{ending}": ("U8", [4, 8], bytes(32)),
            f"{name}.weight_scale": ("F8_E4M3", [4, 1], bytes(4)),
        },
    )
    with pytest.raises(InputError, match="up_proj.weight_scale holds the FP8 scales"):
        open_checkpoint(str(tmp_path))

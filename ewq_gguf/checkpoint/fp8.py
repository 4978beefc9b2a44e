"""FP8 weights: which tensor holds the scales of which, and how the converter is told.

Tools that make FP8 checkpoints tell it in different words (`fp8`, `fbgemm_fp8`,
`modelopt`, `compressed-tensors`, or in hf_quant_config.json alone), and all write the
same thing: a weight is its code times its scale. So the tensors decide, not the words;
the converter gets the words that make it do the same. A code without a scale is no
weight, and is refused.

Source: llama.cpp conversion/base.py, `dequant_model`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ewq_gguf.checkpoint.files import read_json_object
from ewq_gguf.checkpoint.header import TensorHeader
from ewq_gguf.checkpoint.shards import ShardFile
from ewq_gguf.errors import InputError

QUANT_FILE = "hf_quant_config.json"
_DTYPES = ("F8_E4M3", "F8_E5M2")
_SCALE_DTYPES = ("F32", "F64", "BF16", "F16")
_INVERSE, _PLAIN = "_scale_inv", "_scale"
_REMEDY = "use the BF16 checkpoint it was made from"
#: What transformers takes where a block's size is not told.
_BLOCK_SIZE = (128, 128)

#: Tensors about activations and caches, which a GGUF has no use for.
_UNUSED = (
    ".activation_scale", "_activation_scale", ".input_scale", ".input_scale_ub",
    ".output_scale", ".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".prob_scale",
)  # fmt: skip
#: Those that the converter drops, by its name of the method.
_DROPPED = {
    "fp8": (".activation_scale", "_activation_scale"),
    "modelopt": (".input_scale", ".k_scale", ".v_scale"),
    "compressed-tensors": (),
}

_CONFIG_KEYS = ("quantization_config", "compression_config")

BlockSize = tuple[int, int]


@dataclass(frozen=True)
class Fp8:
    """The FP8 weights of a checkpoint.

    Attributes:
        scales: the name of each weight's scales.
        block_size: rows and columns that share a scale; None where it is one scale for
            all, or one per row.
        converter_config: the `quantization_config` that tells the converter.
    """

    scales: Mapping[str, str]
    block_size: BlockSize | None
    converter_config: Mapping[str, Any]


def quantisation_of(folder: Path, config: Mapping[str, Any]) -> object:
    """A checkpoint's quantisation as it is stated in any of its files, or None.

    Args:
        folder: it is in.
        config: config.json.

    Raises:
        InputError: hf_quant_config.json is no JSON object.
    """
    text_config = config.get("text_config")
    for values in (config, text_config if isinstance(text_config, dict) else {}):
        for key in _CONFIG_KEYS:
            if values.get(key):
                return values[key]
    if not (folder / QUANT_FILE).is_file():
        return None
    told = read_json_object(folder, QUANT_FILE)
    quantised, producer = told.get("quantization"), told.get("producer")
    if not isinstance(quantised, dict) or not quantised.get("quant_algo"):
        return None
    maker = producer.get("name") if isinstance(producer, dict) else None
    return {"quant_method": maker or "modelopt", **quantised}


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says nothing of a quantisation."""
    return {
        key: without_quantisation(value) if key == "text_config" else value
        for key, value in config.items()
        if key not in _CONFIG_KEYS
    }


def is_fp8(quantised: object) -> bool:
    """Whether all weights that are quantised are FP8."""
    if not isinstance(quantised, dict):
        return False
    method = quantised.get("quant_method")
    if method == "modelopt":
        return _is_modelopt_fp8(quantised)
    if method == "compressed-tensors":
        return _is_compressed_fp8(quantised)
    return method in ("fp8", "fbgemm_fp8")


def method_name(quantised: object) -> str:
    """How a quantisation is called, for a message."""
    if not isinstance(quantised, dict):
        return "quantization_config"
    words = (quantised.get(key) for key in ("quant_method", "quant_algo", "format"))
    return " ".join(w for w in words if isinstance(w, str)) or "quantization_config"


def _is_modelopt_fp8(quantised: Mapping[str, Any]) -> bool:
    layers = quantised.get("quantized_layers")
    entries = list(layers.values()) if isinstance(layers, dict) else []
    if quantised.get("quant_algo") != "MIXED_PRECISION":
        entries.append(quantised)
    algorithms = [e.get("quant_algo") if isinstance(e, dict) else e for e in entries]
    return bool(algorithms) and all(str(a).startswith("FP8") for a in algorithms)


def _is_compressed_fp8(quantised: Mapping[str, Any]) -> bool:
    groups = quantised.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return False
    weights = [g.get("weights") if isinstance(g, dict) else g for g in groups.values()]
    return all(
        isinstance(w, dict) and (w.get("type"), w.get("num_bits")) == ("float", 8)
        for w in weights
    )


def fp8_of(
    tensors: Sequence[tuple[ShardFile, TensorHeader]], quantised: object
) -> Fp8 | None:
    """Find the scales of every FP8 weight; None where there is no such weight.

    Args:
        tensors: The checkpoint's tensors with their files.
        quantised: The stated quantisation, which has the size of a block.

    Raises:
        InputError: an FP8 tensor has no scales or some that do not fit, or the
            converter cannot do it.
    """
    headers = {tensor.name: tensor for _, tensor in tensors}
    weights = [(s, t) for s, t in tensors if t.dtype in _DTYPES]
    if not weights:
        return None
    scales = {}
    for shard, tensor in weights:
        if f"{tensor.name}_2" in headers or _is_scale(tensor.name, headers):
            # NVFP4 has scales of its scales, and of compressed-tensors a global one.
            raise InputError(
                "scan",
                shard.path,
                f"the weights are quantised already: {tensor.name} holds the FP8 "
                "scales of others",
                _REMEDY,
            )
        endings = (e for e in (_INVERSE, _PLAIN) if tensor.name + e in headers)
        ending = next(endings, None)
        if ending is None or headers[tensor.name + ending].dtype not in _SCALE_DTYPES:
            raise InputError(
                "scan",
                shard.path,
                f"{tensor.name} is {tensor.dtype} and has no {_PLAIN} or {_INVERSE} "
                "tensor: what its codes stand for is not known",
                _REMEDY,
            )
        scales[tensor.name] = tensor.name + ending
    pairs = [(headers[name], headers[scale]) for name, scale in scales.items()]
    shard = weights[0][0]
    block_size = _block_size(pairs, quantised, shard.path)
    config = _converter_config(set(scales.values()), block_size, shard.path)
    _check_unused(headers, config["quant_method"], shard.path)
    return Fp8(scales, block_size, config)


def _is_scale(name: str, names: Collection[str]) -> bool:
    base = name.removesuffix(_PLAIN)
    return base != name and (base in names or f"{base}_packed" in names)


def _block_size(
    pairs: Sequence[tuple[TensorHeader, TensorHeader]], quantised: object, path: Path
) -> BlockSize | None:
    """None where every weight has one scale, or one per row; else the block's size."""
    told = _told_block_size(quantised)
    for size in (None, told):
        if all(scale_fits(w.shape, s.shape, size) for w, s in pairs):
            return size
    weight, scale = next(
        (pair for pair in pairs if not scale_fits(pair[0].shape, pair[1].shape, told)),
        pairs[0],
    )
    raise InputError(
        "scan",
        path,
        f"{scale.name} has shape {scale.shape}, {weight.name} {weight.shape}: not in "
        f"every weight one scale or one per row, nor one per {told[0]} x {told[1]} "
        "block",
        _REMEDY,
    )


def scale_fits(
    weight: Sequence[int], scale: Sequence[int], block_size: BlockSize | None
) -> bool:
    """Whether scales have the shape that a weight needs.

    Args:
        weight: its shape, matrices or stacks of them.
        scale: the scales' shape.
        block_size: The size of a block; None for one scale per weight, stack or row.
    """
    if len(weight) < 2:
        return False
    if block_size is not None:
        blocks = [-(-n // b) for n, b in zip(weight[-2:], block_size, strict=True)]
        return list(scale) == [*weight[:-2], *blocks]
    padded = [*scale, *[1] * (len(weight) - len(scale))]
    return len(padded) == len(weight) and all(
        n in (1, size) for n, size in zip(padded, weight, strict=True)
    )


def _told_block_size(quantised: object) -> BlockSize:
    if not isinstance(quantised, dict):
        return _BLOCK_SIZE
    sizes = [quantised.get("weight_block_size")]
    groups = quantised.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            sizes.append(weights.get("block_structure"))
    for size in sizes:
        if isinstance(size, (list, tuple)) and len(size) == 2:
            rows, columns = size
            if type(rows) is type(columns) is int and min(rows, columns) > 0:
                return rows, columns
    return _BLOCK_SIZE


def _converter_config(
    scale_names: set[str], block_size: BlockSize | None, path: Path
) -> dict[str, Any]:
    """The converter's words: it multiplies other scales for each of its methods."""
    inverse = {name for name in scale_names if name.endswith(_INVERSE)}
    if inverse == scale_names:
        return {"quant_method": "fp8", "weight_block_size": block_size}
    if inverse:
        mixed = sorted(inverse)[0], sorted(scale_names - inverse)[0]
        raise InputError(
            "scan",
            path,
            f"holds scales of two kinds ({' and '.join(mixed)}), and llama.cpp's "
            "converter applies only one",
            _REMEDY,
        )
    if block_size is None:
        return {"quant_method": "modelopt"}
    weights = {
        "type": "float",
        "num_bits": 8,
        "strategy": "block",
        "block_structure": block_size,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }


def _check_unused(names: Mapping[str, object], method: str, path: Path) -> None:
    """Refuse what the converter would stumble over, as it takes all for weights."""
    odd = [
        name
        for name in names
        if name.endswith(_UNUSED) and not name.endswith(_DROPPED[method])
    ]
    if odd:
        raise InputError(
            "scan",
            path,
            f"holds {len(odd)} tensors like {odd[0]} beside FP8 weights, which "
            "llama.cpp's converter does not know",
            _REMEDY,
        )

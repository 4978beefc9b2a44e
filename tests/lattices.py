"""Checkpoints whose matrices are quantised already, with their true values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.checkpoint.header import read_header
from tests.checkpoints import write_llama, write_raw

Values = NDArray[np.float64]

#: A projection of a Llama layer is quantised; the embedding, the head, norms are not.
PROJECTIONS = (".self_attn.", ".mlp.")


def on_q4_0(shape: tuple[int, ...], rng: np.random.Generator) -> Values:
    """d (q - 8) as Q4_0 has it; some blocks are without their -8."""
    blocks = (shape[0], shape[1] // 32)
    scales = rng.uniform(1e-3, 1e-2, (*blocks, 1)).astype(np.float16)
    lowest = rng.choice([-8, -7, -3], (*blocks, 1))
    q = np.maximum(rng.integers(-8, 8, (*blocks, 32)), lowest)
    found: Values = (scales.astype(np.float64) * q).reshape(shape)
    return found


def on_int4(shape: tuple[int, ...], rng: np.random.Generator) -> Values:
    """Integers of 4 bits times one BF16 scale per row."""
    scales = bf16(rng.uniform(1e-3, 1e-2, (shape[0], 1)))
    return scales * rng.integers(-8, 8, shape)


def on_mxfp4(shape: tuple[int, ...], rng: np.random.Generator) -> Values:
    """E2M1 codes times a power of two per 32."""
    codes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = np.concatenate([codes, -codes])
    scales = 2.0 ** rng.integers(-10, -5, (shape[0], shape[1] // 32, 1))
    picked = rng.choice(codes, (shape[0], shape[1] // 32, 32))
    found: Values = (scales * picked).reshape(shape)
    return found


def on_ternary(shape: tuple[int, ...], rng: np.random.Generator) -> Values:
    """-s, 0 and s, one s per matrix, as BitNet has it."""
    return bf16(rng.uniform(0.01, 0.05, 1)) * rng.integers(-1, 2, shape)


def on_int8(shape: tuple[int, ...], rng: np.random.Generator) -> Values:
    """Integers of 8 bits times one BF16 scale per row."""
    scales = bf16(rng.uniform(1e-4, 1e-3, (shape[0], 1)))
    return scales * rng.integers(-127, 128, shape)


def bf16(values: Values) -> Values:
    """Rounded to BF16, ties to even."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    found: Values = rounded.astype(np.uint32).view(np.float32).astype(np.float64)
    return found


def as_bytes(values: Values, dtype: str) -> bytes:
    """Little-endian, rounded to the nearest, ties to even."""
    if dtype == "BF16":
        return (
            (bf16(values).astype(np.float32).view(np.uint32) >> 16)
            .astype(np.uint16)
            .tobytes()
        )
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes()


def write_lattice_llama(
    folder: Path,
    values_of: Callable[[tuple[int, ...], np.random.Generator], Values],
    *,
    dtype: str = "BF16",
    hidden: int = 64,
    ffn: int = 96,
) -> dict[str, Values]:
    """A small Llama whose projections are on a lattice.

    Returns:
        Their values before they were rounded to the dtype, by name.
    """
    write_llama(folder, dtype=dtype, hidden=hidden, ffn=ffn)
    rng = np.random.default_rng(11)
    path = folder / "model.safetensors"
    with path.open("rb") as file:
        header = read_header(file.fileno(), path)
        tensors, truth = {}, {}
        for tensor in header.tensors:
            file.seek(tensor.begin)
            data = file.read(tensor.end - tensor.begin)
            if len(tensor.shape) == 2 and any(p in tensor.name for p in PROJECTIONS):
                values = truth[tensor.name] = values_of(tensor.shape, rng)
                data = as_bytes(values, dtype)
            tensors[tensor.name] = (dtype, list(tensor.shape), data)
    write_raw(path, tensors)
    return truth


def set_config(folder: Path, **values: object) -> None:
    """Add keys to config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# Packed checkpoints, written as their public descriptions say.


def int_words(integers: NDArray[np.int64], bits: int, axis: int) -> NDArray[np.int32]:
    """Unsigned integers in 32-bit words, the lowest bits first, padded with 0."""
    moved = np.moveaxis(integers, axis, -1)
    per_word = 32 // bits
    padding = -moved.shape[-1] % per_word
    moved = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, padding)])
    words = np.zeros((*moved.shape[:-1], moved.shape[-1] // per_word), np.uint32)
    for i in range(per_word):
        words |= moved[..., i::per_word].astype(np.uint32) << np.uint32(bits * i)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


Raw = tuple[str, list[int], bytes]


def raw(dtype: str, array: NDArray[np.generic]) -> Raw:
    return dtype, list(array.shape), np.ascontiguousarray(array).tobytes()


def raw_bf16(values: Values) -> Raw:
    return "BF16", list(values.shape), as_bytes(values, "BF16")


def compressed(
    shape: tuple[int, ...],
    rng: np.random.Generator,
    *,
    bits: int = 4,
    group: int | None = 32,
    symmetric: bool = True,
    order: bool = False,
) -> tuple[Values, dict[str, Raw]]:
    """compressed-tensors' pack-quantized: a weight and the tensors it is kept in."""
    rows, columns = shape
    n_groups = columns // group if group else 1
    q = rng.integers(0, 1 << bits, shape)
    scales = bf16(rng.uniform(1e-3, 1e-2, (rows, n_groups)))
    groups = np.arange(columns) // (columns // n_groups)
    if order:
        groups = rng.permutation(groups)
    zeros = np.full((rows, n_groups), 1 << bits - 1)
    parts = {
        "_packed": raw("I32", int_words(q, bits, 1)),
        "_scale": raw_bf16(scales),
        "_shape": raw("I64", np.array(shape, np.int64)),
    }
    if not symmetric:
        zeros = rng.integers(0, 1 << bits, (rows, n_groups))
        parts["_zero_point"] = raw("I32", int_words(zeros, bits, 0))
    if order:
        parts["_g_idx"] = raw("I32", groups.astype(np.int32))
    return scales[:, groups] * (q - zeros[:, groups]), parts


def compressed_config(bits: int = 4, **quantised: object) -> dict[str, object]:
    weights = {"num_bits": bits, "type": "int", "strategy": "group"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    } | quantised


def int8_rows(
    shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[Values, dict[str, Raw]]:
    """compressed-tensors' int-quantized: W8A8 with a scale per row."""
    q = rng.integers(-127, 128, shape)
    scales = bf16(rng.uniform(1e-4, 1e-3, (shape[0], 1)))
    parts = {"": raw("I8", q.astype(np.int8)), "_scale": raw_bf16(scales)}
    return scales * q, parts


def gptq(
    shape: tuple[int, ...],
    rng: np.random.Generator,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    order: bool = False,
) -> tuple[Values, dict[str, Raw]]:
    """GPTQ: inputs packed; zero points less 1."""
    rows, columns = shape
    n_groups = columns // group
    q = rng.integers(0, 1 << bits, (columns, rows))
    scales = rng.uniform(1e-3, 1e-2, (n_groups, rows)).astype(np.float16)
    zeros = np.full((n_groups, rows), 1 << bits - 1)
    if not symmetric:
        zeros = rng.integers(1, 1 << bits, (n_groups, rows))
    groups = np.arange(columns) // group
    if order:
        groups = rng.permutation(groups)
    parts = {
        "qweight": raw("I32", int_words(q, bits, 0)),
        "qzeros": raw("I32", int_words(zeros - 1, bits, 1)),
        "scales": raw("F16", scales),
        "g_idx": raw("I32", groups.astype(np.int32)),
    }
    return (scales.astype(np.float64)[groups] * (q - zeros[groups])).T, parts


def awq(
    shape: tuple[int, ...], rng: np.random.Generator, *, group: int = 32
) -> tuple[Values, dict[str, Raw]]:
    """AWQ's gemm: outputs packed, eight in a word as 0, 2, 4, 6, 1, 3, 5, 7."""
    rows, columns = shape
    q = rng.integers(0, 16, (columns, rows))
    zeros = rng.integers(0, 16, (columns // group, rows))
    scales = rng.uniform(1e-3, 1e-2, zeros.shape).astype(np.float16)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(integers: NDArray[np.int64]) -> NDArray[np.int32]:
        eights = integers.reshape(len(integers), -1, 8)[:, :, order]
        return int_words(eights.reshape(len(integers), -1), 4, 1)

    parts = {
        "qweight": raw("I32", packed(q)),
        "qzeros": raw("I32", packed(zeros)),
        "scales": raw("F16", scales),
    }
    groups = np.arange(columns) // group
    return (scales.astype(np.float64)[groups] * (q - zeros[groups])).T, parts


def write_packed_llama(
    folder: Path,
    pack: Callable[
        [tuple[int, ...], np.random.Generator], tuple[Values, dict[str, Raw]]
    ],
    quantised: dict[str, object],
    *,
    stem: str = ".weight",
) -> dict[str, Values]:
    """A small Llama whose projections are packed.

    Args:
        folder: where.
        pack: a weight and its tensors, by what follows the stem.
        quantised: quantization_config.
        stem: of the tensors' names: `NAME.weight` or `NAME.`.

    Returns:
        The weights' true values, by name.
    """
    write_llama(folder, hidden=64, ffn=96)
    set_config(folder, quantization_config=quantised)
    rng = np.random.default_rng(13)
    path = folder / "model.safetensors"
    tensors: dict[str, Raw] = {}
    truth = {}
    with path.open("rb") as file:
        for tensor in read_header(file.fileno(), path).tensors:
            if len(tensor.shape) == 2 and any(p in tensor.name for p in PROJECTIONS):
                truth[tensor.name], parts = pack(tensor.shape, rng)
                start = tensor.name.removesuffix(".weight") + stem
                tensors |= {start + end: part for end, part in parts.items()}
                continue
            file.seek(tensor.begin)
            data = file.read(tensor.end - tensor.begin)
            tensors[tensor.name] = ("BF16", list(tensor.shape), data)
    write_raw(path, tensors)
    return truth


def pack_gpt_oss(folder: Path) -> dict[str, Values]:
    """Replace a gpt-oss checkpoint's experts by MXFP4 ones, as OpenAI published them.

    Returns:
        The experts' weights as (expert, output, input), by the plain tensors' names.
    """
    path = folder / "model.safetensors"
    rng = np.random.default_rng(17)
    tensors: dict[str, Raw] = {}
    truth = {}
    with path.open("rb") as file:
        for tensor in read_header(file.fileno(), path).tensors:
            if not tensor.name.endswith(("gate_up_proj", "down_proj")):
                file.seek(tensor.begin)
                data = file.read(tensor.end - tensor.begin)
                tensors[tensor.name] = (tensor.dtype, list(tensor.shape), data)
                continue
            experts, inputs, outputs = tensor.shape
            codes = rng.integers(0, 16, (experts, outputs, inputs))
            exponents = rng.integers(115, 122, (experts, outputs, inputs // 32))
            blocks = codes[..., ::2] | codes[..., 1::2] << 4
            blocks = blocks.reshape(experts, outputs, inputs // 32, 16)
            tensors[f"{tensor.name}_blocks"] = raw("U8", blocks.astype(np.uint8))
            tensors[f"{tensor.name}_scales"] = raw("U8", exponents.astype(np.uint8))
            table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
            table = np.concatenate([table, -table])
            scales = 2.0 ** (exponents.repeat(32, axis=-1) - 127)
            truth[tensor.name] = table[codes] * scales
    write_raw(path, tensors)
    set_config(folder, quantization_config={"quant_method": "mxfp4"})
    return truth

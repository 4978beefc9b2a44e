"""Small LoRA adapters as PEFT saves them, and what merging them should give.

The references are written for reading, not for speed: float64 products of numpy, and
rounding by a search among all values of a type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints import write_shard

Floats = NDArray[np.float64]

PREFIX = "base_model.model."


def write_adapter(
    folder: Path,
    tensors: Mapping[str, NDArray[np.float64]],
    *,
    dtype: str = "F32",
    **config: object,
) -> Path:
    """An adapter's folder; names without `base_model.model.`."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "init_lora_weights": True,
        "bias": "none",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(values))
    write_shard(
        folder / "adapter_model.safetensors",
        {
            PREFIX + name: (dtype, np.ascontiguousarray(value, np.float32))
            for name, value in tensors.items()
        },
    )
    return folder


def factors(
    module: str,
    rows: int,
    columns: int,
    *,
    rank: int = 4,
    seed: int = 0,
    ends: tuple[str, str] = ("lora_A.weight", "lora_B.weight"),
) -> dict[str, Floats]:
    """A random A (rank, columns) and B (rows, rank), exact in float32."""
    rng = np.random.default_rng([seed, len(module), rows])
    a, b = rng.standard_normal((rank, columns)), rng.standard_normal((rows, rank))
    values = (f"{module}.{ends[0]}", a), (f"{module}.{ends[1]}", b * 0.05)
    return {name: value.astype(np.float32).astype(float) for name, value in values}


def read_tensors(*paths: Path) -> dict[str, tuple[str, Floats]]:
    """Every tensor's dtype and values, by the format's description."""
    tensors = {}
    for path in paths:
        raw = path.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:begin])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            data = raw[begin + first : begin + end]
            values = floats_of(data, entry["dtype"]).reshape(entry["shape"])
            tensors[name] = (entry["dtype"], values)
    return tensors


def floats_of(data: bytes, dtype: str) -> Floats:
    """Little-endian floats as float64."""
    if dtype == "BF16":
        wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).astype(float)
    numpy_type = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]
    return np.frombuffer(data, numpy_type).astype(float)


def nearest(values: Floats, dtype: str) -> Floats:
    """The nearest finite values of a 16-bit type, ties to the even code."""
    if dtype not in ("BF16", "F16"):
        return values.astype({"F32": np.float32, "F64": float}[dtype]).astype(float)
    n_finite = {"BF16": 0x7F80, "F16": 0x7C00}[dtype]
    known = floats_of(np.arange(n_finite, dtype=np.uint16).tobytes(), dtype)
    size = np.abs(values)
    above = np.clip(np.searchsorted(known, size), 1, len(known) - 1)
    gap_below, gap_above = size - known[above - 1], known[above] - size
    takes_above = (gap_above < gap_below) | (
        (gap_above == gap_below) & (above % 2 == 0)
    )
    return np.copysign(np.where(takes_above, known[above], known[above - 1]), values)

"""Llama checkpoints made here for benchmarks: random weights, or none at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 22
_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class Shape:
    """The sizes that decide a Llama's tensors, heads of 64."""

    n_layers: int
    n_embd: int
    n_ff: int
    n_kv: int
    n_vocab: int


#: Matrices as large as a 1B model's, Llama 2 70B's with layers for 100 GB, Llama 3.1's.
SHAPE_1B = Shape(n_layers=16, n_embd=2048, n_ff=8192, n_kv=512, n_vocab=32000)
SHAPE_405B = Shape(n_layers=126, n_embd=16384, n_ff=53248, n_kv=1024, n_vocab=128256)
SHAPE_100GB = Shape(n_layers=58, n_embd=8192, n_ff=28672, n_kv=1024, n_vocab=32000)


def write_checkpoint(
    folder: Path, shape: Shape, dtype: str, *, n_shards: int = 1, sparse: bool = False
) -> Path:
    """Write config.json and shards; a sparse one is headers over holes.

    Args:
        folder: made if it is not there.
        shape: of the model.
        dtype: `BF16`, `F16` or `F32`.
        n_shards: of about as many tensors each.
        sparse: leave the weights out: the file has its size and no blocks.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(shape)))
    tensors = list(_tensors(shape))
    rng = np.random.default_rng(0)
    for index in range(n_shards):
        mine = dict(tensors[index::n_shards])
        name = f"model-{index + 1:05}-of-{n_shards:05}.safetensors"
        path = folder / ("model.safetensors" if n_shards == 1 else name)
        header, data_bytes = _header(mine, dtype)
        with path.open("wb") as file:
            file.write(header)
            if sparse:
                file.truncate(len(header) + data_bytes)
                continue
            for dims in mine.values():
                for begin in range(0, prod(dims), _CHUNK):
                    n = min(_CHUNK, prod(dims) - begin)
                    file.write(_weights(rng, n, dtype).data)
    return folder


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    n = shape.n_embd
    yield "model.embed_tokens.weight", (shape.n_vocab, n)
    for layer in range(shape.n_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (n,)
        yield prefix + "post_attention_layernorm.weight", (n,)
        for name, rows in (("q", n), ("k", shape.n_kv), ("v", shape.n_kv), ("o", n)):
            yield prefix + f"self_attn.{name}_proj.weight", (rows, n)
        yield prefix + "mlp.gate_proj.weight", (shape.n_ff, n)
        yield prefix + "mlp.up_proj.weight", (shape.n_ff, n)
        yield prefix + "mlp.down_proj.weight", (n, shape.n_ff)
    yield "model.norm.weight", (n,)


def _header(tensors: dict[str, tuple[int, ...]], dtype: str) -> tuple[bytes, int]:
    entries, end = {}, 0
    for name, dims in tensors.items():
        begin, end = end, end + prod(dims) * _BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": dims, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def _weights(rng: np.random.Generator, n: int, dtype: str) -> NDArray[np.generic]:
    floats = rng.standard_normal(n, dtype=np.float32) * np.float32(0.02)
    if dtype == "F32":
        return floats
    if dtype == "F16":
        return floats.astype(np.float16)
    return (floats.view(np.uint32) >> 16).astype(np.uint16)


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": shape.n_layers,
        "hidden_size": shape.n_embd,
        "intermediate_size": shape.n_ff,
        "num_attention_heads": shape.n_embd // 64,
        "num_key_value_heads": shape.n_kv // 64,
        "vocab_size": shape.n_vocab,
        "tie_word_embeddings": True,
    }

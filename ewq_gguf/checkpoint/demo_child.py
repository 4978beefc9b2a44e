"""Rebuild the built-in checkpoint from its Q4_1 GGUF: run as a child process.

    python -m ewq_gguf.checkpoint.demo_child GGUF OUT [--original]

writes model.safetensors, config and tokenizer files into the folder OUT. With
`--original` the weights are the dequantised ones, float32 and not rotated: what the
tests compare with.

Weights are dequantised by gguf-py and written tensor by tensor, so the child stays
small; everything written depends on the GGUF alone, on no installed library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFReader, dequantize

from ewq_gguf.checkpoint.rotation import (
    FloatArray,
    Rotation,
    draw_rotation,
    to_bfloat16,
)

# Bounds memory: the embedding has 49152 rows.
_CHUNK_ROWS = 8192

_EMBEDDING = "model.embed_tokens"
_FINAL_NORM = "model.norm"
# Our name of a layer's tensor -> GGUF's, and the norm whose output it reads.
_READERS = {
    "self_attn.q_proj": ("attn_q", "attn_norm"),
    "self_attn.k_proj": ("attn_k", "attn_norm"),
    "self_attn.v_proj": ("attn_v", "attn_norm"),
    "mlp.gate_proj": ("ffn_gate", "ffn_norm"),
    "mlp.up_proj": ("ffn_up", "ffn_norm"),
}
_WRITERS = {"self_attn.o_proj": "attn_output", "mlp.down_proj": "ffn_down"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


class Tensor(NamedTuple):
    """One tensor to write: its parts are arrays of its rows, in order."""

    name: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[FloatArray]]


class Source:
    """The GGUF's weights, in Hugging Face's row order, and its metadata."""

    def __init__(self, path: Path) -> None:
        """Open the file; its hash was checked by the parent."""
        self._reader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.n_layers: int = self.value("llama.block_count")
        self.width: int = self.value("llama.embedding_length")

    def value(self, key: str) -> Any:
        """One metadata value."""
        return self._reader.fields[key].contents()

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, rows first."""
        sizes = self._tensors[f"{name}.weight"].shape.tolist()
        return tuple(int(size) for size in reversed(sizes))

    def parts(self, name: str) -> Iterator[FloatArray]:
        """A matrix, at most `_CHUNK_ROWS` rows at a time, or a vector; float64."""
        tensor = self._tensors[f"{name}.weight"]
        for start in range(0, len(tensor.data), _CHUNK_ROWS):
            rows = tensor.data[start : start + _CHUNK_ROWS]
            yield dequantize(rows, tensor.tensor_type).astype(np.float64)

    def whole(self, name: str) -> FloatArray:
        """A tensor small enough to be one part, its rows in Hugging Face's order."""
        (weights,) = self.parts(name)
        if name.endswith("attn_q"):
            return _unpermuted(weights, self.value("llama.attention.head_count"))
        if name.endswith("attn_k"):
            return _unpermuted(weights, self.value("llama.attention.head_count_kv"))
        return weights


def original_tensors(source: Source) -> list[Tensor]:
    """The dequantised weights as they are, head tied."""

    def tensor(name: str, gguf_name: str) -> Tensor:
        is_large = gguf_name == "token_embd"
        return Tensor(
            f"{name}.weight",
            source.shape(gguf_name),
            lambda: (
                source.parts(gguf_name) if is_large else iter([source.whole(gguf_name)])
            ),
        )

    tensors = [tensor(_EMBEDDING, "token_embd"), tensor(_FINAL_NORM, "output_norm")]
    layer_names = {name: gguf_name for name, (gguf_name, _) in _READERS.items()}
    layer_names |= _WRITERS | _NORMS
    for layer_idx in range(source.n_layers):
        tensors += [
            tensor(f"model.layers.{layer_idx}.{name}", f"blk.{layer_idx}.{gguf_name}")
            for name, gguf_name in layer_names.items()
        ]
    return tensors


def rotated_tensors(source: Source, rotation: Rotation) -> list[Tensor]:
    """The same model in the rotated basis, head untied (docs/demo-model.md)."""

    def reader(name: str, gguf_name: str, norm: str) -> Tensor:
        # W diag(g) R diag(g')^-1
        def parts() -> Iterator[FloatArray]:
            gain = source.whole(norm)
            paired = rotation.paired_gain(gain)
            is_head = gguf_name == "token_embd"
            whole = source.parts if is_head else lambda name: iter([source.whole(name)])
            for weights in whole(gguf_name):
                yield rotation.columns(weights * gain) / paired

        return Tensor(f"{name}.weight", source.shape(gguf_name), parts)

    def writer(name: str, gguf_name: str) -> Tensor:
        # R^T W
        return Tensor(
            f"{name}.weight",
            source.shape(gguf_name),
            lambda: iter([rotation.rows(source.whole(gguf_name))]),
        )

    def norm(name: str, gguf_name: str) -> Tensor:
        return Tensor(
            f"{name}.weight",
            source.shape(gguf_name),
            lambda: iter([rotation.paired_gain(source.whole(gguf_name))]),
        )

    embedding = Tensor(
        f"{_EMBEDDING}.weight",
        source.shape("token_embd"),
        lambda: map(rotation.columns, source.parts("token_embd")),
    )
    head = reader("lm_head", "token_embd", "output_norm")
    tensors = [embedding, norm(_FINAL_NORM, "output_norm"), head]
    for layer_idx in range(source.n_layers):
        ours, theirs = f"model.layers.{layer_idx}", f"blk.{layer_idx}"
        tensors += [
            reader(f"{ours}.{name}", f"{theirs}.{matrix}", f"{theirs}.{gain}")
            for name, (matrix, gain) in _READERS.items()
        ]
        tensors += [
            writer(f"{ours}.{name}", f"{theirs}.{matrix}")
            for name, matrix in _WRITERS.items()
        ]
        tensors += [
            norm(f"{ours}.{name}", f"{theirs}.{gain}") for name, gain in _NORMS.items()
        ]
    return tensors


def write_safetensors(path: Path, tensors: list[Tensor], *, bfloat16: bool) -> None:
    """Write BF16 or F32 tensors, sorted by name, one part at a time.

    Ours instead of the library's so that the bytes cannot change with its version
    and no more than one part is held.
    """
    tensors = sorted(tensors)
    item_bytes = 2 if bfloat16 else 4
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + item_bytes * int(np.prod(tensor.shape))
        header[tensor.name] = {
            "dtype": "BF16" if bfloat16 else "F32",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        shown = 0
        for tensor in tensors:
            for part in tensor.parts():
                file.write(_encoded(part, bfloat16=bfloat16))
            percent = 100 * header[tensor.name]["data_offsets"][1] // end
            if percent >= shown + 10:
                shown = percent
                _say(f"{percent} % of the built-in model's weights written")


def config(source: Source, *, bfloat16: bool) -> dict[str, Any]:
    """config.json, with the key names that every reader of Llama checkpoints knows."""
    epsilon = source.value("llama.attention.layer_norm_rms_epsilon")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": source.value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": source.value("tokenizer.ggml.eos_token_id"),
        "hidden_act": "silu",
        "hidden_size": source.width,
        "initializer_range": 0.02,
        "intermediate_size": source.value("llama.feed_forward_length"),
        "max_position_embeddings": source.value("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": source.value("llama.attention.head_count"),
        "num_hidden_layers": source.n_layers,
        "num_key_value_heads": source.value("llama.attention.head_count_kv"),
        "pad_token_id": source.value("tokenizer.ggml.padding_token_id"),
        # The shortest decimal of the stored float32: 1e-05.
        "rms_norm_eps": float(str(np.float32(epsilon))),
        "rope_theta": source.value("llama.rope.freq_base"),
        "tie_word_embeddings": not bfloat16,
        "torch_dtype": "bfloat16" if bfloat16 else "float32",
        "use_cache": True,
        "vocab_size": source.value("llama.vocab_size"),
    }


def generation_config(source: Source) -> dict[str, Any]:
    """generation_config.json: where generation ends."""
    return {
        f"{role}_token_id": source.value(f"tokenizer.ggml.{key}_token_id")
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }


def tokenizer_files(source: Source) -> dict[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json.

    The GGUF's pre-tokenizer "smollm" splits off digits one by one before the byte-level
    rule. transformers' own GGUF reader loses that step (it cuts the newlines of
    a blank line apart where a digit follows), so the files are made here.
    """
    names: list[str] = source.value("tokenizer.ggml.tokens")
    types: list[int] = source.value("tokenizer.ggml.token_type")
    special = [index for index, kind in enumerate(types) if kind == 3]
    added = [{"id": index, **_added_token(names[index])} for index in special]
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": source.value("tokenizer.ggml.merges"),
        },
    }
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): _added_token(names[index]) for index in special
        },
        "chat_template": source.value("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.value("llama.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{
            f"{role}_token": names[source.value(f"tokenizer.ggml.{key}_token_id")]
            for role, key in roles.items()
        },
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def write_checkpoint(gguf_path: Path, out: Path, *, original: bool) -> None:
    """Write the checkpoint's generated files into the folder `out`."""
    source = Source(gguf_path)
    rotation = draw_rotation(source.width)
    files = tokenizer_files(source)
    files["config.json"] = config(source, bfloat16=not original)
    files["generation_config.json"] = generation_config(source)
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (out / name).write_bytes(text.encode())
    tensors = (
        original_tensors(source) if original else rotated_tensors(source, rotation)
    )
    write_safetensors(out / "model.safetensors", tensors, bfloat16=not original)


def _unpermuted(weights: FloatArray, n_heads: int) -> FloatArray:
    """Undo the converter's interleaving of a head's two rotary halves."""
    rows, columns = weights.shape
    heads = weights.reshape(n_heads, rows // n_heads // 2, 2, columns)
    return heads.swapaxes(1, 2).reshape(rows, columns)


def _encoded(part: FloatArray, *, bfloat16: bool) -> bytes:
    if bfloat16:
        return to_bfloat16(part).astype("<u2").tobytes()
    return part.astype("<f4").tobytes()


def _added_token(content: str) -> dict[str, Any]:
    token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, **token, "special": True}


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    write_checkpoint(
        Path(sys.argv[1]), Path(sys.argv[2]), original="--original" in sys.argv[3:]
    )

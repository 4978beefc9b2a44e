"""The built-in model's Q4_1 GGUF: its weights and its metadata."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize

from ewq_gguf.checkpoint.rotation import (
    FloatArray,
)

# Bounds memory: the embedding has 49152 rows.
_CHUNK_ROWS = 8192


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
    special = [index for index, token_type in enumerate(types) if token_type == 3]
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


def _unpermuted(weights: FloatArray, n_heads: int) -> FloatArray:
    """Undo the converter's interleaving of a head's two rotary halves."""
    rows, columns = weights.shape
    heads = weights.reshape(n_heads, rows // n_heads // 2, 2, columns)
    return heads.swapaxes(1, 2).reshape(rows, columns)


def _added_token(content: str) -> dict[str, Any]:
    token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, **token, "special": True}

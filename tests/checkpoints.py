"""Small seeded checkpoints that the real converter accepts."""

import io
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def encode(values: NDArray[np.float32], dtype: str) -> bytes:
    """Little-endian bytes of weights, BF16 by truncation."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes()


def write_shard(path: Path, tensors: dict[str, tuple[str, NDArray[np.float32]]]):
    """Write {name: (dtype, values)} as the format's description says."""
    write_raw(
        path,
        {
            name: (dtype, list(values.shape), encode(values, dtype))
            for name, (dtype, values) in tensors.items()
        },
    )


def write_raw(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]):
    """Write {name: (dtype, shape, bytes)}."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        end = offset + len(data)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _, _, data in tensors.values():
            file.write(data)


def write_llama(
    folder: Path,
    *,
    n_layers: int = 2,
    hidden: int = 64,
    ffn: int = 96,
    dtype: str = "BF16",
    n_shards: int = 1,
    tied: bool = False,
    rope_scaling: dict[str, object] | None = None,
    seed: int = 0,
) -> Path:
    """A random Llama with 4 heads, 2 key-value heads and a real tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }
    if rope_scaling:
        config["rope_scaling"] = rope_scaling
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    half = hidden // 2
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(n_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}self_attn.k_proj.weight": (half, hidden),
            f"{layer}self_attn.v_proj.weight": (half, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}mlp.gate_proj.weight": (ffn, hidden),
            f"{layer}mlp.up_proj.weight": (ffn, hidden),
            f"{layer}mlp.down_proj.weight": (hidden, ffn),
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    tensors = {}
    for name, shape in shapes.items():
        index = int(name.split(".")[2]) if ".layers." in name else 0
        scale = 0.02 * (1 + index % 5)  # layers differ, so the rule has work to do
        values = rng.standard_normal(shape).astype(np.float32) * np.float32(scale)
        tensors[name] = (dtype, values + np.float32(len(shape) == 1))
    write_shards(folder, tensors, n_shards)
    return folder


def write_shards(
    folder: Path,
    tensors: dict[str, tuple[str, NDArray[np.float32]]],
    n_shards: int,
):
    """One file, or several with their index."""
    if n_shards == 1:
        write_shard(folder / "model.safetensors", tensors)
        return
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for i in range(n_shards):
        part = {name: tensors[name] for name in names[i::n_shards]}
        file = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        write_shard(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def write_tokenizer(folder: Path) -> int:
    """Train a small sentencepiece tokenizer; its number of tokens."""
    import sentencepiece

    words = "the quick brown fox jumps over a lazy dog while entropy is measured"
    sentences = [" ".join(words.split()[i:] + words.split()[:i]) for i in range(13)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"})
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return int(processor.vocab_size())

"""A tiny random checkpoint of every model family, as the pinned converter takes it.

Names, shapes and config keys are those of published checkpoints (per-expert tensors
where those have them); the sizes are small. Rows of 256 exist in each family, so that
K-quants apply, beside rows of 32 and 96, where they do not.
"""

from __future__ import annotations

import json
import re
from ast import literal_eval
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain, product
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ewq_gguf.llamacpp.toolchain import find_toolchain
from tests.checkpoints import write_shards, write_tokenizer


@dataclass(frozen=True)
class Family:
    """What a checkpoint of a family holds.

    Attributes:
        architecture: of config.json.
        config: the rest of it, without what the tokenizer decides.
        tensors: lines of name, shape and dtype (BF16 unless named). `*` stands for
            every layer, `{0..3}` and `{q,k}` for alternatives, `V` for the tokens.
        tokenizer: sentencepiece (320 tokens) or byte-level BPE (32256).
        n_shards: number of files.
        notes: what is special about it.
        refused: the step at which the pinned tools refuse it, and their words.
    """

    architecture: str
    config: Mapping[str, object]
    tensors: str
    tokenizer: Literal["spm", "bpe"] = "bpe"
    n_shards: int = 1
    notes: str = ""
    refused: str = ""

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return 320 if self.tokenizer == "spm" else 32256

    @property
    def n_layers(self) -> int:
        """Number of layers, as the config tells it."""
        keys = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        (found,) = (self.config[key] for key in keys if key in self.config)
        assert isinstance(found, int)
        return found

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of each tensor."""
        return expanded(self.tensors, self.n_layers, self.vocab)


def expanded(
    tensors: str, n_layers: int, vocab: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor that lines of names and shapes stand for."""
    result: dict[str, tuple[str, tuple[int, ...]]] = {}
    for line in tensors.split("\n"):
        pattern, *rest = line.split()
        dtype = rest.pop() if rest and rest[-1] == "F32" else "BF16"
        shape = tuple(vocab if size == "V" else int(size) for size in rest)
        layers = f"{{0..{n_layers - 1}}}"
        for name in _expand(pattern.replace("*", layers)):
            assert name not in result, name
            result[name] = (dtype, shape)
    return result


def _expand(pattern: str) -> Iterator[str]:
    """The names a pattern stands for, as a shell expands braces."""
    parts = re.split(r"\{(.*?)\}", pattern)
    choices = [
        _choices(part) if index % 2 else [part] for index, part in enumerate(parts)
    ]
    return map("".join, product(*choices))


def _choices(text: str) -> list[str]:
    if ".." in text:
        first, last = map(int, text.split(".."))
        return [str(number) for number in range(first, last + 1)]
    return text.split(",")


def _lines(*blocks: str) -> str:
    return "\n".join(chain.from_iterable(block.split("\n") for block in blocks)).strip()


def write_family(folder: Path, label: str, *, seed: int = 0) -> Path:
    """Write the checkpoint of `FAMILIES[label]`: the same bytes for the same seed."""
    family = FAMILIES[label]
    folder.mkdir(parents=True, exist_ok=True)
    if family.tokenizer == "spm":
        vocab, (bos, eos) = write_tokenizer(folder), (1, 2)
    else:
        vocab, (bos, eos) = _write_bpe(folder)
    assert vocab == family.vocab
    config = {
        "architectures": [family.architecture],
        "vocab_size": vocab,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": "bfloat16",
    } | dict(family.config)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    rng = np.random.default_rng([seed, *label.encode()])
    tensors = {}
    for name, (dtype, shape) in family.shapes().items():
        layer = re.search(r"\.(\d+)\.", name)
        scale = 0.02 * (1 + (int(layer[1]) if layer else 0) % 5)
        values = rng.standard_normal(prod(shape), dtype=np.float32) * np.float32(scale)
        is_norm = len(shape) == 1 and name.endswith("weight")
        tensors[name] = (dtype, (values + np.float32(is_norm)).reshape(shape))
    write_shards(folder, tensors, family.n_shards)
    return folder


def _write_bpe(folder: Path) -> tuple[int, tuple[int, int]]:
    """Write the BPE tokenizer; its number of tokens, bos and eos."""
    for name, content in _bpe_files().items():
        (folder / name).write_text(content, encoding="utf-8")
    return _BPE_VOCAB, _BPE_SPECIAL


# ids as in deepseek-coder's tokenizer: the smallest vocabulary the converter knows.
_BPE_VOCAB, _BPE_SPECIAL = 32256, (32013, 32014)
# GLM's classes ask for these tokens.
_BPE_GLM = ("<|endoftext|>", "<|user|>", "<|observation|>", "[gMASK]")


@cache
def _bpe_files() -> dict[str, str]:
    """The files of deepseek-coder's tokenizer, as far as the converter looks at it.

    The converter knows a byte-level BPE by the ids of a test text, bos in front. Only
    the tokens and merges that text needs are kept, under their own ids.
    """
    from gguf import GGUFReader
    from tokenizers import Regex, Tokenizer, models
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
    from tokenizers.processors import TemplateProcessing

    source = find_toolchain().source_dir
    fields = GGUFReader(source / "models/ggml-vocab-deepseek-coder.gguf").fields
    names: list[str] = fields["tokenizer.ggml.tokens"].contents()
    merges: list[tuple[str, str]] = [
        (left, right)
        for left, _, right in (
            merge.partition(" ") for merge in fields["tokenizer.ggml.merges"].contents()
        )
    ]
    ids = {name: index for index, name in enumerate(names)}
    bos, eos = (names[index] for index in _BPE_SPECIAL)
    splits = [
        Split(Regex(pattern), "isolated")
        for pattern in (
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        )
    ]
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    splitter = Sequence([*splits, Digits(individual_digits=True), byte_level])

    def make(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Any:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer = splitter
        return tokenizer

    code = (source / "conversion/base.py").read_text(encoding="utf-8")
    match = re.search(r"^ +chktxt = ('.*')$", code, re.MULTILINE)
    assert match
    used = set(make(ids, merges).encode(literal_eval(match[1])).tokens)
    kept = [pair for pair in merges if any("".join(pair) in name for name in used)]
    needed = used | {part for pair in kept for part in (*pair, "".join(pair))}
    needed |= {bos, eos, *ByteLevel.alphabet()}
    vocab = {name: ids[name] for name in sorted(needed, key=ids.__getitem__)}
    vocab |= {name: _BPE_VOCAB - 4 + index for index, name in enumerate(_BPE_GLM)}
    small = make(vocab, kept)
    small.add_special_tokens([bos, eos, *_BPE_GLM])
    small.post_processor = TemplateProcessing(
        single=[bos, "$A"], special_tokens=[(bos, ids[bos])]
    )
    return {
        "tokenizer.json": small.to_str(),
        "tokenizer_config.json": json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": bos,
                "eos_token": eos,
            }
        ),
    }


_Config = dict[str, object]

# Parts that families share: 4 heads of 8, 2 key-value heads, a feed-forward of 256.
_EMBED = "model.embed_tokens.weight V 32"
_HEAD = "lm_head.weight V 32"
_NORM = "model.norm.weight 32"
_ATTENTION = """\
model.layers.*.self_attn.{q,o}_proj.weight 32 32
model.layers.*.self_attn.{k,v}_proj.weight 16 32"""
_QKV_BIAS = """\
model.layers.*.self_attn.q_proj.bias 32
model.layers.*.self_attn.{k,v}_proj.bias 16"""
_WIDE_ATTENTION = """\
model.layers.*.self_attn.q_proj.weight 64 32
model.layers.*.self_attn.{k,v}_proj.weight 32 32
model.layers.*.self_attn.o_proj.weight 32 64"""
_MLP = """\
model.layers.*.mlp.{gate,up}_proj.weight 256 32
model.layers.*.mlp.down_proj.weight 32 256"""
_UP_DOWN = """\
model.layers.*.mlp.up_proj.weight 256 32
model.layers.*.mlp.down_proj.weight 32 256"""
_GATE_UP = """\
model.layers.*.mlp.gate_up_proj.weight 512 32
model.layers.*.mlp.down_proj.weight 32 256"""
_INPUT_NORM = "model.layers.*.input_layernorm.weight 32"
_NORMS = "model.layers.*.{input,post_attention}_layernorm.weight 32"
_NORM_BIASES = """\
model.layers.*.{input,post_attention}_layernorm.bias 32
model.norm.bias 32"""
_POST_NORMS = "model.layers.*.post_{attention,feedforward}_layernorm.weight 32"
_LLAMA = _lines(_EMBED, _ATTENTION, _MLP, _NORMS, _NORM)
_EXPERTS = """\
model.layers.*.mlp.gate.weight 4 32
model.layers.*.mlp.experts.{0..3}.{gate,up}_proj.weight 256 32
model.layers.*.mlp.experts.{0..3}.down_proj.weight 32 256"""
_MIXTRAL_EXPERTS = """\
model.layers.*.block_sparse_moe.gate.weight 4 32
model.layers.*.block_sparse_moe.experts.{0..3}.w{1,3}.weight 256 32
model.layers.*.block_sparse_moe.experts.{0..3}.w2.weight 32 256"""
_FIRST_DENSE = """\
model.layers.0.mlp.{gate,up}_proj.weight 256 32
model.layers.0.mlp.down_proj.weight 32 256
model.layers.{1..2}.mlp.gate.weight 4 32
model.layers.{1..2}.mlp.experts.{0..3}.{gate,up}_proj.weight 96 32
model.layers.{1..2}.mlp.experts.{0..3}.down_proj.weight 32 96
model.layers.{1..2}.mlp.shared_experts.{gate,up}_proj.weight 192 32
model.layers.{1..2}.mlp.shared_experts.down_proj.weight 32 192"""
_CORRECTION = "model.layers.{1..2}.mlp.gate.e_score_correction_bias 4 F32"
_MLA = """\
model.layers.*.self_attn.kv_a_layernorm.weight 32
model.layers.*.self_attn.kv_a_proj_with_mqa.weight 40 32
model.layers.*.self_attn.kv_b_proj.weight 160 32
model.layers.*.self_attn.o_proj.weight 32 96"""
_MLA_Q = """\
model.layers.*.self_attn.q_a_layernorm.weight 64
model.layers.*.self_attn.q_a_proj.weight 64 32
model.layers.*.self_attn.q_b_proj.weight 96 64"""
_DELTA_NET = """\
model.layers.{0..2}.linear_attn.{A_log,dt_bias} 4
model.layers.{0..2}.linear_attn.conv1d.weight 128 1 4
model.layers.{0..2}.linear_attn.norm.weight 16
model.layers.{0..2}.linear_attn.out_proj.weight 32 64
model.layers.3.self_attn.q_proj.weight 128 32
model.layers.3.self_attn.{k,v}_proj.weight 32 32
model.layers.3.self_attn.o_proj.weight 32 64
model.layers.3.self_attn.{q,k}_norm.weight 16
mtp.fc.weight 32 64
mtp.{norm,pre_fc_norm_embedding,pre_fc_norm_hidden}.weight 32
mtp.layers.0.self_attn.q_proj.weight 128 32
mtp.layers.0.self_attn.{k,v}_proj.weight 32 32
mtp.layers.0.self_attn.o_proj.weight 32 64
mtp.layers.0.self_attn.{q,k}_norm.weight 16
mtp.layers.0.{input,post_attention}_layernorm.weight 32"""
_GRANITE_EXPERTS = """\
model.layers.*.block_sparse_moe.router.layer.weight 4 32
model.layers.*.block_sparse_moe.input_linear.weight 4 512 32
model.layers.*.block_sparse_moe.output_linear.weight 4 32 256"""
_GRANITE_SHARED = """\
model.layers.*.shared_mlp.input_linear.weight 192 32
model.layers.*.shared_mlp.output_linear.weight 32 96"""
_GEMMA = """\
model.embed_tokens.weight V 64
model.layers.*.mlp.{gate,up}_proj.weight 256 64
model.layers.*.mlp.down_proj.weight 64 256
model.layers.*.{input,post_attention}_layernorm.weight 64
model.norm.weight 64"""
_GEMMA_2 = """\
model.layers.*.self_attn.{q,o}_proj.weight 64 64
model.layers.*.self_attn.{k,v}_proj.weight 32 64
model.layers.*.{pre,post}_feedforward_layernorm.weight 64"""
_GPT_LAYERS = """\
{P}h.*.{ln_1,ln_2}.{weight,bias} 64
{P}h.*.attn.c_attn.bias {Q}
{P}h.*.attn.c_proj.weight 64 64
{P}h.*.attn.c_proj.bias 64
{P}h.*.mlp.c_fc.bias 256
{P}h.*.mlp.c_proj.bias 64
{P}ln_f.{weight,bias} 64
{P}wte.weight V 64
{P}wpe.weight 64 64"""
_MAMBA = """\
backbone.embeddings.weight V 32
backbone.layers.*.norm.weight 32
backbone.layers.*.mixer.A_log 64 16
backbone.layers.*.mixer.D 64
backbone.layers.*.mixer.conv1d.weight 64 1 4
backbone.layers.*.mixer.conv1d.bias 64
backbone.layers.*.mixer.in_proj.weight 128 32
backbone.layers.*.mixer.x_proj.weight 34 64
backbone.layers.*.mixer.dt_proj.weight 64 2
backbone.layers.*.mixer.dt_proj.bias 64
backbone.layers.*.mixer.out_proj.weight 32 64
backbone.norm_f.weight 32"""


def _gpt_layers(prefix: str, fused: int) -> str:
    return _GPT_LAYERS.replace("{P}", prefix).replace("{Q}", str(fused))


def _config(model_type: str, **changes: object) -> _Config:
    """A config with the keys most families have; None removes one."""
    config: _Config = {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    return {k: v for k, v in (config | changes).items() if v is not None}


_TIED: _Config = {"tie_word_embeddings": True}
_LAYER_NORM: _Config = {"rms_norm_eps": None, "layer_norm_eps": 1e-5}
_GEMMA_CONFIG: _Config = {
    "hidden_size": 64,
    "head_dim": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
_TOP_2_OF_4: _Config = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL_TOP_2_OF_4: _Config = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_EXPERTS: _Config = _TOP_2_OF_4 | {
    "moe_intermediate_size": 256,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
_FIRST_DENSE_CONFIG: _Config = {
    "num_hidden_layers": 3,
    "moe_intermediate_size": 96,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
}
_MLA_CONFIG: _Config = _FIRST_DENSE_CONFIG | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
}
_NO_AUX: _Config = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
}
_DELTA_NET_CONFIG: _Config = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
}
_GRANITE_CONFIG: _Config = {
    "attention_multiplier": 0.125,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "tie_word_embeddings": True,
}
_GPT_CONFIG: _Config = {
    # The converter takes an inner size of four times the embedding's for granted.
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "n_ctx": 64,
    "n_inner": 256,
    "layer_norm_epsilon": 1e-5,
}
_MAMBA_CONFIG: _Config = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "state_size": 16,
    "conv_kernel": 4,
    "expand": 2,
    "time_step_rank": 2,
    "num_hidden_layers": 2,
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": True,
}
_YARN: _Config = {
    "type": "yarn",
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 128,
}

FAMILIES: dict[str, Family] = {
    "Llama 2": Family(
        "LlamaForCausalLM",
        _config("llama"),
        _lines(_LLAMA, _HEAD, "model.layers.*.self_attn.rotary_emb.inv_freq 4 F32"),
        tokenizer="spm",
        notes="rotary_emb.inv_freq is dropped",
    ),
    "Llama 3": Family(
        "LlamaForCausalLM",
        _config(
            "llama",
            **_TIED,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        ),
        _LLAMA,
        notes="rope_freqs.weight is generated",
    ),
    "Mistral": Family(
        "MistralForCausalLM",
        _config("mistral", head_dim=8),
        _lines(_LLAMA, _HEAD),
        tokenizer="spm",
        n_shards=3,
    ),
    "Mixtral": Family(
        "MixtralForCausalLM",
        _config("mixtral", **_LOCAL_TOP_2_OF_4),
        _lines(_EMBED, _HEAD, _ATTENTION, _MIXTRAL_EXPERTS, _NORMS, _NORM),
        tokenizer="spm",
        n_shards=2,
        notes="experts are stacked",
    ),
    "Qwen2": Family(
        "Qwen2ForCausalLM",
        _config("qwen2", **_TIED, use_sliding_window=False),
        _lines(_LLAMA, _QKV_BIAS),
    ),
    "Qwen2-MoE": Family(
        "Qwen2MoeForCausalLM",
        _config(
            "qwen2_moe",
            **_QWEN_EXPERTS,
            shared_expert_intermediate_size=96,
            use_sliding_window=False,
        ),
        _lines(
            *(_EMBED, _HEAD, _ATTENTION, _QKV_BIAS, _EXPERTS, _NORMS, _NORM),
            """\
model.layers.*.mlp.shared_expert.{gate,up}_proj.weight 96 32
model.layers.*.mlp.shared_expert.down_proj.weight 32 96
model.layers.*.mlp.shared_expert_gate.weight 1 32""",
        ),
        notes="experts are stacked; the shared expert's gate becomes a vector",
    ),
    "Qwen3": Family(
        "Qwen3ForCausalLM",
        _config("qwen3", **_TIED, head_dim=16),
        _lines(
            *(_EMBED, _WIDE_ATTENTION, _MLP, _NORMS, _NORM),
            "model.layers.*.self_attn.{q,k}_norm.weight 16",
        ),
    ),
    "Qwen3-MoE": Family(
        "Qwen3MoeForCausalLM",
        _config("qwen3_moe", **_QWEN_EXPERTS, head_dim=16),
        _lines(
            *(_EMBED, _HEAD, _WIDE_ATTENTION, _EXPERTS, _NORMS, _NORM),
            "model.layers.*.self_attn.{q,k}_norm.weight 16",
        ),
        notes="experts are stacked",
    ),
    "Qwen3-Next": Family(
        "Qwen3NextForCausalLM",
        _config(
            "qwen3_next",
            **_DELTA_NET_CONFIG,
            **_QWEN_EXPERTS,
            shared_expert_intermediate_size=96,
        ),
        _lines(
            *(_EMBED, _HEAD, _DELTA_NET, _EXPERTS, _NORMS, _NORM),
            """\
model.layers.{0..2}.linear_attn.in_proj_ba.weight 8 32
model.layers.{0..2}.linear_attn.in_proj_qkvz.weight 192 32
model.layers.*.mlp.shared_expert.{gate,up}_proj.weight 96 32
mtp.layers.0.mlp.shared_expert.{gate,up}_proj.weight 96 32
model.layers.*.mlp.shared_expert.down_proj.weight 32 96
mtp.layers.0.mlp.shared_expert.down_proj.weight 32 96
model.layers.*.mlp.shared_expert_gate.weight 1 32
mtp.layers.0.mlp.shared_expert_gate.weight 1 32
mtp.layers.0.mlp.gate.weight 4 32
mtp.layers.0.mlp.experts.{0..3}.{gate,up}_proj.weight 256 32
mtp.layers.0.mlp.experts.{0..3}.down_proj.weight 32 256""",
        ),
        notes="in_proj_qkvz feeds two tensors, split within each key head",
    ),
    "Qwen3.5": Family(
        "Qwen3_5ForCausalLM",
        _config("qwen3_5_text", **_DELTA_NET_CONFIG, mtp_num_hidden_layers=1),
        _lines(
            *(_EMBED, _HEAD, _DELTA_NET, _MLP, _NORMS, _NORM),
            """\
model.layers.{0..2}.linear_attn.in_proj_qkv.weight 128 32
model.layers.{0..2}.linear_attn.in_proj_z.weight 64 32
model.layers.{0..2}.linear_attn.in_proj_{a,b}.weight 4 32
mtp.layers.0.mlp.{gate,up}_proj.weight 256 32
mtp.layers.0.mlp.down_proj.weight 32 256""",
        ),
        notes="heads change places in linear attention",
    ),
    "Gemma": Family(
        "GemmaForCausalLM",
        _config("gemma", **_GEMMA_CONFIG | {"num_key_value_heads": 1}),
        _lines(
            _GEMMA,
            """\
model.layers.*.self_attn.{q,o}_proj.weight 64 64
model.layers.*.self_attn.{k,v}_proj.weight 16 64""",
        ),
        tokenizer="spm",
        notes="1 is added to the norms",
    ),
    "Gemma 2": Family(
        "Gemma2ForCausalLM",
        _config(
            "gemma2",
            **_GEMMA_CONFIG,
            sliding_window=128,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        ),
        _lines(_GEMMA, _GEMMA_2),
        tokenizer="spm",
    ),
    "Gemma 3": Family(
        "Gemma3ForCausalLM",
        _config(
            "gemma3_text",
            **_GEMMA_CONFIG,
            sliding_window=128,
            sliding_window_pattern=2,
            query_pre_attn_scalar=16,
            rope_local_base_freq=10000.0,
        ),
        _lines(_GEMMA, _GEMMA_2, "model.layers.*.self_attn.{q,k}_norm.weight 16"),
        tokenizer="spm",
    ),
    "Phi-3": Family(
        "Phi3ForCausalLM",
        _config(
            "phi3",
            original_max_position_embeddings=512,
            sliding_window=512,
            pad_token_id=0,
        ),
        _lines(
            *(_EMBED, _HEAD, _GATE_UP, _NORMS, _NORM),
            """\
model.layers.*.self_attn.qkv_proj.weight 64 32
model.layers.*.self_attn.o_proj.weight 32 32""",
        ),
        tokenizer="spm",
        notes="fused qkv and gate_up stay fused",
    ),
    "Phi-3.5": Family(
        "Phi3ForCausalLM",
        _config(
            "phi3",
            original_max_position_embeddings=256,
            sliding_window=512,
            rope_scaling={
                "type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [1.5] * 4,
            },
            pad_token_id=0,
        ),
        _lines(
            *(_EMBED, _HEAD, _GATE_UP, _NORMS, _NORM),
            """\
model.layers.*.self_attn.qkv_proj.weight 64 32
model.layers.*.self_attn.o_proj.weight 32 32""",
        ),
        tokenizer="spm",
        notes="rope_factors_{long,short} are generated",
    ),
    "Phi-3.5-MoE": Family(
        "PhiMoEForCausalLM",
        _config(
            "phimoe",
            **_LOCAL_TOP_2_OF_4,
            attention_bias=True,
            lm_head_bias=True,
            sliding_window=512,
            original_max_position_embeddings=512,
        ),
        _lines(
            *(_EMBED, _HEAD, _ATTENTION, _QKV_BIAS, _MIXTRAL_EXPERTS),
            *(_NORMS, _NORM, _NORM_BIASES),
            """\
model.layers.*.self_attn.o_proj.bias 32
lm_head.bias V""",
        ),
        tokenizer="spm",
    ),
    "StableLM 2": Family(
        "StableLmForCausalLM",
        _config(
            "stablelm",
            **_LAYER_NORM,
            num_key_value_heads=4,
            partial_rotary_factor=0.25,
            use_qkv_bias=True,
            use_parallel_residual=False,
        ),
        _lines(
            *(_EMBED, _HEAD, _MLP, _NORMS, _NORM, _NORM_BIASES),
            """\
model.layers.*.self_attn.{q,k,v,o}_proj.weight 32 32
model.layers.*.self_attn.{q,k,v}_proj.bias 32""",
        ),
    ),
    "StableLM 2 12B": Family(
        "StableLmForCausalLM",
        _config(
            "stablelm",
            **_LAYER_NORM,
            partial_rotary_factor=0.25,
            qk_layernorm=True,
            use_parallel_residual=True,
        ),
        _lines(
            *(_EMBED, _HEAD, _ATTENTION, _MLP, _INPUT_NORM, _NORM),
            """\
model.layers.*.self_attn.q_layernorm.norms.{0..3}.weight 8
model.layers.*.self_attn.k_layernorm.norms.{0..1}.weight 8
model.layers.*.input_layernorm.bias 32
model.norm.bias 32""",
        ),
        notes="the norms of the heads are to be stacked",
        refused="convert: Unprocessed norms",
    ),
    "DeepSeek": Family(
        "DeepseekForCausalLM",
        _config("deepseek", **_FIRST_DENSE_CONFIG),
        _lines(_EMBED, _HEAD, _ATTENTION, _FIRST_DENSE, _NORMS, _NORM),
        notes="experts are stacked",
    ),
    "DeepSeek V2": Family(
        "DeepseekV2ForCausalLM",
        _config("deepseek_v2", **_MLA_CONFIG, rope_scaling=_YARN),
        _lines(_EMBED, _HEAD, _MLA, _MLA_Q, _FIRST_DENSE, _NORMS, _NORM),
        notes="kv_b_proj is split within each head",
    ),
    "DeepSeek V2 Lite": Family(
        "DeepseekV2ForCausalLM",
        _config("deepseek_v2", **_MLA_CONFIG | {"num_hidden_layers": 27})
        | {"q_lora_rank": None},
        _lines(
            *(_EMBED, _HEAD, _MLA, _FIRST_DENSE.replace("{1..2}", "{1..26}")),
            *(_NORMS, _NORM),
            "model.layers.*.self_attn.q_proj.weight 96 32",
        ),
        notes="llama-quantize knows it by its 27 layers",
    ),
    "DeepSeek V3": Family(
        "DeepseekV3ForCausalLM",
        _config(
            "deepseek_v3",
            **_MLA_CONFIG | _NO_AUX | {"n_group": 2},
            num_nextn_predict_layers=1,
        ),
        _lines(
            *(_EMBED, _HEAD, _MLA, _MLA_Q, _FIRST_DENSE, _CORRECTION, _NORMS, _NORM),
            """\
model.layers.3.{enorm,hnorm,shared_head.norm}.weight 32
model.layers.3.eh_proj.weight 32 64""",
        ),
        notes="kv_b_proj is split within each head; layer 3 (prediction) is dropped",
    ),
    "OLMo": Family(
        "OlmoForCausalLM",
        _config("olmo", rms_norm_eps=None),
        _lines(_EMBED, _HEAD, _ATTENTION, _MLP),
        notes="no norm has weights",
    ),
    "OLMo 2": Family(
        "Olmo2ForCausalLM",
        _config("olmo2"),
        _lines(
            *(_EMBED, _HEAD, _ATTENTION, _MLP, _POST_NORMS, _NORM),
            """\
model.layers.*.self_attn.q_norm.weight 32
model.layers.*.self_attn.k_norm.weight 16""",
        ),
    ),
    "OLMo 3": Family(
        "Olmo3ForCausalLM",
        _config(
            "olmo3",
            sliding_window=128,
            layer_types=["sliding_attention", "full_attention"],
        ),
        _lines(
            *(_EMBED, _HEAD, _ATTENTION, _MLP, _POST_NORMS, _NORM),
            """\
model.layers.*.self_attn.q_norm.weight 32
model.layers.*.self_attn.k_norm.weight 16""",
        ),
    ),
    "OLMoE": Family(
        "OlmoeForCausalLM",
        _config("olmoe", **_TOP_2_OF_4),
        _lines(
            *(_EMBED, _HEAD, _ATTENTION, _EXPERTS, _NORMS, _NORM),
            """\
model.layers.*.self_attn.q_norm.weight 32
model.layers.*.self_attn.k_norm.weight 16""",
        ),
        notes="experts are stacked",
    ),
    "Granite": Family(
        "GraniteForCausalLM", _config("granite", **_GRANITE_CONFIG), _LLAMA
    ),
    "Granite MoE": Family(
        "GraniteMoeForCausalLM",
        _config("granitemoe", **_GRANITE_CONFIG, **_LOCAL_TOP_2_OF_4),
        _lines(_EMBED, _ATTENTION, _GRANITE_EXPERTS, _NORMS, _NORM),
        notes="input_linear is split into gate and up",
    ),
    "Granite MoE shared": Family(
        "GraniteMoeSharedForCausalLM",
        _config(
            "granitemoeshared",
            **_GRANITE_CONFIG,
            **_LOCAL_TOP_2_OF_4,
            shared_intermediate_size=96,
        ),
        _lines(_EMBED, _ATTENTION, _GRANITE_EXPERTS, _GRANITE_SHARED, _NORMS, _NORM),
        notes="input_linear is split into gate and up",
    ),
    "Granite 4": Family(
        "GraniteMoeHybridForCausalLM",
        _config(
            "granitemoehybrid",
            **_GRANITE_CONFIG,
            **_LOCAL_TOP_2_OF_4,
            shared_intermediate_size=96,
            layer_types=["mamba", "attention"],
            mamba_n_heads=4,
            mamba_n_groups=1,
            mamba_d_state=16,
            mamba_d_head=16,
            mamba_d_conv=4,
            mamba_expand=2,
            mamba_chunk_size=64,
            mamba_conv_bias=True,
            mamba_proj_bias=False,
            position_embedding_type="nope",
        ),
        _lines(
            *(_EMBED, _GRANITE_EXPERTS, _GRANITE_SHARED, _NORMS, _NORM),
            """\
model.layers.0.mamba.{A_log,D,dt_bias} 4
model.layers.0.mamba.conv1d.weight 96 1 4
model.layers.0.mamba.conv1d.bias 96
model.layers.0.mamba.in_proj.weight 164 32
model.layers.0.mamba.norm.weight 64
model.layers.0.mamba.out_proj.weight 32 64
model.layers.1.self_attn.{q,o}_proj.weight 32 32
model.layers.1.self_attn.{k,v}_proj.weight 16 32""",
        ),
        notes="state-space and attention layers",
    ),
    "GPT-2": Family(
        "GPT2LMHeadModel",
        _Config(model_type="gpt2") | _GPT_CONFIG,
        _lines(
            _gpt_layers("", 192),
            """\
h.*.attn.c_attn.weight 64 192
h.*.mlp.c_fc.weight 64 256
h.*.mlp.c_proj.weight 256 64""",
        ),
        notes="matrices are transposed",
    ),
    "GPT-2 with masks": Family(
        "GPT2LMHeadModel",
        _Config(model_type="gpt2") | _GPT_CONFIG,
        _lines(
            _gpt_layers("", 192),
            """\
h.*.attn.bias 1 1 64 64
h.*.attn.c_attn.weight 64 192
h.*.mlp.c_fc.weight 64 256
h.*.mlp.c_proj.weight 256 64""",
        ),
        notes="as OpenAI's own files; the masks are left out",
    ),
    "GPTBigCode": Family(
        "GPTBigCodeForCausalLM",
        _Config(model_type="gpt_bigcode", multi_query=True) | _GPT_CONFIG,
        _lines(
            _gpt_layers("transformer.", 96),
            """\
transformer.h.*.attn.c_attn.weight 96 64
transformer.h.*.mlp.c_fc.weight 256 64
transformer.h.*.mlp.c_proj.weight 64 256""",
        ),
        notes="StarCoder, SantaCoder",
    ),
    "Falcon": Family(
        "FalconForCausalLM",
        {
            "model_type": "falcon",
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_kv_heads": 1,
            "multi_query": True,
            "parallel_attn": True,
            "new_decoder_architecture": False,
            "alibi": False,
            "bias": False,
            "layer_norm_epsilon": 1e-5,
        },
        """\
transformer.word_embeddings.weight V 64
transformer.h.*.self_attention.query_key_value.weight 96 64
transformer.h.*.self_attention.dense.weight 64 64
transformer.h.*.mlp.dense_h_to_4h.weight 256 64
transformer.h.*.mlp.dense_4h_to_h.weight 64 256
transformer.h.*.input_layernorm.{weight,bias} 64
transformer.ln_f.{weight,bias} 64""",
        notes="7B, with num_kv_heads as it is meant",
    ),
    "Falcon 40B": Family(
        "FalconForCausalLM",
        {
            "model_type": "falcon",
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "num_hidden_layers": 2,
            "new_decoder_architecture": True,
            "alibi": False,
            "bias": False,
            "layer_norm_epsilon": 1e-5,
        },
        """\
transformer.word_embeddings.weight V 64
transformer.h.*.self_attention.query_key_value.weight 128 64
transformer.h.*.self_attention.dense.weight 64 64
transformer.h.*.mlp.dense_h_to_4h.weight 256 64
transformer.h.*.mlp.dense_4h_to_h.weight 64 256
transformer.h.*.{ln_attn,ln_mlp}.{weight,bias} 64
transformer.ln_f.{weight,bias} 64""",
        notes="rows of the fused qkv change places",
    ),
    "Falcon Mamba": Family(
        "FalconMambaForCausalLM",
        _Config(model_type="falcon_mamba") | _MAMBA_CONFIG,
        _MAMBA,
    ),
    "GPT-NeoX": Family(
        "GPTNeoXForCausalLM",
        {
            "model_type": "gpt_neox",
            "hidden_size": 32,
            "intermediate_size": 256,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "max_position_embeddings": 512,
            "hidden_act": "gelu",
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
        },
        """\
gpt_neox.embed_in.weight V 32
gpt_neox.layers.*.attention.query_key_value.weight 96 32
gpt_neox.layers.*.attention.query_key_value.bias 96
gpt_neox.layers.*.attention.dense.weight 32 32
gpt_neox.layers.*.attention.dense.bias 32
gpt_neox.layers.*.attention.bias 1 1 64 64
gpt_neox.layers.*.attention.rotary_emb.inv_freq 1
gpt_neox.layers.*.mlp.dense_h_to_4h.weight 256 32
gpt_neox.layers.*.mlp.dense_h_to_4h.bias 256
gpt_neox.layers.*.mlp.dense_4h_to_h.weight 32 256
gpt_neox.layers.*.mlp.dense_4h_to_h.bias 32
gpt_neox.layers.*.{input,post_attention}_layernorm.{weight,bias} 32
gpt_neox.final_layer_norm.{weight,bias} 32
embed_out.weight V 32""",
        notes="Pythia; attention.bias and inv_freq are dropped",
        refused="convert: KeyError: 'rotary_pct'",
    ),
    "Phi-2": Family(
        "PhiForCausalLM",
        _config("phi", **_LAYER_NORM, num_key_value_heads=4, partial_rotary_factor=0.5),
        _lines(
            *(_EMBED, _HEAD, _INPUT_NORM),
            """\
model.layers.*.self_attn.{q_proj,k_proj,v_proj,dense}.weight 32 32
model.layers.*.self_attn.{q_proj,k_proj,v_proj,dense}.bias 32
model.layers.*.mlp.fc1.weight 256 32
model.layers.*.mlp.fc1.bias 256
model.layers.*.mlp.fc2.weight 32 256
model.layers.*.mlp.fc2.bias 32
model.layers.*.input_layernorm.bias 32
model.final_layernorm.{weight,bias} 32
lm_head.bias V""",
        ),
    ),
    "StarCoder2": Family(
        "Starcoder2ForCausalLM",
        _config(
            "starcoder2", **_TIED, use_bias=True, norm_epsilon=1e-5, rms_norm_eps=None
        ),
        _lines(
            *(_EMBED, _ATTENTION, _QKV_BIAS, _NORMS, _NORM, _NORM_BIASES),
            """\
model.layers.*.self_attn.o_proj.bias 32
model.layers.*.mlp.c_fc.weight 256 32
model.layers.*.mlp.c_fc.bias 256
model.layers.*.mlp.c_proj.weight 32 256
model.layers.*.mlp.c_proj.bias 32""",
        ),
    ),
    "Command R": Family(
        "CohereForCausalLM",
        _config("cohere", **_TIED, **_LAYER_NORM, logit_scale=0.0625),
        _lines(_EMBED, _ATTENTION, _MLP, _INPUT_NORM, _NORM),
    ),
    "Command R7B": Family(
        "Cohere2ForCausalLM",
        _config(
            "cohere2",
            **_TIED,
            **_LAYER_NORM,
            head_dim=8,
            logit_scale=0.25,
            rotary_pct=1.0,
            sliding_window=128,
            sliding_window_pattern=2,
        ),
        _lines(_EMBED, _ATTENTION, _MLP, _INPUT_NORM, _NORM),
    ),
    "GLM-4": Family(
        "GlmForCausalLM",
        _config(
            "glm",
            head_dim=8,
            partial_rotary_factor=0.5,
            attention_bias=True,
            pad_token_id=32014,
        ),
        _lines(_EMBED, _HEAD, _ATTENTION, _QKV_BIAS, _GATE_UP, _NORMS, _NORM),
        notes="GLM-4-9B-hf and GLM-Edge",
    ),
    "GLM-4-0414": Family(
        "Glm4ForCausalLM",
        _config(
            "glm4",
            head_dim=8,
            partial_rotary_factor=0.5,
            attention_bias=False,
            pad_token_id=32014,
        ),
        _lines(
            *(_EMBED, _HEAD, _ATTENTION, _GATE_UP, _NORMS, _NORM),
            "model.layers.*.post_{self_attn,mlp}_layernorm.weight 32",
        ),
    ),
    "GLM-4.5": Family(
        "Glm4MoeForCausalLM",
        _config(
            "glm4_moe",
            **_FIRST_DENSE_CONFIG | {"num_hidden_layers": 2, "norm_topk_prob": True},
            head_dim=8,
            partial_rotary_factor=0.5,
            attention_bias=True,
            use_qk_norm=True,
            num_nextn_predict_layers=1,
            pad_token_id=32014,
        ),
        _lines(
            *(_EMBED, _HEAD, _FIRST_DENSE, _CORRECTION, _NORM),
            """\
model.layers.{0..2}.{input,post_attention}_layernorm.weight 32
model.layers.{0..2}.self_attn.{q,o}_proj.weight 32 32
model.layers.{0..2}.self_attn.{k,v}_proj.weight 16 32
model.layers.{0..2}.self_attn.q_proj.bias 32
model.layers.{0..2}.self_attn.{k,v}_proj.bias 16
model.layers.{0..2}.self_attn.{q,k}_norm.weight 8
model.layers.2.{enorm,hnorm,shared_head.norm}.weight 32
model.layers.2.eh_proj.weight 32 64
model.layers.2.{embed_tokens,shared_head.head}.weight V 32""",
        ),
        notes="layer 2 (prediction) is kept",
    ),
    "EXAONE 3": Family(
        "ExaoneForCausalLM",
        _config(
            "exaone",
            **_TIED,
            num_hidden_layers=None,
            num_layers=2,
            activation_function="silu",
            layer_norm_epsilon=1e-5,
            rms_norm_eps=None,
        ),
        """\
transformer.wte.weight V 32
transformer.h.*.attn.attention.{q_proj,out_proj}.weight 32 32
transformer.h.*.attn.attention.{k,v}_proj.weight 16 32
transformer.h.*.mlp.c_fc_{0,1}.weight 256 32
transformer.h.*.mlp.c_proj.weight 32 256
transformer.h.*.{ln_1,ln_2}.weight 32
transformer.ln_f.weight 32""",
        refused="quantize: key not found in model: exaone.attention.layer_norm_rms",
    ),
    "EXAONE 4": Family(
        "Exaone4ForCausalLM",
        _config(
            "exaone4",
            **_TIED,
            head_dim=8,
            sliding_window=128,
            sliding_window_pattern="LG",
            layer_types=["sliding_attention", "full_attention"],
        ),
        _lines(
            *(_EMBED, _ATTENTION, _MLP, _POST_NORMS, _NORM),
            "model.layers.*.self_attn.{q,k}_norm.weight 8",
        ),
    ),
    "Nemotron": Family(
        "NemotronForCausalLM",
        _config(
            "nemotron",
            norm_eps=1e-5,
            partial_rotary_factor=0.5,
            hidden_act="relu2",
            rms_norm_eps=None,
        ),
        _lines(_EMBED, _HEAD, _ATTENTION, _UP_DOWN, _NORMS, _NORM, _NORM_BIASES),
        tokenizer="spm",
        notes="1 is added to the norms",
    ),
    "BLOOM": Family(
        "BloomForCausalLM",
        {
            "model_type": "bloom",
            "hidden_size": 64,
            "n_embed": 64,
            "n_head": 4,
            "num_attention_heads": 4,
            "n_layer": 2,
            "layer_norm_epsilon": 1e-5,
        },
        """\
word_embeddings.weight V 64
word_embeddings_layernorm.{weight,bias} 64
h.*.self_attention.query_key_value.weight 192 64
h.*.self_attention.query_key_value.bias 192
h.*.self_attention.dense.weight 64 64
h.*.self_attention.dense.bias 64
h.*.mlp.dense_h_to_4h.weight 256 64
h.*.mlp.dense_h_to_4h.bias 256
h.*.mlp.dense_4h_to_h.weight 64 256
h.*.mlp.dense_4h_to_h.bias 64
h.*.{input,post_attention}_layernorm.{weight,bias} 64
ln_f.{weight,bias} 64""",
        notes="rows of the fused qkv change places",
    ),
    "MPT": Family(
        "MPTForCausalLM",
        {
            "model_type": "mpt",
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "expansion_ratio": 4,
            "max_seq_len": 512,
            "no_bias": True,
            "attn_config": {"alibi": True, "alibi_bias_max": 8, "clip_qkv": None},
        },
        """\
transformer.wte.weight V 64
transformer.blocks.*.norm_{1,2}.weight 64
transformer.blocks.*.attn.Wqkv.weight 192 64
transformer.blocks.*.attn.out_proj.weight 64 64
transformer.blocks.*.ffn.up_proj.weight 256 64
transformer.blocks.*.ffn.down_proj.weight 64 256
transformer.norm_f.weight 64""",
    ),
    "SmolLM3": Family(
        "SmolLM3ForCausalLM",
        _config(
            "smollm3",
            **_TIED,
            no_rope_layers=[1, 0],
            no_rope_layer_interval=2,
            pad_token_id=32014,
        ),
        _LLAMA,
    ),
    "ERNIE 4.5": Family(
        "Ernie4_5ForCausalLM",
        _config("ernie4_5", **_TIED, head_dim=8, use_bias=False),
        _LLAMA,
        tokenizer="spm",
    ),
    "ERNIE 4.5 MoE": Family(
        "Ernie4_5_MoeForCausalLM",
        _config(
            "ernie4_5_moe",
            **_TIED,
            num_hidden_layers=3,
            moe_num_experts=4,
            moe_k=2,
            moe_intermediate_size=96,
            moe_num_shared_experts=2,
            moe_layer_start_index=1,
            moe_layer_end_index=2,
            moe_layer_interval=1,
            use_bias=False,
        ),
        _lines(
            *(_EMBED, _ATTENTION, _FIRST_DENSE, _NORMS, _NORM),
            "model.layers.{1..2}.mlp.moe_statics.e_score_correction_bias 1 4 F32",
        ),
        tokenizer="spm",
        notes="experts are stacked",
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        _config(
            "gpt_oss",
            **_LOCAL_TOP_2_OF_4,
            head_dim=8,
            sliding_window=128,
            layer_types=["sliding_attention", "full_attention"],
            rope_scaling={
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 128,
                "truncate": False,
            },
        ),
        _lines(
            *(_EMBED, _HEAD, _ATTENTION, _QKV_BIAS, _NORMS, _NORM),
            """\
model.layers.*.self_attn.sinks 4
model.layers.*.self_attn.o_proj.bias 32
model.layers.*.mlp.router.weight 4 32
model.layers.*.mlp.router.bias 4
model.layers.*.mlp.experts.gate_up_proj 4 32 512
model.layers.*.mlp.experts.gate_up_proj_bias 4 512
model.layers.*.mlp.experts.down_proj 4 256 32
model.layers.*.mlp.experts.down_proj_bias 4 32""",
        ),
        notes="BF16 version; gate and up take turns in gate_up_proj",
    ),
    "Llama 4": Family(
        "Llama4ForCausalLM",
        _config(
            "llama4_text",
            head_dim=8,
            intermediate_size_mlp=256,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            moe_layers=[1],
            no_rope_layers=[1, 0],
            attention_chunk_size=128,
            use_qk_norm=True,
        ),
        _lines(
            *(_EMBED, _HEAD, _ATTENTION, _NORMS, _NORM),
            """\
model.layers.0.feed_forward.{gate,up}_proj.weight 256 32
model.layers.0.feed_forward.down_proj.weight 32 256
model.layers.1.feed_forward.router.weight 4 32
model.layers.1.feed_forward.experts.gate_up_proj 4 32 512
model.layers.1.feed_forward.experts.down_proj 4 256 32
model.layers.1.feed_forward.shared_expert.{gate,up}_proj.weight 256 32
model.layers.1.feed_forward.shared_expert.down_proj.weight 32 256""",
        ),
        notes="gate_up_proj is split by columns and transposed",
    ),
    "Mamba": Family(
        "MambaForCausalLM", _Config(model_type="mamba") | _MAMBA_CONFIG, _MAMBA
    ),
    "Mamba 2": Family(
        "Mamba2ForCausalLM",
        {
            "model_type": "mamba2",
            "hidden_size": 32,
            "num_heads": 4,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 1,
            "conv_kernel": 4,
            "expand": 2,
            "num_hidden_layers": 2,
            "layer_norm_epsilon": 1e-5,
            "use_bias": False,
            "use_conv_bias": True,
            "tie_word_embeddings": True,
        },
        """\
backbone.embeddings.weight V 32
backbone.layers.*.norm.weight 32
backbone.layers.*.mixer.{A_log,D,dt_bias} 4
backbone.layers.*.mixer.conv1d.weight 96 1 4
backbone.layers.*.mixer.conv1d.bias 96
backbone.layers.*.mixer.in_proj.weight 164 32
backbone.layers.*.mixer.norm.weight 64
backbone.layers.*.mixer.out_proj.weight 32 64
backbone.norm_f.weight 32""",
    ),
    "Jamba": Family(
        "JambaForCausalLM",
        _config(
            "jamba",
            **_TOP_2_OF_4,
            attn_layer_offset=1,
            attn_layer_period=2,
            expert_layer_offset=1,
            expert_layer_period=2,
            mamba_d_conv=4,
            mamba_d_state=16,
            mamba_dt_rank=2,
            mamba_expand=2,
            use_mamba_kernels=False,
            pad_token_id=0,
        ),
        _lines(
            *(_EMBED, _HEAD, _INPUT_NORM),
            """\
model.final_layernorm.weight 32
model.layers.*.pre_ff_layernorm.weight 32
model.layers.0.feed_forward.{gate,up}_proj.weight 256 32
model.layers.0.feed_forward.down_proj.weight 32 256
model.layers.0.mamba.A_log 64 16
model.layers.0.mamba.D 64
model.layers.0.mamba.{b,c}_layernorm.weight 16
model.layers.0.mamba.conv1d.weight 64 1 4
model.layers.0.mamba.conv1d.bias 64
model.layers.0.mamba.dt_layernorm.weight 2
model.layers.0.mamba.dt_proj.weight 64 2
model.layers.0.mamba.dt_proj.bias 64
model.layers.0.mamba.in_proj.weight 128 32
model.layers.0.mamba.out_proj.weight 32 64
model.layers.0.mamba.x_proj.weight 34 64
model.layers.1.feed_forward.router.weight 4 32
model.layers.1.feed_forward.experts.{0..3}.{gate,up}_proj.weight 256 32
model.layers.1.feed_forward.experts.{0..3}.down_proj.weight 32 256
model.layers.1.self_attn.{q,o}_proj.weight 32 32
model.layers.1.self_attn.{k,v}_proj.weight 16 32""",
        ),
        tokenizer="spm",
    ),
    "LFM2": Family(
        "Lfm2ForCausalLM",
        _config(
            "lfm2",
            **_TIED,
            block_auto_adjust_ff_dim=False,
            block_dim=32,
            block_ff_dim=256,
            conv_L_cache=3,
            conv_bias=False,
            layer_types=["conv", "full_attention"],
            norm_eps=1e-5,
        ),
        _lines(
            _EMBED,
            """\
model.layers.0.conv.conv.weight 32 1 3
model.layers.0.conv.in_proj.weight 96 32
model.layers.0.conv.out_proj.weight 32 32
model.layers.1.self_attn.{q_proj,out_proj}.weight 32 32
model.layers.1.self_attn.{k,v}_proj.weight 16 32
model.layers.1.self_attn.{q,k}_layernorm.weight 8
model.layers.*.feed_forward.w{1,3}.weight 256 32
model.layers.*.feed_forward.w2.weight 32 256
model.layers.*.{operator,ffn}_norm.weight 32
model.embedding_norm.weight 32""",
        ),
    ),
    "Seed-OSS": Family(
        "SeedOssForCausalLM",
        _config("seed_oss", head_dim=8, attention_bias=True),
        _lines(_LLAMA, _HEAD, _QKV_BIAS),
    ),
    "Arcee": Family(
        "ArceeForCausalLM",
        _config("arcee", hidden_act="relu2"),
        _lines(_EMBED, _HEAD, _ATTENTION, _UP_DOWN, _NORMS, _NORM),
    ),
    "Apertus": Family(
        "ApertusForCausalLM",
        _config("apertus", hidden_act="xielu"),
        _lines(
            *(_EMBED, _HEAD, _ATTENTION, _UP_DOWN, _NORM),
            """\
model.layers.*.self_attn.{q,k}_norm.weight 8
model.layers.*.mlp.act_fn.alpha_{p,n} 1
model.layers.*.mlp.act_fn.{beta,eps}
model.layers.*.{attention,feedforward}_layernorm.weight 32""",
        ),
        notes="the activation's numbers become metadata: the converter reads them",
    ),
    "Hunyuan": Family(
        "HunYuanDenseV1ForCausalLM",
        _config("hunyuan_v1_dense", **_TIED, head_dim=8, pad_token_id=32014),
        _lines(_LLAMA, "model.layers.*.self_attn.{query,key}_layernorm.weight 8"),
    ),
    "MiniMax M2": Family(
        "MiniMaxM2ForCausalLM",
        _config(
            "minimax_m2",
            **_LOCAL_TOP_2_OF_4,
            head_dim=16,
            rotary_dim=8,
            scoring_func="sigmoid",
            use_qk_norm=True,
            use_routing_bias=True,
        ),
        _lines(
            *(_EMBED, _HEAD, _WIDE_ATTENTION, _MIXTRAL_EXPERTS, _NORMS, _NORM),
            """\
model.layers.*.block_sparse_moe.e_score_correction_bias 4 F32
model.layers.*.self_attn.q_norm.weight 64
model.layers.*.self_attn.k_norm.weight 32""",
        ),
        notes="experts are stacked",
    ),
    "dots1": Family(
        "Dots1ForCausalLM",
        _config("dots1", **_FIRST_DENSE_CONFIG | _NO_AUX, head_dim=8),
        _lines(
            *(_EMBED, _HEAD, _ATTENTION, _FIRST_DENSE, _CORRECTION, _NORMS, _NORM),
            "model.layers.*.self_attn.{q,k}_norm.weight 8",
        ),
        notes="experts are stacked",
    ),
    "BitNet": Family(
        "BitnetForCausalLM",
        _config("llama", **_TIED),
        _lines(
            _LLAMA,
            """\
model.layers.*.self_attn.inner_attn_ln.weight 32
model.layers.*.mlp.ffn_layernorm.weight 256""",
        ),
        tokenizer="spm",
        notes="the converter rounds the weights",
    ),
    "InternLM2": Family(
        "InternLM2ForCausalLM",
        _config("internlm2", bias=False),
        """\
model.tok_embeddings.weight V 32
model.layers.*.attention.wqkv.weight 64 32
model.layers.*.attention.wo.weight 32 32
model.layers.*.feed_forward.w{1,3}.weight 256 32
model.layers.*.feed_forward.w2.weight 32 256
model.layers.*.{attention,ffn}_norm.weight 32
model.norm.weight 32
output.weight V 32""",
        tokenizer="spm",
        notes="wqkv is split within each key-value head",
    ),
    "MiniCPM": Family(
        "MiniCPMForCausalLM",
        _config("minicpm", **_TIED, scale_emb=12, scale_depth=1.4, dim_model_base=16),
        _LLAMA,
        tokenizer="spm",
    ),
    "MiniCPM3": Family(
        "MiniCPM3ForCausalLM",
        _config(
            "minicpm3",
            num_key_value_heads=4,
            kv_lora_rank=32,
            q_lora_rank=64,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=24,
            scale_emb=12,
            scale_depth=1.4,
            dim_model_base=16,
        ),
        _lines(_EMBED, _HEAD, _MLA, _MLA_Q, _MLP, _NORMS, _NORM),
        tokenizer="spm",
        notes="kv_b_proj stays whole",
    ),
    "Baichuan": Family(
        "BaichuanForCausalLM",
        _config("baichuan", num_key_value_heads=None, model_max_length=512),
        _lines(
            *(_EMBED, _HEAD, _MLP, _NORMS, _NORM),
            """\
model.layers.*.self_attn.W_pack.weight 96 32
model.layers.*.self_attn.o_proj.weight 32 32""",
        ),
        tokenizer="spm",
        notes="W_pack is to be split into q, k and v",
        refused="convert: RecursionError",
    ),
    "Orion": Family(
        "OrionForCausalLM",
        _config("orion"),
        _lines(_LLAMA, _HEAD, _NORM_BIASES),
        tokenizer="spm",
    ),
}

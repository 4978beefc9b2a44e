"""Names of checkpoint tensors in a GGUF file, and their roles.

The names are gguf's own (`TensorNameMap`); whether llama-quantize touches a tensor is
its rule (src/llama-quant.cpp, tensor_allows_quantization).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gguf.tensor_mapping import TensorNameMap

#: Hugging Face architecture -> gguf architecture, for families whose names alone say
#: which tensor becomes which; the converter is asked about every other one.
ARCHITECTURES = {
    "ArceeForCausalLM": "arcee",
    "CohereForCausalLM": "command-r",
    "Exaone4ForCausalLM": "exaone4",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "GemmaForCausalLM": "gemma",
    "Glm4ForCausalLM": "glm4",
    "GraniteForCausalLM": "granite",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "NemotronForCausalLM": "nemotron",
    "Olmo2ForCausalLM": "olmo2",
    "OlmoForCausalLM": "olmo",
    "Phi3ForCausalLM": "phi3",
    "PhiForCausalLM": "phi2",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
}

#: Tensors of a checkpoint that the converter leaves out
#: (conversion/base.py, prepare_tensors).
_DROPPED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")

# Parts of a name that keep llama-quantize away from it.
_NEVER_QUANTIZED = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup",
    "laurel", "per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight",
    "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight",
    "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight",
    "time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight",
    "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight",
    "time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", "attn_rel_b.weight",
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos",
    ".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_NEVER_QUANTIZED_WHOLE = ("position_embd.weight", "token_types.weight")


def is_dropped(hf_name: str) -> bool:
    """Whether the converter leaves this tensor out of the GGUF."""
    return hf_name.endswith(_DROPPED)


def gguf_name(architecture: str, n_layers: int, hf_name: str) -> str | None:
    """The GGUF name of a checkpoint's tensor, or None where gguf knows none.

    Args:
        architecture: gguf's name, such as `llama`.
        n_layers: The number of layers; tensors of layers beyond it have no name.
        hf_name: such as `model.layers.3.self_attn.q_proj.weight`.
    """
    return _name_map(architecture, n_layers).get_name(hf_name, (".weight", ".bias"))


def has_role(hf_name: str, role: str) -> bool:
    """Whether a tensor outside the layers is the model's `token_embd`, `output`, ...

    In whichever family: gguf's table of such names does not ask for the architecture.
    """
    parts = hf_name.replace("language_model.", "").removesuffix(".weight")
    return parts == role or parts in _top_names(role)


def can_be(architecture: str, role: str) -> bool:
    """Whether a GGUF of this architecture has a tensor of this role."""
    from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return role in {TENSOR_NAMES[tensor] for tensor in MODEL_TENSORS[arch]}


def layer_idx(name: str) -> int | None:
    """The layer of a GGUF tensor name: 3 for `blk.3.attn_q.weight`, else None."""
    match = _LAYER.fullmatch(name)
    return int(match[1]) if match else None


def role(name: str) -> str:
    """The role of a tensor: `attn_q` for `blk.3.attn_q.weight`, `token_embd`, ..."""
    match = _LAYER.fullmatch(name)
    return (match[2] if match else name).removesuffix(".weight")


def is_quantizable(name: str, n_dims: int) -> bool:
    """Whether llama-quantize would quantise a tensor of this GGUF name."""
    return (
        n_dims >= 2
        and name.endswith("weight")
        and not any(part in name for part in _NEVER_QUANTIZED)
        and name not in _NEVER_QUANTIZED_WHOLE
    )


def nearest_name(name: str, names: Collection[str]) -> str:
    """The name most like a mistyped one, or one of them where none is much like it."""
    near = difflib.get_close_matches(name, names, n=1)
    return near[0] if near else min(names, default="none")


@cache
def _top_names(role: str) -> frozenset[str]:
    from gguf.constants import TENSOR_NAMES
    from gguf.tensor_mapping import TensorNameMap

    return frozenset(
        name
        for tensor, names in TensorNameMap.mappings_cfg.items()
        if TENSOR_NAMES[tensor] == role
        for name in names
    )


@cache
def _name_map(architecture: str, n_layers: int) -> TensorNameMap:
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(arch, n_layers)

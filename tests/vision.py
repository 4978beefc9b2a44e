"""Tiny vision-language checkpoints, as their publishers lay them out.

The text part is a family of `families.py`; the vision part has the names, shapes and
config keys of published checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from tests.checkpoints import write_shard
from tests.families import FAMILIES, expanded, write_family

_SIGLIP = """\
{V}embeddings.patch_embedding.weight 32 3 14 14
{V}embeddings.patch_embedding.bias 32
{V}embeddings.position_embedding.weight 4 32
{V}encoder.layers.{0..1}.self_attn.{q,k,v,out}_proj.weight 32 32
{V}encoder.layers.{0..1}.self_attn.{q,k,v,out}_proj.bias 32
{V}encoder.layers.{0..1}.mlp.fc1.weight 64 32
{V}encoder.layers.{0..1}.mlp.fc1.bias 64
{V}encoder.layers.{0..1}.mlp.fc2.weight 32 64
{V}encoder.layers.{0..1}.mlp.fc2.bias 32
{V}encoder.layers.{0..1}.layer_norm{1,2}.{weight,bias} 32
{V}post_layernorm.{weight,bias} 32"""
_GEMMA = (
    _SIGLIP.replace("{V}", "vision_tower.vision_model.")
    + """
multi_modal_projector.mm_input_projection_weight 32 64
multi_modal_projector.mm_soft_emb_norm.weight 32"""
)
_SMOL = (
    _SIGLIP.replace("{V}", "model.vision_model.")
    + """
model.connector.modality_projection.proj.weight 32 128"""
)
_QWEN = """\
visual.patch_embed.proj.weight 32 3 2 14 14
visual.blocks.{0..2}.norm{1,2}.weight 32
visual.blocks.{0..2}.attn.qkv.weight 96 32
visual.blocks.{0..2}.attn.qkv.bias 96
visual.blocks.{0..2}.attn.proj.weight 32 32
visual.blocks.{0..2}.attn.proj.bias 32
visual.blocks.{0..2}.mlp.{gate,up}_proj.weight 64 32
visual.blocks.{0..2}.mlp.{gate,up}_proj.bias 64
visual.blocks.{0..2}.mlp.down_proj.weight 32 64
visual.blocks.{0..2}.mlp.down_proj.bias 32
visual.merger.ln_q.weight 32
visual.merger.mlp.0.weight 128 128
visual.merger.mlp.0.bias 128
visual.merger.mlp.2.weight 32 128
visual.merger.mlp.2.bias 32"""
_SIGLIP_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "num_channels": 3,
}


def write_gemma3(folder: Path, *, processor: bool = True, prefix: str = "") -> Path:
    """Gemma 3 with its SigLIP tower; 28 x 28 pixels become one embedding."""
    model = write_family(folder, "Gemma 3")
    text = _config(model)
    vocab = text["vocab_size"]
    text.pop("architectures")
    _write_config(
        model,
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "mm_tokens_per_image": 1,
            "image_token_index": int(str(vocab)) - 1,
            "text_config": text,
            "vision_config": {"model_type": "siglip_vision_model", **_SIGLIP_CONFIG},
        },
    )
    if processor:
        write_processor(model, {"image_seq_length": 1})
    tower = "\n".join(f"{prefix}{line}" for line in _GEMMA.split("\n"))
    _write(model, "Gemma 3", tower, lambda name: f"language_model.{name}")
    return model


def write_smolvlm(folder: Path) -> Path:
    """SmolVLM: a Llama with a SigLIP tower; 2 x 2 patches become one embedding."""
    model = write_family(folder, "Llama 3")
    text = _config(model)
    text["architectures"] = ["VLlama3ForCausalLM"]
    _write_config(
        model,
        {
            "architectures": ["SmolVLMForConditionalGeneration"],
            "model_type": "smolvlm",
            "scale_factor": 2,
            "image_token_id": int(str(text["vocab_size"])) - 1,
            "text_config": text,
            "vision_config": {"model_type": "smolvlm_vision", **_SIGLIP_CONFIG},
        },
    )
    write_processor(model, {"size": {"longest_edge": 28}})
    _write(
        model,
        "Llama 3",
        _SMOL,
        lambda name: name.replace("model.", "model.text_model."),
    )
    return model


def write_qwen25vl(folder: Path) -> Path:
    """Qwen2.5-VL: joint qkv, two frames per patch, window attention."""
    model = write_family(folder, "Qwen2")
    text = _config(model)
    _write_config(
        model,
        text
        | {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
            "vision_config": {
                "model_type": "qwen2_5_vl",
                "depth": 3,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 112,
                "fullatt_block_indexes": [1],
            },
        },
    )
    write_processor(model, {"min_pixels": 784, "max_pixels": 50176})
    _write(model, "Qwen2", _QWEN, str)
    return model


def write_unknown(folder: Path) -> Path:
    """A text model that the converter takes, under a name it has no mmproj for."""
    model = write_family(folder, "Llama 3")
    _write_config(
        model,
        {
            "architectures": ["KeyeForConditionalGeneration"],
            "model_type": "keye",
            "text_config": _config(model),
            "vision_config": {"model_type": "keye_vision", **_SIGLIP_CONFIG},
        },
    )
    write_processor(model, {})
    tower = _SIGLIP.replace("{V}", "vision_tower.")
    _write(model, "Llama 3", tower, lambda name: f"language_model.{name}")
    return model


def write_llava(folder: Path) -> Path:
    """LLaVA 1.5: the converter knows the name, and takes no CLIP tower."""
    model = write_family(folder, "Llama 3")
    text = _config(model)
    text.pop("architectures")
    _write_config(
        model,
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "text_config": text,
            "vision_config": {"model_type": "clip_vision_model", **_SIGLIP_CONFIG},
        },
    )
    write_processor(model, {})
    tower = _SIGLIP.replace("{V}", "vision_tower.vision_model.")
    _write(model, "Llama 3", tower, lambda name: f"language_model.{name}")
    return model


def write_processor(model: Path, more: Mapping[str, object]) -> None:
    """preprocessor_config.json."""
    values = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], **more}
    (model / "preprocessor_config.json").write_text(json.dumps(values))


def _config(model: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads((model / "config.json").read_text())
    return values


def _write_config(model: Path, values: Mapping[str, object]) -> None:
    (model / "config.json").write_text(json.dumps(values))


def _write(
    model: Path, family: str, vision: str, text_name: Callable[[str], str]
) -> None:
    """The family's tensors under other names, and the vision part's."""
    text = FAMILIES[family]
    shapes = {text_name(name): shape for name, shape in text.shapes().items()}
    shapes |= expanded(vision, text.n_layers, text.vocab)
    rng = np.random.default_rng(1)
    write_shard(
        model / "model.safetensors",
        {
            name: (dtype, rng.standard_normal(shape, np.float32) * np.float32(0.05))
            for name, (dtype, shape) in shapes.items()
        },
    )

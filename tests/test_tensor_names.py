"""Names, roles and what llama-quantize leaves alone."""

from __future__ import annotations

import pytest
from gguf.constants import MODEL_ARCH_NAMES

from ewq_gguf.tensor_names import (
    ARCHITECTURES,
    gguf_name,
    is_dropped,
    is_quantizable,
    layer_idx,
    role,
)
from tests.gguf_files import dry_run, write_gguf

pytest_plugins = ["tests.toolchain_fixtures"]

LLAMA_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.1.self_attn.k_proj.weight": "blk.1.attn_k.weight",
    "model.layers.10.self_attn.v_proj.weight": "blk.10.attn_v.weight",
    "model.layers.11.self_attn.o_proj.weight": "blk.11.attn_output.weight",
    "model.layers.11.self_attn.q_proj.bias": "blk.11.attn_q.bias",
    "model.layers.2.mlp.gate_proj.weight": "blk.2.ffn_gate.weight",
    "model.layers.2.mlp.up_proj.weight": "blk.2.ffn_up.weight",
    "model.layers.2.mlp.down_proj.weight": "blk.2.ffn_down.weight",
    "model.layers.2.input_layernorm.weight": "blk.2.attn_norm.weight",
    "model.layers.2.post_attention_layernorm.weight": "blk.2.ffn_norm.weight",
}


@pytest.mark.parametrize("hf_name", LLAMA_NAMES)
def test_a_llama_tensor_has_the_converters_name(hf_name):
    assert gguf_name("llama", 12, hf_name) == LLAMA_NAMES[hf_name]


@pytest.mark.parametrize(
    "hf_name",
    [
        "model.layers.12.self_attn.q_proj.weight",
        "model.layers.-1.self_attn.q_proj.weight",
        "model.layers.3.self_attn.q_proj.qweight",
        "vision_tower.patch.weight",
        "",
    ],
)
def test_a_tensor_that_the_model_cannot_have_has_no_name(hf_name):
    assert gguf_name("llama", 12, hf_name) is None


@pytest.mark.llamacpp
def test_predicted_names_and_shapes_are_the_real_converters(tiny):
    found = {tensor.name: tensor.shape for tensor in tiny.layout.tensors}

    assert {tensor.name: tensor.shape for tensor in tiny.scan.tensors} == found


def test_every_supported_architecture_is_one_of_gguf():
    assert set(ARCHITECTURES.values()) <= set(MODEL_ARCH_NAMES.values())


@pytest.mark.parametrize(
    ("name", "idx", "what"),
    [
        ("blk.3.attn_q.weight", 3, "attn_q"),
        ("blk.10.ffn_down.weight", 10, "ffn_down"),
        ("blk.123.attn_q.bias", 123, "attn_q.bias"),
        ("blk.0.ffn_gate_exps.weight", 0, "ffn_gate_exps"),
        ("token_embd.weight", None, "token_embd"),
        ("output.weight", None, "output"),
        ("output_norm.weight", None, "output_norm"),
        ("rope_freqs.weight", None, "rope_freqs"),
        ("xblk.3.attn_q.weight", None, "xblk.3.attn_q"),
        ("blk.x.attn_q.weight", None, "blk.x.attn_q"),
        ("blk.3", None, "blk.3"),
    ],
)
def test_layer_and_role_are_read_from_the_gguf_name(name, idx, what):
    assert layer_idx(name) == idx
    assert role(name) == what


@pytest.mark.parametrize(
    ("hf_name", "dropped"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("transformer.h.0.attn.attention.masked_bias", True),
        ("transformer.h.0.attn.attention.bias", True),
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("model.layers.0.self_attn.q_proj.weight", False),
    ],
)
def test_tensors_the_converter_leaves_out_are_known(hf_name, dropped):
    assert is_dropped(hf_name) == dropped


@pytest.mark.llamacpp
def test_quantizable_is_what_llama_quantize_touches(toolchain, tiny):
    """Asked for Q8_0 everywhere, it leaves exactly the other tensors as they are."""
    asked = "".join(f"^{t.name}$=q4_0\n" for t in tiny.layout.tensors)
    found = dry_run(toolchain, tiny.base, asked)

    assert found.keys() == {tensor.name for tensor in tiny.layout.tensors}
    for tensor in tiny.layout.tensors:
        changed = found[tensor.name] != tensor.ggml_type
        assert changed == is_quantizable(tensor.name, len(tensor.shape)), tensor.name
    assert found["blk.0.attn_norm.weight"] == "F32"
    assert found["token_embd.weight"] == "Q4_0"


@pytest.mark.llamacpp
def test_quantizable_agrees_on_every_special_name(toolchain, tmp_path):
    """One 2-D tensor per rule of llama-quantize, and its near misses."""
    roles = (
        "attn_norm", "attn_q_norm", "norm", "attn_norm_x", "ffn_gate_inp",
        "ffn_gate_inp_s", "ffn_gate_tid2eid", "altup_proj", "laurel_l", "ssm_conv1d",
        "ssm_in", "shortconv.conv", "shortconv.in_proj", "indexer.k_proj",
        "indexer.q_proj", "indexer.attn_q_b", "time_mix_first", "time_mix_w0",
        "time_mix_w1", "time_mix_w2", "time_mix_v0", "time_mix_v1", "time_mix_v2",
        "time_mix_a0", "time_mix_a1", "time_mix_a2", "time_mix_g1", "time_mix_g2",
        "time_mix_decay_w1", "time_mix_decay_w2", "time_mix_lerp_fused",
        "time_mix_key", "attn_rel_b", "attn_q", "ffn_up_exps",
    )  # fmt: skip
    names = [f"blk.0.{name}.weight" for name in roles]
    names += [
        "position_embd.weight", "token_types.weight", "v.position_embd.weight",
        "per_layer_model_proj.weight", "per_layer_token_embd.weight",
        "v.patch_embd.weight", "mm.patch_merger.weight", "a.rvq.codebook.weight",
        "v.blk.0.attn_rel_pos.weight", "v.blk.0.rel_pos.weight", "token_embd.weight",
        "output.weight", "output_norm.weight", "blk.0.attn_q.bias",
        "blk.0.attn_q.weights", "blk.0.attn_qweight", "blk.0.ssm_a",
    ]  # fmt: skip
    base = write_gguf(tmp_path / "names.gguf", dict.fromkeys(names, (2, 64)))

    found = dry_run(toolchain, base, "")

    assert {name: found[name] != "F32" for name in names} == {
        name: is_quantizable(name, 2) for name in names
    }


@pytest.mark.llamacpp
def test_a_vector_is_never_quantised(toolchain, tmp_path):
    base = write_gguf(tmp_path / "v.gguf", {"blk.0.attn_q.weight": (64,)})

    assert dry_run(toolchain, base, "") == {"blk.0.attn_q.weight": "F32"}
    assert not is_quantizable("blk.0.attn_q.weight", 1)

"""LoRA adapters: merged exactly, the original untouched, everything else refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from fractions import Fraction
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ewq_gguf import api
from ewq_gguf.api import Options
from ewq_gguf.checkpoint import dask_worker
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.lora.low_rank import encode, exact_product, row_norms
from ewq_gguf.checkpoint.lora.merge import open_merged
from ewq_gguf.checkpoint.scan import scan_checkpoint
from ewq_gguf.checkpoint.source import Opening, open_checkpoint
from ewq_gguf.cli import main
from ewq_gguf.errors import InputError, ResourceError, UsageError
from ewq_gguf.llamacpp.export_script import export_sh
from ewq_gguf.llamacpp.toolchain import find_toolchain
from ewq_gguf.records import EwqPolicy, Measures, ModelIdentity, TensorScan
from ewq_gguf.stages.finished_plan import check_plan
from tests.adapters import (
    Floats,
    factors,
    floats_of,
    nearest,
    read_tensors,
    write_adapter,
)
from tests.checkpoints import write_llama, write_raw, write_shard
from tests.gguf_files import make_cache

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
IN_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """Two BF16 layers in three files."""
    return write_llama(tmp_path_factory.mktemp("llama") / "tiny", n_shards=3)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    """One layer whose head is its embedding."""
    folder = tmp_path_factory.mktemp("tied") / "tied"
    return write_llama(folder, n_layers=1, tied=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path / "cache"))
    return Path(tmp_path / "cache")


def tensors_of(checkpoint: Checkpoint) -> dict[str, tuple[str, Floats]]:
    return read_tensors(*(shard.path for shard in checkpoint.shards))


def merged(base: Path, *adapters: Path, notes: list[str] | None = None) -> Checkpoint:
    opening = Opening(say=None if notes is None else notes.append)
    return open_merged(str(base), [str(adapter) for adapter in adapters], opening)


def check_changed(base: Path, found: Checkpoint, wanted: dict[str, Floats]) -> None:
    """Some tensors are the nearest to float64 values, all others what they were."""
    before, after = tensors_of(open_checkpoint(str(base))), tensors_of(found)
    assert after.keys() == before.keys()
    for name, (dtype, values) in after.items():
        assert dtype == before[name][0]
        expected = nearest(wanted[name], dtype) if name in wanted else before[name][1]
        np.testing.assert_array_equal(values, expected, err_msg=name)


def weights(base: Path, name: str) -> Floats:
    return tensors_of(open_checkpoint(str(base)))[name][1]


# What is merged.


def test_the_merged_weights_are_float64s_rounded_once(llama, tmp_path):
    """The product's factor is alpha / r; every other tensor keeps its bytes."""
    parts = factors(Q, 64, 64) | factors(DOWN, 64, 96) | factors(HEAD, 320, 64)
    found = merged(llama, write_adapter(tmp_path / "tune", parts))
    wanted = {}
    for module in (Q, DOWN, HEAD):
        a, b = parts[f"{module}.lora_A.weight"], parts[f"{module}.lora_B.weight"]
        wanted[f"{module}.weight"] = weights(llama, f"{module}.weight") + 2.0 * b @ a
    check_changed(llama, found, wanted)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_the_checkpoints_and_the_adapters_types_may_be_any_float(tmp_path, dtype):
    base = write_llama(tmp_path / "base", n_layers=1, dtype=dtype)
    for own in ("F16", "BF16", "F32"):
        parts = factors(Q, 64, 64)
        adapter = write_adapter(tmp_path / own, parts, dtype=own)
        stored = read_tensors(adapter / "adapter_model.safetensors")
        a, b = (v for _, v in stored.values())
        value = weights(base, f"{Q}.weight") + 2.0 * b @ a
        check_changed(base, merged(base, adapter), {f"{Q}.weight": value})


def test_rank_and_alpha_follow_the_patterns_and_rslora_the_root(llama, tmp_path):
    parts = factors(Q, 64, 64, rank=8) | factors(DOWN, 64, 96, rank=2)
    adapter = write_adapter(
        tmp_path / "tune",
        parts,
        rank_pattern={"layers.0.self_attn.q_proj": 8, "down_proj": 2},
        alpha_pattern={r".*layers\.1.*": 3},
        use_rslora=True,
    )
    scales = {Q: 8 / np.sqrt(8), DOWN: 3 / np.sqrt(2)}
    wanted = {
        f"{m}.weight": weights(llama, f"{m}.weight")
        + scale * (parts[f"{m}.lora_B.weight"] @ parts[f"{m}.lora_A.weight"])
        for m, scale in scales.items()
    }
    check_changed(llama, merged(llama, adapter), wanted)


def test_doras_rows_get_their_magnitudes(llama, tmp_path):
    parts = factors(Q, 64, 64)
    magnitude = np.linspace(0.5, 2, 64).astype(np.float32).astype(float)
    adapter = write_adapter(
        tmp_path / "tune",
        parts | {f"{Q}.lora_magnitude_vector": magnitude},
        use_dora=True,
    )
    value = weights(llama, f"{Q}.weight") + 2.0 * (
        parts[f"{Q}.lora_B.weight"] @ parts[f"{Q}.lora_A.weight"]
    )
    value *= (magnitude / np.linalg.norm(value, axis=1))[:, None]
    check_changed(llama, merged(llama, adapter), {f"{Q}.weight": value})


def test_several_adapters_are_added_before_the_one_rounding(llama, tmp_path):
    one, two = factors(Q, 64, 64), factors(Q, 64, 64, seed=1)
    a = write_adapter(tmp_path / "one", one)
    b = write_adapter(tmp_path / "two", two, lora_alpha=4)
    value = weights(llama, f"{Q}.weight")
    for scale, parts in ((2.0, one), (1.0, two)):
        value = value + scale * (
            parts[f"{Q}.lora_B.weight"] @ parts[f"{Q}.lora_A.weight"]
        )
    found = merged(llama, a, b)
    check_changed(llama, found, {f"{Q}.weight": value})
    assert found.identity.name == "tiny-one-two"
    assert [adapter.name for adapter in found.identity.adapters] == ["one", "two"]


def test_an_embeddings_factors_are_stored_the_other_way_round(llama, tmp_path):
    parts = factors(EMBEDDING, 64, 320, ends=IN_EMBEDDING)
    a, b = parts.values()
    value = weights(llama, f"{EMBEDDING}.weight") + 2.0 * (b @ a).T
    found = merged(llama, write_adapter(tmp_path / "tune", parts))
    check_changed(llama, found, {f"{EMBEDDING}.weight": value})


def test_what_is_merged_into_a_tied_embedding_changes_the_head(tied, tmp_path):
    """As in PEFT, where both are one tensor: an adapter of either changes both."""
    parts = factors(EMBEDDING, 64, 320, ends=IN_EMBEDDING) | factors(HEAD, 320, 64)
    a, b, head_a, head_b = parts.values()
    value = weights(tied, f"{EMBEDDING}.weight")
    saved = {f"{HEAD}.base_layer.weight": value}  # PEFT saves it beside its adapter
    notes: list[str] = []
    adapter = write_adapter(tmp_path / "tune", parts | saved)
    found = merged(tied, adapter, notes=notes)
    value = value + 2.0 * (b @ a).T + 2.0 * head_b @ head_a
    check_changed(tied, found, {f"{EMBEDDING}.weight": value})
    assert "model.embed_tokens.weight is also the head" in "\n".join(notes)


def test_modules_that_were_trained_whole_replace_the_bases(llama, tmp_path):
    norm = "model.layers.0.input_layernorm.weight"
    parts = {
        norm: np.linspace(0, 3, 64),
        f"{HEAD}.modules_to_save.weight": np.linspace(-1, 1, 320 * 64).reshape(320, 64),
        f"{HEAD}.original_module.weight": np.zeros((320, 64)),
    }
    found = merged(llama, write_adapter(tmp_path / "tune", parts))
    single = {k: v.astype(np.float32).astype(float) for k, v in parts.items()}
    head = single[f"{HEAD}.modules_to_save.weight"]
    wanted = {norm: single[norm], f"{HEAD}.weight": head}
    check_changed(llama, found, wanted)


@pytest.mark.parametrize("told", [[3, 319, 7], {"embed_tokens": [3, 319, 7]}])
def test_trained_tokens_replace_their_rows(llama, tmp_path, told):
    rows = np.arange(3 * 64).reshape(3, 64) / 8
    name = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
    adapter = write_adapter(
        tmp_path / "tune", {name: rows}, trainable_token_indices=told
    )
    value = weights(llama, f"{EMBEDDING}.weight").copy()
    value[[3, 319, 7]] = rows
    check_changed(llama, merged(llama, adapter), {f"{EMBEDDING}.weight": value})


def test_the_bias_of_b_is_added_to_the_modules_own(llama, tmp_path):
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    path = base / "model-00001-of-00003.safetensors"
    head = json.loads((base / "model.safetensors.index.json").read_text())
    stored = {k: (d, v.astype(np.float32)) for k, (d, v) in read_tensors(path).items()}
    stored[f"{Q}.bias"] = ("BF16", np.ones(64, np.float32))
    write_shard(path, stored)
    head["weight_map"][f"{Q}.bias"] = path.name
    (base / "model.safetensors.index.json").write_text(json.dumps(head))
    parts = factors(Q, 64, 64) | {f"{Q}.lora_B.bias": np.linspace(0, 1, 64)}
    adapter = write_adapter(tmp_path / "tune", parts, lora_bias=True)
    bias = np.linspace(0, 1, 64).astype(np.float32).astype(float)
    product = parts[f"{Q}.lora_B.weight"] @ parts[f"{Q}.lora_A.weight"]
    wanted = {
        f"{Q}.weight": weights(base, f"{Q}.weight") + 2.0 * product,
        f"{Q}.bias": 1.0 + 2.0 * bias,
    }
    check_changed(base, merged(base, adapter), wanted)


def write_model(
    folder: Path, architecture: str, tensors: dict[str, Floats], **config: Any
) -> Path:
    """A checkpoint that nobody converts."""
    folder.mkdir()
    values = {"architectures": [architecture], "num_hidden_layers": 1, **config}
    (folder / "config.json").write_text(json.dumps(values))
    write_shard(
        folder / "model.safetensors",
        {name: ("BF16", value.astype(np.float32)) for name, value in tensors.items()},
    )
    return folder


@pytest.mark.parametrize("flag", [True, False])
def test_gpt2s_conv1d_is_turned_and_its_head_is_not(tmp_path, flag):
    """PEFT's own flag is false for all where a head was among the modules."""
    rng = np.random.default_rng(0)
    names = {"h.0.attn.c_attn": (8, 24), "h.0.attn.c_proj": (8, 8), "wte": (40, 8)}
    tensors = {f"{name}.weight": rng.standard_normal(s) for name, s in names.items()}
    base = write_model(tmp_path / "gpt2", "GPT2LMHeadModel", tensors)
    parts: dict[str, Floats] = {}
    for name, (rows, columns) in names.items():
        module = HEAD if name == "wte" else f"transformer.{name}"
        shape = (rows, columns) if name == "wte" else (columns, rows)
        parts |= factors(module, *shape)
    adapter = write_adapter(tmp_path / "tune", parts, fan_in_fan_out=flag)
    values = list(parts.values())
    wanted = {}
    for i, name in enumerate(names):
        product = 2.0 * values[2 * i + 1] @ values[2 * i]
        turned = product if name == "wte" else product.T
        wanted[f"{name}.weight"] = weights(base, f"{name}.weight") + turned
    check_changed(base, merged(base, adapter), wanted)


N_EXPERTS, RANK, INNER, HIDDEN = 3, 2, 12, 8
EXPERTS = "model.layers.0.mlp.experts"
FUSED = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


def expert_factors() -> dict[str, Floats]:
    """Of both parameters, the first one inside the other's wrapper."""
    gate_up = factors(f"{EXPERTS}.base_layer", 2 * INNER, HIDDEN, rank=RANK * N_EXPERTS)
    return gate_up | factors(EXPERTS, HIDDEN, INNER, rank=RANK * N_EXPERTS, seed=1)


def expert_products(parts: dict[str, Floats]) -> dict[str, Floats]:
    """PEFT's einsum, of (out, rank, experts) and (experts, rank, in)."""
    products = {}
    for name, module in (
        ("gate_up_proj", f"{EXPERTS}.base_layer"),
        ("down_proj", EXPERTS),
    ):
        a, b = parts[f"{module}.lora_A.weight"], parts[f"{module}.lora_B.weight"]
        a = a.reshape(N_EXPERTS, RANK, -1)
        products[name] = np.einsum(
            "ore,eri->eoi", b.reshape(len(b), RANK, N_EXPERTS), a
        )
    return products


def write_expert_adapter(folder: Path, parts: dict[str, Floats]) -> Path:
    told = [f"mlp.experts.{name}" for name in FUSED]
    return write_adapter(folder, parts, r=RANK, lora_alpha=4, target_parameters=told)


@pytest.mark.parametrize(
    ("architecture", "turn"),
    [("Qwen3MoeForCausalLM", False), ("GptOssForCausalLM", True)],
)
def test_experts_in_one_tensor_get_their_own_products(tmp_path, architecture, turn):
    rng, parts = np.random.default_rng(0), expert_factors()
    shapes = {n: (N_EXPERTS, *(s[::-1] if turn else s)) for n, s in FUSED.items()}
    tensors = {f"{EXPERTS}.{n}": rng.standard_normal(s) for n, s in shapes.items()}
    base = write_model(tmp_path / "base", architecture, tensors)
    wanted = {}
    for name, product in expert_products(parts).items():
        delta = 2.0 * (product.transpose(0, 2, 1) if turn else product)
        wanted[f"{EXPERTS}.{name}"] = weights(base, f"{EXPERTS}.{name}") + delta
    adapter = write_expert_adapter(tmp_path / "tune", parts)
    check_changed(base, merged(base, adapter), wanted)


@pytest.mark.parametrize(
    ("experts", "matrices"),
    [
        (EXPERTS, ("gate_proj", "up_proj", "down_proj")),
        (EXPERTS.replace("mlp", "block_sparse_moe"), ("w1", "w3", "w2")),
    ],
    ids=["Qwen3-MoE", "Mixtral"],
)
def test_experts_in_one_are_cut_where_the_checkpoint_has_each(
    tmp_path, experts, matrices
):
    rng, parts = np.random.default_rng(0), expert_factors()
    shapes = dict(
        zip(matrices, ((INNER, HIDDEN),) * 2 + ((HIDDEN, INNER),), strict=True)
    )
    tensors = {
        f"{experts}.{e}.{name}.weight": np.array(rng.standard_normal(shape))
        for e in range(N_EXPERTS)
        for name, shape in shapes.items()
    }
    base = write_model(tmp_path / "base", "Qwen3MoeForCausalLM", tensors)
    products = expert_products(parts)
    gate, up = np.split(products["gate_up_proj"], 2, axis=1)
    each = dict(zip(matrices, (gate, up, products["down_proj"]), strict=True))
    wanted = {
        f"{experts}.{e}.{name}.weight": weights(base, f"{experts}.{e}.{name}.weight")
        + 2.0 * value[e]
        for name, value in each.items()
        for e in range(N_EXPERTS)
    }
    adapter = write_expert_adapter(tmp_path / "tune", parts)
    check_changed(base, merged(base, adapter), wanted)


@pytest.mark.parametrize(
    ("module", "own"),
    [
        ("model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
        ("model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        (
            "model.language_model.layers.0.mlp.up_proj",
            "language_model.model.layers.0.mlp.up_proj",
        ),
        ("model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
        ("model.layers.0.mlp.experts.1.w1", "model.layers.0.mlp.experts.1.w1"),
    ],
)
def test_a_module_is_found_under_its_checkpoints_name(tmp_path, module, own):
    tensors = {f"{own}.weight": np.ones((8, 8)), "other.weight": np.ones((8, 8))}
    base = write_model(tmp_path / "base", "LlamaForCausalLM", tensors)
    parts = factors(module, 8, 8)
    a, b = parts.values()
    found = merged(base, write_adapter(tmp_path / "tune", parts))
    check_changed(base, found, {f"{own}.weight": 1.0 + 2.0 * b @ a})


# The arithmetic.


@given(
    st.integers(1, 40), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1)
)
def test_the_product_is_exact_to_the_bound(rank, rows, columns, seed):
    rng = np.random.default_rng(seed)
    left = rng.standard_normal((rows, rank))
    right = rng.standard_normal((rank, columns))
    left *= np.exp2(rng.integers(-60, 60, (rows, 1)))
    left[rng.random((rows, rank)) < 0.2] = 0
    found = exact_product(left, right)
    n_bits = (53 - (rank - 1).bit_length()) // 2
    for i in range(rows):
        for j in range(columns):
            pairs = zip(left[i], right[:, j], strict=True)
            wanted = sum(Fraction(a) * Fraction(b) for a, b in pairs)
            size = np.abs(left[i]).max() * np.abs(right[:, j]).max()
            error = abs(Fraction(float(found[i, j])) - wanted)
            assert error <= 4 * rank * Fraction(2) ** (-2 * n_bits) * Fraction(size)


@given(st.integers(2, 300), st.integers(0, 2**32 - 1))
def test_no_order_of_additions_changes_a_bit_of_the_product(rank, seed):
    """Which is why every machine's BLAS gives the same merged weights."""
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((5, rank)), rng.standard_normal((rank, 7))
    order = rng.permutation(rank)
    found = exact_product(left, right)
    np.testing.assert_array_equal(found, exact_product(left[:, order], right[order]))
    swapped = exact_product(right.T, left.T).T
    np.testing.assert_array_equal(found, swapped)


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=50))
def test_rows_norms_are_euclids(values):
    matrix = np.array([values]) / 1e150
    np.testing.assert_allclose(row_norms(matrix), np.linalg.norm(matrix, axis=1))


@given(st.integers(0, 0x7F7E), st.sampled_from([-1, 0, 1]), st.booleans())
def test_a_tie_goes_to_the_even_bf16_and_a_hairs_breadth_decides(code, side, negative):
    low, high = (floats_of(np.uint16(c).tobytes(), "BF16")[0] for c in (code, code + 1))
    value = np.nextafter((low + high) / 2, [low, 0, high][side + 1])
    value = (low + high) / 2 if side == 0 else value
    wanted = code + (side == 1 or (side == 0 and code % 2 == 1))
    sign = -1.0 if negative else 1.0
    found = encode(np.array([sign * value]), "BF16")[0]
    assert found == wanted | (0x8000 if negative else 0)


@given(st.lists(st.floats(-3e38, 3e38, allow_subnormal=True), min_size=1))
def test_bf16_is_the_nearest_of_all_its_values(values):
    array = np.array(values)
    found = floats_of(encode(array, "BF16").tobytes(), "BF16")
    np.testing.assert_array_equal(found, nearest(array, "BF16"))


# The copy.


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
    }


def test_the_original_is_untouched_and_files_without_a_change_are_not_copied(
    llama, tmp_path
):
    adapter = write_adapter(tmp_path / "tune", factors(Q, 64, 64))
    before, own = hashes(llama), hashes(adapter)
    found = merged(llama, adapter)
    assert hashes(llama) == before
    assert hashes(adapter) == own
    in_base = [shard.path.is_relative_to(llama) for shard in found.shards]
    assert in_base.count(True) == 2
    assert {path.name for path in found.folder.iterdir()} == {
        *(shard.path.name for shard in found.shards),
        *found.small_files,
    }
    opened = open_checkpoint(str(llama))
    assert [s.header.raw for s in found.shards] == [s.header.raw for s in opened.shards]


def test_a_merged_copy_is_used_again_until_an_input_changes(llama, tmp_path):
    adapter = write_adapter(tmp_path / "tune", factors(Q, 64, 64))
    first = merged(llama, adapter)
    told: list[int] = []
    again = open_merged(
        str(llama), [str(adapter)], on_bytes=lambda done, total: told.append(done)
    )
    assert (told, again.signature) == ([], first.signature)
    write_adapter(adapter, factors(Q, 64, 64, seed=1))
    other = merged(llama, adapter)
    assert other.folder != first.folder
    assert other.identity.fingerprint != first.identity.fingerprint


def test_progress_counts_every_byte_that_is_written(llama, tmp_path):
    adapter = write_adapter(tmp_path / "t", factors(Q, 64, 64) | factors(HEAD, 320, 64))
    told: list[tuple[int, int]] = []
    found = open_merged(
        str(llama), [str(adapter)], on_bytes=lambda *of: told.append(of)
    )
    written = [s for s in found.shards if s.path.is_relative_to(found.folder)]
    total = sum(shard.header.file_bytes for shard in written)
    assert told[-1] == (total, total)
    assert all(a[0] < b[0] for a, b in pairwise(told))


def test_a_full_disk_is_said_before_a_byte_is_written(llama, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match="are needed and 1,000 are free.*EWQ_CACHE"):
        merged(llama, write_adapter(tmp_path / "tune", factors(Q, 64, 64)))


def test_a_base_that_changes_while_it_is_merged_is_refused(llama, tmp_path, own_cache):
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    adapter = write_adapter(tmp_path / "tune", factors(Q, 64, 64))
    path = next(base.glob("*.safetensors"))
    with pytest.raises(InputError, match="changed since they were opened"):
        open_merged(str(base), [str(adapter)], on_bytes=lambda *of: path.touch())
    assert not [*own_cache.glob("merged/*/*.safetensors")]


# Tokens, tokenizers, templates.


def write_tokens(folder: Path, *tokens: str, **config: object) -> None:
    """A tokenizer.json and tokenizer_config.json with some added tokens."""
    added = [
        {"id": 320 + i, "content": t, "special": True} for i, t in enumerate(tokens)
    ]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_larger_vocabulary_comes_with_its_tokenizer(llama, tmp_path):
    rng = np.random.default_rng(0)
    whole = {
        f"{module}.weight": nearest(rng.standard_normal((322, 64)), "F32")
        for module in (EMBEDDING, HEAD)
    }
    adapter = write_adapter(tmp_path / "tune", whole | factors(Q, 64, 64))
    write_tokens(adapter, "<|im_start|>", "<|im_end|>")
    notes: list[str] = []
    found = merged(llama, adapter, notes=notes)
    after = tensors_of(found)
    for name, values in whole.items():
        np.testing.assert_array_equal(after[name][1], nearest(values, "BF16"))
    assert found.config["vocab_size"] == 322
    assert any("2 tokens of its own (<|im_end|>, <|im_start|>)" in n for n in notes)
    config = json.loads(found.small_files["tokenizer_config.json"].read_bytes())
    listed = {int(k): v["content"] for k, v in config["added_tokens_decoder"].items()}
    assert listed == {320: "<|im_start|>", 321: "<|im_end|>"}
    assert found.small_files["tokenizer.model"].is_relative_to(llama)
    assert scan_checkpoint(found).model == found.identity


def test_more_rows_without_a_tokenizer_are_told(tied, tmp_path):
    adapter = write_adapter(tmp_path / "t", {f"{EMBEDDING}.weight": np.ones((384, 64))})
    notes: list[str] = []
    assert merged(tied, adapter, notes=notes).config["vocab_size"] == 384
    assert any("names no new token" in note for note in notes)


def test_the_bases_tokenizer_stays_where_no_token_is_new(llama, tmp_path):
    """Training leaves settings there that a finished model must not have."""
    adapter = write_adapter(tmp_path / "tune", factors(Q, 64, 64))
    write_tokens(adapter, "<s>", add_eos_token=True, bos_token="<s>")
    found = merged(llama, adapter)
    assert found.small_files.keys() == open_checkpoint(str(llama)).small_files.keys()
    config = json.loads(found.small_files["tokenizer_config.json"].read_bytes())
    assert "add_eos_token" not in config


@pytest.mark.parametrize("in_file", [True, False])
def test_another_chat_template_is_taken(llama, tmp_path, in_file):
    adapter = write_adapter(tmp_path / "tune", factors(Q, 64, 64))
    template = "{{ messages[0].content }}"
    if in_file:
        (adapter / "chat_template.jinja").write_text(template)
    else:
        values = {"chat_template": template, "add_eos_token": True}
        (adapter / "tokenizer_config.json").write_text(json.dumps(values))
    notes: list[str] = []
    found = merged(llama, adapter, notes=notes)
    config = json.loads(found.small_files["tokenizer_config.json"].read_bytes())
    before = json.loads((llama / "tokenizer_config.json").read_bytes())
    assert config == before | {"chat_template": template}
    assert any("another chat template" in note for note in notes)


# What is refused.


@contextmanager
def refused(message: str):
    """The block ends with one line of exit code 3 that matches, and merges nothing."""
    with pytest.raises(InputError, match=message) as caught:
        yield
    assert caught.value.exit_code == 3
    assert str(caught.value).isprintable()
    assert caught.value.remedy


GOOD = factors(Q, 64, 64)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"peft_type": "PREFIX_TUNING"}, "'PREFIX_TUNING'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_qalora": True}, "sets use_qalora"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "sets layer_replication"),
        ({"alora_invocation_tokens": [1]}, "sets alora_invocation_tokens"),
        ({"from_the_future": 1}, "sets from_the_future"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4': .* changed base"),
        ({"init_lora_weights": "loftq"}, "'loftq'"),
        ({"r": 8}, "lora_A has rank 4, adapter_config.json says 8"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern: '\(' is no pattern"),
        ({"rank_pattern": {"(a+)+b": 4}}, "repeats too much"),
        ({"alpha_pattern": [1]}, "alpha_pattern is no object"),
        ({"use_dora": True}, "use_dora is True, and there is no lora_magnitude"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_its_setting(
    llama, tmp_path, config, message
):
    adapter = write_adapter(tmp_path / "tune", GOOD, **config)
    with refused(message):
        merged(llama, adapter)


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (factors("model.layers.7.mlp.up_proj", 96, 64), "1 of the 1 .*not in tiny: m"),
        (factors(Q, 64, 96), r"is for \(64, 96\), .* has shape \(64, 64\); give the "),
        ({A: GOOD[A]}, "has lora_A, not an A and a B"),
        ({A: GOOD[A], B: np.ones((64, 2))}, "which make no product"),
        (GOOD | {A: np.full((4, 64), np.nan)}, "lora_A.weight holds NaN"),
        (GOOD | {B: np.full((64, 4), np.inf)}, "lora_B.weight holds NaN or inf"),
        (GOOD | {f"{Q}.lora_C.weight": np.ones(2)}, "is no part of a LoRA known here"),
        (
            GOOD | {f"{Q}.lora_magnitude_vector": np.ones(64)},
            "use_dora is False, and there is a",
        ),
        ({"score.weight": np.ones((2, 64))}, "not in tiny: score.weight"),
        ({f"{HEAD}.weight": np.ones((330, 64))}, "lm_head.weight with 330 rows"),
        ({f"{HEAD}.weight": np.ones((320, 32))}, r"is for \(320, 32\)"),
        ({}, "holds no tensors"),
        (
            {f"{HEAD}.weight": np.ones((320, 64)), f"{HEAD}.base_layer.weight":
             np.zeros((320, 64))},
            "are the same weight",
        ),
        (GOOD | {f"{Q}.lora_B.bias": np.ones(64)}, "the base has no bias"),
        (
            {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": np.ones((2, 64))},
            "trainable_token_indices do not fit",
        ),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(llama, tmp_path, tensors, message):
    adapter = write_adapter(tmp_path / "tune", tensors)
    with refused(message):
        merged(llama, adapter)


def test_a_head_of_its_own_beside_a_tied_embedding_is_refused(tied, tmp_path):
    adapter = write_adapter(tmp_path / "t", {f"{HEAD}.weight": np.ones((320, 64))})
    with refused("is a head of its own.*tie_word_embeddings to false"):
        merged(tied, adapter)


def test_dora_of_an_embedding_is_refused(llama, tmp_path):
    parts = factors(EMBEDDING, 64, 320, ends=IN_EMBEDDING)
    parts |= {f"{EMBEDDING}.lora_magnitude_vector": np.ones(320)}
    with refused("DoRA of an embedding"):
        merged(llama, write_adapter(tmp_path / "tune", parts, use_dora=True))


def test_a_weight_beyond_the_type_is_refused_by_name(tmp_path, own_cache):
    base = write_llama(tmp_path / "base", n_layers=1, dtype="F16")
    parts = {name: value * 1000 for name, value in GOOD.items()}
    with refused(f"{Q}.weight: a merged weight is no number that F16 has"):
        merged(base, write_adapter(tmp_path / "tune", parts))
    assert not [*own_cache.glob("merged/*/*.safetensors")]


def as_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def as_lfs_pointer(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    (folder / "adapter_model.safetensors").write_text(pointer)


def as_integers(folder: Path) -> None:
    tensors = {f"base_model.model.{A}": ("I8", [4, 64], bytes(256))}
    write_raw(folder / "adapter_model.safetensors", tensors)


def as_link(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (as_pickle, r"a pickle \(adapter_model.bin\).*safe_serialization=True"),
        (as_lfs_pointer, "Git LFS pointer"),
        (as_integers, "is I8, not BF16"),
        (as_link, "is a link that leaves the folder"),
        (lambda f: (f / "adapter_config.json").unlink(), "it is no PEFT adapter"),
        (
            lambda f: (f / "adapter_config.json").write_text("{"),
            "is not JSON at line 1",
        ),
        (shutil.rmtree, "no such adapter"),
    ],
)
def test_a_damaged_folder_is_refused(
    llama, tmp_path, damage: Callable[[Path], None], message
):
    adapter = write_adapter(tmp_path / "tune", GOOD)
    damage(adapter)
    with refused(message):
        merged(llama, adapter)


def test_an_adapter_is_refused_before_the_model_is_looked_at(tmp_path):
    adapter = write_adapter(tmp_path / "tune", GOOD, peft_type="IA3")
    with refused("'IA3'"):
        merged(tmp_path / "nothing", adapter)


@pytest.mark.fault(33)
@pytest.mark.parametrize("has_config", [True, False])
def test_an_adapter_alone_says_how_to_merge_it(llama, tmp_path, has_config):
    adapter = write_adapter(tmp_path / "my tune", GOOD)
    if has_config:
        shutil.copy(llama / "config.json", adapter)
    with refused(
        "is a LoRA adapter of org/base.*`ewq gguf org/base --adapter '.*tune'`"
    ):
        api.open_model(str(adapter))


def test_an_adapter_that_cannot_be_read_is_one_line(llama, tmp_path):
    name = str(tmp_path / ("a" * 300))
    with refused("cannot be read|no such adapter"):
        open_merged(str(llama), [name])


def test_a_streamed_model_is_refused(tmp_path):
    adapter = str(write_adapter(tmp_path / "tune", GOOD))
    with pytest.raises(UsageError, match="--stream leaves the weights on their server"):
        open_merged("org/base", [adapter], Opening(is_streamed=True))


# The records.


def test_a_model_without_adapters_has_the_record_that_it_had(llama):
    identity = open_checkpoint(str(llama)).identity
    assert "adapters" not in identity.model_dump()
    assert ModelIdentity.model_validate(identity.model_dump()) == identity


def test_the_scan_is_of_the_merged_weights_and_names_the_adapter(llama, tmp_path):
    adapter = write_adapter(tmp_path / "tune", GOOD)
    before = api.scan(api.Run(str(llama)))
    options = Options(adapters=(str(adapter),))
    after = api.scan(api.open_model(str(llama), options=options))
    changed = [
        a.name for a, b in zip(after.tensors, before.tensors, strict=True) if a != b
    ]
    assert changed == ["blk.0.attn_q.weight"]
    (found,) = after.model.adapters
    weights_file = adapter / "adapter_model.safetensors"
    assert found.weights_sha256 == sha256(weights_file.read_bytes()).hexdigest()
    assert (
        ModelIdentity.model_validate_json(after.model.model_dump_json()) == after.model
    )


def test_a_plan_is_for_the_merged_model_or_for_its_base(llama, tmp_path):
    base = open_checkpoint(str(llama))
    tuned = merged(llama, write_adapter(tmp_path / "tune", GOOD))
    plans = [
        api.plan(api.Run(api.scan(api.Run(c))), EwqPolicy()) for c in (base, tuned)
    ]
    check_plan(plans[1], tuned.identity, plans[1].weights_sha256)
    with refused(
        r"with 1 adapters merged \(tune\), here are 0; give the same adapters"
    ):
        check_plan(plans[1], base.identity, plans[1].weights_sha256)
    with refused(r"with 0 adapters merged \(none\), here are 1"):
        check_plan(plans[0], tuned.identity, plans[0].weights_sha256)


def test_no_script_and_no_dry_run_makes_the_base_of_a_merged_plan(
    llama, tmp_path, capsys
):
    tuned = merged(llama, write_adapter(tmp_path / "tune", GOOD))
    plan = api.plan(api.Run(api.scan(api.Run(tuned))), EwqPolicy())
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())

    with refused("--adapter tune, .*`ewq gguf MODEL --plan PLAN --adapter DIR`"):
        export_sh(plan)
    assert main(["gguf", str(llama), "--plan", str(path), "--dry-run", "-q"]) == 3
    found = capsys.readouterr()
    assert found.out == ""
    assert "give the same adapters with --adapter" in found.err


def test_a_worker_of_a_cluster_merges_for_itself(llama, tmp_path):
    found = merged(llama, write_adapter(tmp_path / "tune", GOOD))
    request = dask_worker.Request(
        run="1",
        origin=found.origin,
        adapters=found.adapters,
        is_streamed=False,
        fingerprint=found.identity.fingerprint,
        names=("blk.0.attn_q.weight",),
        measures=Measures(),
        allow_nonfinite=False,
        layout=None,
    )
    answer = dask_worker.measure_part(dask_worker.VERSION, request.model_dump_json())
    (tensor,) = json.loads(answer)["tensors"]
    whole = {t.name: t for t in scan_checkpoint(found).tensors}
    assert TensorScan.model_validate_json(json.dumps(tensor)) == whole[tensor["name"]]


# The commands.


def ewq(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "ewq_gguf", *map(str, args)]
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)


def test_an_adapter_goes_with_a_model_and_not_with_its_scan(llama, tmp_path):
    adapter = write_adapter(tmp_path / "tune", GOOD)
    made = ewq("scan", llama, "--adapter", adapter, "-q", cwd=tmp_path)
    assert made.stdout == "plans/tiny-tune.scan.json\n", made.stderr
    planned = ewq(
        "plan", "plans/tiny-tune.scan.json", "--adapter", adapter, cwd=tmp_path
    )
    assert planned.returncode == 2
    assert "is a scan of weights as they are" in planned.stderr


@pytest.mark.llamacpp
@pytest.mark.slow
def test_the_gguf_is_the_converters_of_the_merged_checkpoint(
    llama, tmp_path, monkeypatch
):
    """Byte for byte that of a checkpoint which was merged without ewq."""
    monkeypatch.delenv("EWQ_CACHE")
    (tmp_path / "own").mkdir()
    cache = make_cache(tmp_path / "own", find_toolchain())
    monkeypatch.setenv("EWQ_CACHE", str(cache))
    parts = factors(Q, 64, 64) | factors(DOWN, 64, 96) | factors(HEAD, 320, 64)
    adapter = write_adapter(tmp_path / "tune", parts)
    independent = Path(shutil.copytree(llama, tmp_path / "tiny-tune"))
    for path in independent.glob("*.safetensors"):
        stored = {}
        for name, (dtype, values) in read_tensors(path).items():
            module = name.removesuffix(".weight")
            if f"{module}.lora_A.weight" in parts:
                a, b = (parts[f"{module}.lora_{end}.weight"] for end in "AB")
                values = nearest(values + 2.0 * b @ a, dtype)
            stored[name] = (dtype, values.astype(np.float32))
        write_shard(path, stored)
    one = ewq("convert", llama, "--adapter", adapter, "-o", "a.gguf", cwd=tmp_path)
    two = ewq("convert", independent, "-o", "b.gguf", cwd=tmp_path)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_damaged_bytes_are_bad_input_or_merged(llama, tmp_path):
    """Whatever bytes lie in an adapter's files."""
    rng = np.random.default_rng(0)
    good = write_adapter(tmp_path / "good", GOOD)
    for i in range(60):
        bad = Path(shutil.copytree(good, tmp_path / f"bad{i}"))
        path = bad / ("adapter_config.json", "adapter_model.safetensors")[i % 2]
        data = bytearray(path.read_bytes())
        for place in rng.integers(0, min(len(data), 500), 3):
            data[place] = rng.integers(0, 256)
        path.write_bytes(data)
        with suppress(InputError):  # exit code 3; anything else fails the test
            merged(llama, bad)

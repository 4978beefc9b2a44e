"""Checkpoints as they are found: half of one, leftovers, buffers, encoders, F16.

Each is a kind of public bug report; what is right is the same from every command.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ewq_gguf import api
from ewq_gguf.checkpoint.completeness import missing_tensors
from ewq_gguf.checkpoint.files import model_name
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.checkpoint.other_tensors import buffers_of
from ewq_gguf.checkpoint.overflow import F16_INFINITE, find_overflows
from ewq_gguf.checkpoint.source import open_checkpoint
from ewq_gguf.cli import main
from ewq_gguf.errors import ChildError, InputError
from ewq_gguf.llamacpp.converter_words import converter_error, converter_warnings
from tests.checkpoints import write_llama, write_raw
from tests.families import FAMILIES, write_family

pytest_plugins = ["tests.toolchain_fixtures"]

Tensors = dict[str, tuple[str, list[int], bytes]]


def needs_llamacpp(test):
    """Marks a test that runs it, in the run's own cache."""
    return pytest.mark.llamacpp(pytest.mark.usefixtures("own_cache")(test))


def load(folder: Path) -> Tensors:
    """A one-file checkpoint's tensors, as `write_raw` takes them."""
    (shard,) = open_checkpoint(str(folder)).shards
    data = shard.path.read_bytes()
    return {
        t.name: (t.dtype, list(t.shape), data[t.begin : t.end])
        for t in shard.header.tensors
    }


def bf16(*shape: int) -> tuple[str, list[int], bytes]:
    return ("BF16", list(shape), bytes(2 * int(np.prod(shape))))


def changed(folder: Path, change) -> Path:
    """A checkpoint with other tensors."""
    write_raw(folder / "model.safetensors", change(load(folder)))
    return folder


def edit_config(folder: Path, **values: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def refused(pattern: str):
    return pytest.raises(InputError, match=pattern)


def named(family: str) -> list[str]:
    return list(FAMILIES[family].shapes())


def missing(family: str, names: list[str]) -> list[tuple[str, int]]:
    found = FAMILIES[family]
    return missing_tensors(
        names, found.architecture, found.n_layers, dict(found.config)
    )


# Half a checkpoint.


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (".layers.2.", r"9 of 39 tensors .* 4 layers needs are missing: .*\.2\.\* \(9"),
        (".layers.3.mlp.up_proj", r"1 of 39 .* is missing: \S+3.mlp.up_proj.weight;"),
        (".layers.0.mlp.up_proj", r"is missing: model.layers.0.mlp.up_proj.weight;"),
        ("model.norm", "is missing: model.norm.weight"),
        ("embed_tokens", "is missing: model.embed_tokens.weight"),
        ("lm_head", "is missing: lm_head.weight"),
        (".layers.", "every layer"),
    ],
)
def test_half_a_checkpoint_is_refused_with_what_is_missing(gone, message, tmp_path):
    write_llama(tmp_path, n_layers=4)
    changed(tmp_path, lambda t: {k: v for k, v in t.items() if gone not in k})
    with refused(message):
        api.open_model(str(tmp_path))


@needs_llamacpp
@pytest.mark.parametrize("command", ["scan", "plan", "convert", "gguf", "no-load"])
def test_half_a_checkpoint_is_refused_by_every_command(
    command, tmp_path, monkeypatch, capsys
):
    write_llama(tmp_path / "model", n_layers=4)
    changed(
        tmp_path / "model", lambda t: {k: v for k, v in t.items() if ".2." not in k}
    )
    monkeypatch.chdir(tmp_path)
    argv = ["gguf", "--no-load"] if command == "no-load" else [command]
    assert main([*argv, "model", "-o", "out", "-q"]) == 3
    assert "half a checkpoint: 9 of 39" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_is_taken_for_half_a_checkpoint(family):
    assert missing(family, named(family)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_is_not_there_is_missing_in_every_family(family):
    names = named(family)
    last = FAMILIES[family].n_layers - 1
    kept = [n for n in names if f".{last}." not in n.partition("experts")[0]]
    assert len(kept) < len(names)
    found = missing(family, kept)
    assert any(name.endswith(f".{last}.*") for name, _ in found), found


@pytest.mark.parametrize("family", ["Qwen3-MoE", "Mixtral", "DeepSeek V2", "Jamba"])
def test_an_expert_that_is_not_there_is_missing(family):
    names = named(family)
    gone = [n for n in names if ".1." in n and ".experts.3." in n]
    assert len(gone) == 3
    found = missing(family, [n for n in names if n not in gone])
    assert sorted(name for name, _ in found) == sorted(gone)


def test_one_layer_of_a_hybrid_may_lack_what_few_have_and_not_what_all_have():
    """27 layers: the first is dense, so only what every other has is missing."""
    names = named("DeepSeek V2 Lite")
    gone = "model.layers.7.self_attn.o_proj.weight"
    assert missing("DeepSeek V2 Lite", [n for n in names if n != gone]) == [(gone, 1)]
    gone = "model.layers.0.mlp.up_proj.weight"
    assert missing("DeepSeek V2 Lite", [n for n in names if n != gone]) == []


def test_layers_that_were_left_unquantised_have_no_scales(tmp_path):
    names = [f"{n}_scale_inv" for n in named("Llama 2") if ".1." in n and "proj" in n]
    assert missing("Llama 2", named("Llama 2") + names) == []


def test_an_embedding_model_needs_no_output_matrix(tmp_path):
    write_llama(tmp_path)
    changed(tmp_path, lambda t: {k: v for k, v in t.items() if "lm_head" not in k})
    (tmp_path / "modules.json").write_text("[]")
    api.open_model(str(tmp_path))


@needs_llamacpp
@pytest.mark.parametrize("family", ["Qwen3-MoE", "OLMo 3"])
def test_llama_cpp_knows_what_names_alone_do_not(family, tmp_path, toolchain):
    """Two layers of a family that the converter maps: nothing shows which is whole."""
    write_family(tmp_path, family)
    gone = "model.layers.0.self_attn.o_proj.weight"
    changed(tmp_path, lambda t: {k: v for k, v in t.items() if k != gone})
    run = api.open_model(str(tmp_path))
    with refused("would not load a GGUF of it: tensor 'blk.0.attn_output.weight' not"):
        _ = run.layout
    with refused("would not load a GGUF of it"):
        api.scan(run)


# Leftovers.


def lora(rank: int = 4) -> Tensors:
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    return {
        f"{prefix}.lora_A.weight": bf16(rank, 64),
        f"{prefix}.lora_B.weight": bf16(64, rank),
    }


def test_an_adapter_with_a_copied_config_names_its_base_and_what_to_do(tmp_path):
    write_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "org/base"}'
    )
    write_raw(tmp_path / "adapter_model.safetensors", lora())
    with refused("is a LoRA adapter of org/base, .* `ewq gguf org/base --adapter "):
        api.open_model(str(tmp_path))


def int8(tensors: Tensors) -> Tensors:
    result = dict(tensors)
    for name, (_, shape, _) in tensors.items():
        if "_proj.weight" in name:
            result[name] = ("I8", shape, bytes(shape[0] * shape[1]))
    return result


def with_scb(tensors: Tensors) -> Tensors:
    names = [name for name in tensors if "_proj.weight" in name]
    scales = {n.replace(".weight", ".SCB"): ("F32", [1], bytes(4)) for n in names}
    return int8(tensors) | scales


def prefixed(prefix: str):
    return lambda tensors: {f"{prefix}{name}": t for name, t in tensors.items()}


def beside(*names: str):
    return lambda tensors: tensors | {name: bf16(4, 4) for name in names}


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            beside(f"{Q}.lora_A.default.weight"),
            r"an adapter beside .*\(1, .*merge_and_",
        ),
        (beside(f"{Q}.base_layer.weight"), "PEFT model .*merge_and_unload"),
        (with_scb, r"is quantised \(bitsandbytes, 8 bits: .*SCB\), and config.json"),
        (int8, r"is quantised \(14 matrices of whole numbers, such as \S+ I8\)"),
        (beside(f"{Q}.weight.absmax"), r"quantised \(bitsandbytes, 4 bits"),
        (beside(f"{Q}.qweight", f"{Q}.qzeros", f"{Q}.g_idx"), r"quantised \(GPTQ: "),
        (beside(f"{Q}.qweight", f"{Q}.qzeros"), r"quantised \(GPTQ or AWQ: "),
        (prefixed("_orig_mod."), r"compiled model \(21 names .*save model._orig_mod"),
        (prefixed("module."), r"wrapper \(21 names .*save model.module"),
        (prefixed("_fsdp_wrapped_module."), "wrapped modules"),
        (beside(f"optimizer.{Q}.exp_avg"), "states of an optimiser"),
        (beside(f"ema.{Q}.weight"), "averaged copies of weights"),
        (beside("v_head.summary.weight"), "value head"),
        (beside("model.nonsense.weight"), "has no place in a GGUF of LlamaForCausalLM"),
    ],
)
def test_leftovers_are_called_by_their_name(change, message, tmp_path):
    changed(write_llama(tmp_path), change)
    with refused(message):
        api.open_model(str(tmp_path))


def test_more_layers_than_the_config_says_are_told_as_such(tmp_path):
    edit_config(write_llama(tmp_path, n_layers=4), num_hidden_layers=2)
    with refused(r"says 2 layers, the weights have 4: model.layers.2.\S+ and 17 more"):
        api.open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("__0_0.distcp", r"shards of a training run \(FSDP\); .*merge-weights"),
        ("global_step500", r"training run's states \(DeepSpeed\); .*zero_to_fp32"),
        ("pytorch_model.bin", r"holds pickles \(pytorch_model.bin\)"),
    ],
)
def test_a_training_runs_files_are_told_from_a_checkpoint(name, message, tmp_path):
    write_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with refused(message):
        api.open_model(str(tmp_path))


# Buffers.


def buffers(n_layers: int = 2) -> Tensors:
    kinds = [("mask", "BOOL", 1), ("causal", "U8", 1), ("q8", "I8", 1)]
    kinds += [("position_ids", "I64", 8), ("table", "U32", 4)]
    return {
        f"model.layers.{i}.{name}": (dtype, [4, 4], bytes(16 * size))
        for i in range(n_layers)
        for name, dtype, size in kinds
    }


@needs_llamacpp
@pytest.mark.parametrize("family", [None, "Qwen3-MoE", "GPT-2 with masks"])
def test_buffers_are_left_out_and_told_whoever_maps_the_names(
    family, tmp_path, toolchain
):
    folder = tmp_path / "model"
    write_family(folder, family) if family else write_llama(folder)
    if family != "GPT-2 with masks":
        changed(folder, lambda tensors: tensors | buffers())
    said: list[str] = []

    class Told(api.Silent):
        def note(self, text: str) -> None:
            said.append(text)

    run = api.open_model(str(folder), progress=Told())
    names = {tensor.name for tensor in buffers_of(run.checkpoint)}
    assert len(names) == (2 if family == "GPT-2 with masks" else 10)
    assert set(api.scan(run).dropped) == names
    assert any(f"leaves out {len(names)} tensors of" in text for text in said)
    base, layout = api.base_file(run), run.layout
    assert [t.name for t in read_gguf(base).tensors] == [t.name for t in layout.tensors]


# F16.


def spoiled(folder: Path, name: str, index: int, value: float) -> Path:
    def change(tensors: Tensors) -> Tensors:
        dtype, shape, data = tensors[name]
        values = np.frombuffer(data, np.uint16 if dtype == "BF16" else np.float32)
        values = values.copy()
        code = np.float32(value)
        values[index] = code.view(np.uint32) >> 16 if dtype == "BF16" else code
        return tensors | {name: (dtype, shape, values.tobytes())}

    return changed(folder, change)


@pytest.mark.parametrize(
    ("dtype", "value", "is_found"),
    [
        ("BF16", 65280.0, False),
        ("BF16", 65536.0, True),
        ("BF16", -1e6, True),
        ("F32", 65504.0, False),
        ("F32", np.nextafter(np.float32(F16_INFINITE), np.float32(0)), False),
        ("F32", F16_INFINITE, True),
        ("F32", np.inf, False),
        ("BF16", np.nan, False),
        ("F16", 1.0, False),
    ],
)
def test_a_weight_overflows_where_numpy_makes_it_infinite(
    dtype, value, is_found, tmp_path
):
    name = "model.layers.1.mlp.up_proj.weight"
    write_llama(tmp_path, dtype=dtype)
    if dtype != "F16":
        spoiled(tmp_path, name, 77, value)
    checkpoint = open_checkpoint(str(tmp_path))
    found = list(find_overflows(checkpoint, {t.name for _, t in checkpoint.tensors}))
    assert [(o.tensor.name, o.index) for o in found] == [(name, 77)] * is_found
    with np.errstate(over="ignore"):
        rounded = np.float32(value).astype(np.float16)
    assert is_found == bool(np.isinf(rounded) and np.isfinite(value))


@needs_llamacpp
@pytest.mark.parametrize(
    "argv",
    [
        ["convert", "--outtype", "f16"],
        ["gguf", "--raw-type", "f16"],
        ["plan", "--raw-type", "f16"],
        ["gguf", "--policy", "uniform:raw", "--raw-type", "f16"],
    ],
    ids=" ".join,
)
def test_a_weight_beyond_f16_is_refused_before_the_work(
    argv, tmp_path, monkeypatch, capsys
):
    name = "model.embed_tokens.weight"
    spoiled(write_llama(tmp_path / "model"), name, 77, 1e6)
    monkeypatch.chdir(tmp_path)
    assert main([argv[0], "model", *argv[1:], "-o", "out", "-q"]) == 3
    said = capsys.readouterr().err
    assert f"{name} (token_embd.weight) holds 999424 at index 77, F16 ends" in said
    assert not Path("out").exists()


@needs_llamacpp
def test_what_stays_in_f32_may_hold_any_weight(tmp_path, monkeypatch):
    spoiled(write_llama(tmp_path / "model"), "model.norm.weight", 3, 1e6)
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "model", "--outtype", "f16", "-o", "out", "-q"]) == 0


# Encoders.


def write_sentencepiece(path: Path, **special: Any) -> None:
    import sentencepiece

    words = "the quick brown fox jumps over a lazy dog while nobody measures".split()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words[i:] + words) for i in range(11)] * 20),
        model_writer=model,
        vocab_size=100,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=2,
        **special,
    )
    path.write_bytes(model.getvalue())


def write_t5(folder: Path) -> Path:
    """A random T5 whose only tokenizer file is spiece.model."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": 320,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 32,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "is_encoder_decoder": True,
        "feed_forward_proj": "relu",
        "layer_norm_epsilon": 1e-6,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "eos_token": "</s>"})
    )
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    write_sentencepiece(folder / "spiece.model", **special)
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (320, 64)}
    for side, parts in (("encoder", 2), ("decoder", 3)):
        for i in range(2):
            block = f"{side}.block.{i}.layer"
            for n, part in enumerate(["SelfAttention", "EncDecAttention"][: parts - 1]):
                for role in "qkvo":
                    shapes[f"{block}.{n}.{part}.{role}.weight"] = (64, 64)
            ffn = f"{block}.{parts - 1}.DenseReluDense"
            shapes |= {f"{ffn}.wi.weight": (128, 64), f"{ffn}.wo.weight": (64, 128)}
            for n in range(parts):
                shapes[f"{block}.{n}.layer_norm.weight"] = (64,)
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shapes |= {bias: (32, 4), f"{side}.final_layer_norm.weight": (64,)}
    return write_random(folder, shapes)


def write_reranker(folder: Path, *, is_reranker: bool) -> Path:
    """A random XLM-RoBERTa, with a classifier's head or as an embedding model."""
    folder.mkdir(parents=True)
    kind = "ForSequenceClassification" if is_reranker else "Model"
    config = {
        "architectures": [f"XLMRoberta{kind}"],
        "model_type": "xlm-roberta",
        "vocab_size": 320,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "pad_token_id": 1,
        "max_position_embeddings": 66,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "id2label": {"0": "LABEL_0"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "XLMRobertaTokenizer"})
    )
    special = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    write_sentencepiece(folder / "sentencepiece.bpe.model", **special)
    prefix = "roberta." if is_reranker else ""
    embeddings = f"{prefix}embeddings"
    shapes: dict[str, tuple[int, ...]] = {
        f"{embeddings}.word_embeddings.weight": (320, 64),
        f"{embeddings}.position_embeddings.weight": (66, 64),
        f"{embeddings}.token_type_embeddings.weight": (1, 64),
        **{f"{embeddings}.LayerNorm.{x}": (64,) for x in ("weight", "bias")},
    }
    matrices = {
        **{f"attention.self.{x}": (64, 64) for x in ("query", "key", "value")},
        "attention.output.dense": (64, 64),
        "intermediate.dense": (128, 64),
        "output.dense": (64, 128),
    }
    for i in range(2):
        layer = f"{prefix}encoder.layer.{i}"
        for name, shape in matrices.items():
            shapes |= {f"{layer}.{name}.weight": shape}
            shapes |= {f"{layer}.{name}.bias": shape[:1]}
        for name in ("attention.output", "output"):
            for x in ("weight", "bias"):
                shapes[f"{layer}.{name}.LayerNorm.{x}"] = (64,)
    if is_reranker:
        for name, rows in (("dense", 64), ("out_proj", 1)):
            shapes[f"classifier.{name}.weight"] = (rows, 64)
            shapes[f"classifier.{name}.bias"] = (rows,)
    else:
        modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
        (folder / "modules.json").write_text(
            json.dumps(
                [
                    {"path": path, "type": f"sentence_transformers.models.{name}"}
                    for path, name in modules
                ]
            )
        )
        for path, values in (
            ("1_Pooling", {"pooling_mode_cls_token": True}),
            ("2_Dense", {"in_features": 64}),
        ):
            (folder / path).mkdir()
            (folder / path / "config.json").write_text(json.dumps(values))
        (folder / "2_Dense" / "model.safetensors").write_bytes(b"")
    return write_random(folder, shapes)


def write_random(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    rng = np.random.default_rng(0)
    tensors: Tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32) * np.float32(0.05)
        values += np.float32(len(shape) == 1 and name.endswith("weight"))
        codes = (values.view(np.uint32) >> 16).astype(np.uint16)
        tensors[name] = ("BF16", list(shape), codes.tobytes())
    write_raw(folder / "model.safetensors", tensors)
    return folder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("encoders")
    write_t5(folder / "t5")
    write_reranker(folder / "embed", is_reranker=False)
    write_reranker(folder / "rerank", is_reranker=True)
    return folder


@needs_llamacpp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said", "keys"),
    [
        ("t5", "", {"general.architecture": "t5"}),
        ("embed", " -> embedding of 64 numbers", {"bert.pooling_type": 2}),
        ("rerank", " -> score of 1 number", {"general.architecture": "bert"}),
    ],
)
def test_an_encoder_is_made_loaded_and_used_for_what_it_can(
    name, said, keys, encoders, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    made = api.make_gguf(str(encoders / name), Path("out.gguf"))
    assert made.verification.answer is not None
    assert said in made.verification.answer
    assert keys.items() <= dict(read_gguf(Path("out.gguf")).kv).items()
    assert main(["bench", "out.gguf", "-o", "r.json", "-q"]) == 3
    assert "does not write one token after another" in capsys.readouterr().err


@pytest.mark.parametrize("side", ["encoder.block.1.", "decoder.block.1."])
def test_both_sides_of_an_encoder_decoder_have_to_be_whole(side, encoders, tmp_path):
    folder = Path(shutil.copytree(encoders / "t5", tmp_path / "t5"))
    changed(folder, lambda t: {k: v for k, v in t.items() if not k.startswith(side)})
    with refused(rf"{side.replace('.', '[.]')}[*] \("):
        api.open_model(str(folder))


def test_modules_beyond_the_gguf_are_told_and_their_small_files_taken(encoders):
    checkpoint = open_checkpoint(str(encoders / "embed"))
    assert {"1_Pooling/config.json", "2_Dense/config.json"} <= set(
        checkpoint.small_files
    )
    assert any("without the modules 2_Dense (Dense)" in n for n in checkpoint.notes)


@pytest.mark.parametrize("path", ["../x", "/etc", "a/b", "..", ".hidden"])
def test_a_module_outside_the_folder_is_refused(path, tmp_path):
    write_llama(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"path": path, "type": "x"}]))
    with refused("needed is a folder's name"):
        open_checkpoint(str(tmp_path))


def test_a_link_in_a_subfolder_that_leaves_the_checkpoint_is_refused(tmp_path):
    folder = write_llama(tmp_path / "model")
    (tmp_path / "secret.jinja").write_text("x")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "a.jinja").symlink_to(
        tmp_path / "secret.jinja"
    )
    with refused("is a link that leaves the folder"):
        open_checkpoint(str(folder))


@needs_llamacpp
def test_a_classifier_that_the_converter_has_no_place_for_is_told_as_such(tmp_path):
    edit_config(write_llama(tmp_path), architectures=["LlamaForSequenceClassification"])
    with refused("is a classifier, .* no place for its head; it takes BertForSeq"):
        api.open_model(str(tmp_path))


# What is asked of a model.


@needs_llamacpp
def test_a_context_beyond_the_models_is_refused_first(tiny, tmp_path, capsys):
    argv = ["bench", str(tiny.base), "--ctx", "513", "-o", str(tmp_path / "r.json")]
    assert main([*argv, "-q"]) == 2
    assert "made for 512 tokens of context, 513 are" in capsys.readouterr().err


# The converter's words.


def failed(output: str) -> ChildError:
    error = ChildError("convert", "python", "exit code 1", "its log is x")
    error.return_code, error.output = 1, output
    return error


TRACEBACK = """Traceback (most recent call last):
  File "convert_hf_to_gguf.py", line 1, in <module>
    main()
"""


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("ValueError: Can not map tensor 'model.x.weight'", "model.x.weight has no pl"),
        ("ValueError: Can not map tensor 'model.layers.9.x'", "says 2 layers, .* 10: "),
        ("    y = self.hparams['a']\nKeyError: 'a'", "config.json has no 'a'"),
        (
            "NotImplementedError: BPE pre-tokenizer",
            "refuses it: NotImplementedError: B",
        ),
        ("FileNotFoundError: File not found: /a/b.ewq/m/spiece.model", "nd: spiece.mo"),
        ("    assert x == 3\nAssertionError", r"AssertionError \(assert x == 3\)"),
    ],
)
def test_a_converters_traceback_is_one_line_with_its_reason(end, message, tmp_path):
    checkpoint = open_checkpoint(str(write_llama(tmp_path)))
    error = converter_error(checkpoint, failed(TRACEBACK + end))
    assert isinstance(error, InputError)
    with refused(message):
        raise error


def test_what_is_not_about_the_checkpoint_stays_a_childs_failure(tmp_path):
    checkpoint = open_checkpoint(str(write_llama(tmp_path)))
    for end in ("ModuleNotFoundError: No module named 'torch'", "MemoryError"):
        error = failed(TRACEBACK + end)
        assert converter_error(checkpoint, error) is error


def test_the_converters_warnings_are_said_once_and_few():
    lines = [f"WARNING:hf-to-gguf:ignore token {n}: out of range" for n in range(99)]
    lines += ["INFO:hf-to-gguf:fine", "WARNING:hf-to-gguf:** WARNING: not recognized!"]
    lines += ["x.py:1: RuntimeWarning: overflow encountered in cast"]
    assert converter_warnings("\n".join(lines)) == [
        "ignore token 0: out of range",
        "WARNING: not recognized!",
        "RuntimeWarning: overflow encountered in cast",
    ]
    many = "\n".join(f"WARNING:hf-to-gguf:kind {'x' * n}" for n in range(1, 9))
    assert converter_warnings(many)[5:] == ["3 more warnings"]


# Names.

HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (f"/c/models--org--name/snapshots/{HASH}", "name"),
        (f"/models/llama/{HASH}", "llama"),
        (f"/models/llama/snapshots/{HASH}/", "llama"),
        ("/models/my-model/", "my-model"),
        (f"/{HASH}", "model"),
        ("/", "model"),
    ],
)
def test_a_models_name_is_no_hash(path, name):
    assert model_name(Path(path)) == name


def test_a_snapshot_of_the_hubs_cache_has_the_repositorys_name(tmp_path, monkeypatch):
    folder = tmp_path / "models--org--name" / "snapshots" / HASH
    write_llama(folder)
    assert open_checkpoint(str(folder)).identity.name == "name"
    monkeypatch.chdir(folder)
    assert open_checkpoint(".").identity.name == "name"
    assert open_checkpoint("model.safetensors").identity.name == "name"

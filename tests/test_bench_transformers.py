"""transformers and bitsandbytes behind the bench's scorer, on real models."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest

from ewq_gguf.api import Run, base_file, for_transformers, scan
from ewq_gguf.api import plan as make_plan
from ewq_gguf.bench.engines import precision
from ewq_gguf.bench.engines.precision import (
    SAVED_NAME,
    AppliedPlan,
    library_versions,
    precision_of,
    precisions_of,
)
from ewq_gguf.bench.engines.saving import save_quantised
from ewq_gguf.bench.engines.scorer import Batch
from ewq_gguf.bench.files import identify
from ewq_gguf.bench.job import MemoryUse
from ewq_gguf.bench.questions.datafile import read_text
from ewq_gguf.bench.runner import CPU_SETUP, Request, bench_file, is_result_of
from ewq_gguf.bench.texts.quality import Named, check_comparable, score_text
from ewq_gguf.bench.texts.summary import text_result
from ewq_gguf.bench.texts.windows import Windows, chunks_of
from ewq_gguf.checkpoint.demo import demo_checkpoint
from ewq_gguf.checkpoint.mapping import map_tensors
from ewq_gguf.checkpoint.source import open_checkpoint
from ewq_gguf.cli import main
from ewq_gguf.errors import InputError, ToolError, UsageError, VerificationError
from ewq_gguf.ggml_types import PLANNABLE
from ewq_gguf.llamacpp.layout import layout_of
from ewq_gguf.records import BenchSetup, Result, UniformPolicy, load_record
from tests.bench_models import Table, check_protocol
from tests.checkpoints import write_llama
from tests.gguf_files import Tiny, using_cache, with_types

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [pytest.mark.llamacpp, pytest.mark.usefixtures("own_cache")]

#: One thread: torch's wait for each other where others have the CPU.
SETUP = CPU_SETUP.model_copy(update={"n_threads": 1})
PROSE = "the quick brown fox jumps over a lazy dog while entropy is measured "


def silent(_share: float, _use: MemoryUse) -> None:
    pass


def kld_of(result: Result) -> float:
    assert result.kld_mean_nats is not None
    return result.kld_mean_nats


def load(folder: Path, precisions=None, setup: BenchSetup = SETUP):
    from ewq_gguf.bench.engines.transformers_model import TransformersModel

    return TransformersModel(folder, setup, precisions or {})


def logits_of(model, n_tokens: int = 20):
    tokens = np.arange(5, 5 + n_tokens, dtype=np.int32)
    with model.scorer(64) as scorer:
        return scorer.evaluate(Batch.of(tokens, 0, n_outputs=n_tokens))


def with_config(folder: Path, name: str = "config.json", **changes) -> Path:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, session_cache, toolchain) -> Tiny:
    """Two BF16 layers whose config says what engines take for granted differently."""
    folder = write_llama(tmp_path_factory.mktemp("tiny") / "tiny-BOS")
    with_config(folder, "tokenizer_config.json", add_bos_token=True)
    with using_cache(session_cache):
        checkpoint = open_checkpoint(str(folder))
        layout = layout_of(checkpoint, toolchain)
        base = base_file(Run(checkpoint))
        return Tiny(folder, checkpoint, scan(Run(checkpoint)), layout, base)


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Path:
    """A tiny Llama in 32 bits, where ways to the same number differ little."""
    folder = tmp_path_factory.mktemp("exact") / "exact"
    return with_config(write_llama(folder, dtype="F32"), dtype="float32")


@pytest.fixture(scope="module")
def layers(exact) -> dict[str, str]:
    """All matrices of the tiny Llama but its embedding, by their tensors' names."""
    names = [tensor.name for _, tensor in open_checkpoint(str(exact)).tensors]
    return {n: "nf4" for n in names if "_proj" in n or "lm_head" in n}


@pytest.fixture
def request_of(tmp_path, tiny):
    text = tmp_path / "prose.txt"
    text.write_text(PROSE * 60)

    def make(*tasks, **changes):
        request = Request(
            tasks=tasks,
            base=tiny.base,
            texts=(("prose", text),),
            setup=SETUP,
            n_ctx=64,
            n_chunks=4,
            n_prompt=32,
            n_generated=4,
            n_repeats=1,
        )
        return replace(request, **changes)

    return make


def applied(folder: Path, types: dict[str, str], *, name: str = "tiny.bnb"):
    return AppliedPlan(name, "0" * 64, types)  # type: ignore[arg-type]


# The protocol


def test_a_table_keeps_the_protocol():
    check_protocol(Table(), 0.0)


def test_llama_cpp_keeps_the_protocol(tiny):
    llama = pytest.importorskip("ewq_gguf.bench.engines.llama")
    # Keys and values are rounded to 16 bits, in batches of other shapes.
    check_protocol(llama.LlamaModel(tiny.base, SETUP, llama.Log()), 0.02)


def test_transformers_keeps_the_protocol(exact):
    check_protocol(load(exact), 1e-5)


def test_a_quantised_model_keeps_the_protocol(exact, layers):
    # bitsandbytes' own kernels on some CPUs compute in 16 bits.
    check_protocol(load(exact, layers), 0.02)


def test_a_sliding_window_slides_over_what_is_held(exact, tmp_path):
    folder = tmp_path / "sliding"
    folder.mkdir()
    for file in exact.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with_config(
        folder,
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        sliding_window=6,
    )

    assert not np.allclose(logits_of(load(folder)), logits_of(load(exact)), atol=1e-4)
    check_protocol(load(folder), 1e-5)


def test_a_full_context_is_refused(exact):
    from ewq_gguf.errors import ResourceError

    tokens = np.arange(5, 15, dtype=np.int32)
    with load(exact).scorer(16, n_sequences=3) as scorer:
        scorer.evaluate(Batch.of(tokens, 0))
        # A copy takes no room of its own.
        scorer.copy(0, 1)
        scorer.evaluate(Batch.of(tokens[:6], 10, 1))
        with pytest.raises(ResourceError, match="context of 16"):
            scorer.evaluate(Batch.of(tokens[:1], 16, 1))


# The tokenizer


def test_the_built_in_model_is_tokenised_as_llama_cpp_does(toolchain):
    llama = pytest.importorskip("ewq_gguf.bench.engines.llama")
    base = base_file(Run("demo"))
    theirs = llama.LlamaModel(base, SETUP, llama.Log())
    ours = load(demo_checkpoint())
    text = (
        PROSE * 5
        + "\n x\t\t12345 äöü 日本語 🙂 <|im_start|> don't  \r\n\n<|x|> = a ;\n"
    )

    assert (ours.add_bos, ours.bos) == (theirs.add_bos, theirs.bos)
    for special in (False, True):
        found = ours.tokenize(text, special=special)
        np.testing.assert_array_equal(found, theirs.tokenize(text, special=special))
        assert ours.detokenize(found) == theirs.detokenize(found) == text
    ends = [token for token in range(20) if ours.is_end(token)]
    # llama.cpp also ends where a model names a repository.
    assert ends == [0, 2]
    assert all(theirs.is_end(token) for token in ends)


def test_the_tiny_models_spaces_survive_tokens(tiny):
    llama = pytest.importorskip("ewq_gguf.bench.engines.llama")
    theirs = llama.LlamaModel(tiny.base, SETUP, llama.Log())
    ours = load(tiny.folder)

    tokens = ours.tokenize(PROSE)
    np.testing.assert_array_equal(tokens, theirs.tokenize(PROSE))
    assert ours.add_bos == theirs.add_bos
    # The middle of an answer keeps the space it begins with.
    assert ours.detokenize(tokens[1:]) == theirs.detokenize(tokens[1:])


# Plans


@pytest.mark.parametrize("ggml_type", PLANNABLE)
def test_types_of_seven_bits_and_more_are_int8_and_fewer_are_nf4(ggml_type):
    expected = {"F32": None, "F16": None, "BF16": None, "Q8_0": "int8"}

    assert precision_of(ggml_type) == expected.get(ggml_type, "nf4")


def test_a_plan_becomes_modules_one_by_one(tiny):
    import bitsandbytes as bnb

    types = {
        "blk.0.attn_q.weight": "Q4_K",
        "blk.0.attn_v.weight": "Q8_0",
        "blk.1.ffn_down.weight": "Q6_K",
        "blk.1.ffn_up.weight": "Q8_0",
        "output.weight": "Q8_0",
        "token_embd.weight": "Q8_0",
    }
    raw = make_plan(Run(tiny.checkpoint), UniformPolicy(ggml_type="raw"))
    mixed = with_types(raw, tiny.layout, types)
    tensors, _ = map_tensors(tiny.checkpoint)

    precisions = precisions_of(mixed, tensors)
    assert precisions == {
        "model.layers.0.self_attn.q_proj.weight": "nf4",
        "model.layers.0.self_attn.v_proj.weight": "int8",
        "model.layers.1.mlp.down_proj.weight": "nf4",
        "model.layers.1.mlp.up_proj.weight": "int8",
        "lm_head.weight": "int8",
        "model.embed_tokens.weight": "int8",
    }
    model = load(tiny.folder, precisions)
    modules = dict(model._model.named_modules())
    kinds = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}
    quantised = {
        f"{name}.weight": kind
        for name, module in modules.items()
        for kind, layer in kinds.items()
        if isinstance(module, layer)
    }
    kept = precisions.pop("model.embed_tokens.weight")
    assert kept
    assert quantised == precisions
    assert modules["lm_head"].state.threshold == 6.0
    assert not modules["lm_head"].state.has_fp16_weights
    counts = {"int8": 3, "nf4": 2, "raw": 10, "kept_raw": 1}
    assert model.engine.n_modules == counts
    # An int8 row has a scale in 32 bits; 64 nf4 weights share one.
    assert model.engine.weights_bytes is not None
    assert model.engine.weights_bytes < load(tiny.folder).engine.weights_bytes


def test_one_tensor_cannot_be_two_precisions(tiny):
    raw = make_plan(Run(tiny.checkpoint), UniformPolicy(ggml_type="raw"))
    types = {"blk.0.attn_q.weight": "Q4_K", "blk.0.attn_k.weight": "Q8_0"}
    mixed = with_types(raw, tiny.layout, types)
    tensors = {tensor.name: tensor for tensor in map_tensors(tiny.checkpoint)[0]}
    q, k = (tensors[name] for name in types)
    fused = replace(k, regions=q.regions)

    with pytest.raises(InputError, match=r"q_proj\.weight: becomes several tensors"):
        precisions_of(mixed, [q, fused])
    with pytest.raises(InputError, match="made of no tensor"):
        precisions_of(mixed, [q])


def test_what_is_no_linear_module_is_refused(exact):
    with pytest.raises(InputError, match="LlamaRMSNorm in transformers"):
        load(exact, {"model.norm.weight": "int8"})
    with pytest.raises(InputError, match="no module in transformers"):
        load(exact, {"model.layers.9.mlp.up_proj.weight": "int8"})


def test_a_checkpoint_with_a_tensor_too_few_is_refused(tmp_path):
    folder = write_llama(tmp_path / "short", n_layers=1)

    with pytest.raises(VerificationError, match="missing in the checkpoint"):
        load(with_config(folder, num_hidden_layers=2))


# Devices and libraries


@pytest.mark.fault(92)
def test_cuda_that_is_not_there_is_no_silent_cpu(exact, request_of):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    setup = SETUP.model_copy(update={"device": "cuda"})

    with pytest.raises(ToolError, match="finds no CUDA device"):
        bench_file(exact, request_of("perplexity", setup=setup), silent)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_gpu_layers": 4},
        {"tensor_split": (1.0,)},
        {"rpc": ("10.0.0.1:1",)},
        {"cache_type_k": "q8_0"},
        {"device": "Vulkan0"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_only_llama_cpp_has_is_refused(exact, changes):
    with pytest.raises(UsageError):
        load(exact, setup=SETUP.model_copy(update=changes))


def test_a_missing_library_says_how_to_get_it(monkeypatch):
    def version(name):
        if name == "bitsandbytes":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(precision, "version", version)

    assert library_versions(needs_bitsandbytes=False) == "transformers 1.0, torch 1.0"
    with pytest.raises(ToolError, match=r"pip install 'ewq-gguf\[bnb\]'"):
        library_versions(needs_bitsandbytes=True)


# Measuring


def test_fewer_bits_diverge_more_from_the_same_base(request_of, tiny):
    names = [tensor.name for _, tensor in tiny.checkpoint.tensors]
    matrices = [name for name in names if "_proj" in name]
    found = {}
    for kind in ("raw", "int8", "nf4"):
        plan = applied(tiny.folder, dict.fromkeys(matrices, kind))
        request = request_of("perplexity", "kld", plan=None if kind == "raw" else plan)
        found[kind] = bench_file(tiny.folder, request, silent)

    klds = [kld_of(found[kind]) for kind in ("raw", "int8", "nf4")]
    assert klds[0] < klds[1] < klds[2]
    sizes = [found[kind].size_bytes for kind in ("raw", "int8", "nf4")]
    assert sizes[0] > sizes[1] > sizes[2]
    assert found["raw"].engine.n_modules == {}
    assert found["nf4"].engine.n_modules == {"nf4": 14, "raw": 1}
    assert found["nf4"].file.name == "tiny.bnb"
    assert found["nf4"].file.sha256 != found["raw"].file.sha256
    assert found["nf4"].parameters.plan_sha256 == "0" * 64


def test_a_checkpoint_against_itself_diverges_by_exactly_nothing(request_of, tiny):
    request = request_of("kld", base=tiny.folder)
    found = bench_file(tiny.folder, request, silent)

    assert found.texts[0].kld is not None
    assert found.texts[0].kld.kld_max_nats == 0.0
    assert found.engine.name == "transformers"
    assert is_result_of(found, tiny.folder, request)
    assert not is_result_of(found, tiny.folder, replace(request, base=tiny.base))


def test_speed_and_memory_of_a_quantised_model(request_of, tiny):
    plan = applied(tiny.folder, {"lm_head.weight": "int8"})
    found = bench_file(tiny.folder, request_of("speed", "memory", plan=plan), silent)

    assert found.speed is not None
    assert found.memory is not None
    assert min(found.speed.prompt_tps, found.speed.generation_tps) > 0
    assert found.memory.weights_bytes == found.size_bytes
    # 36 tokens in 2 layers: keys and values of 2 heads of 16 numbers in 16 bits.
    assert found.memory.kv_bytes == 36 * 2 * 2 * 2 * 16 * 2
    assert found.memory.device_bytes == 0


def test_memory_of_a_checkpoint_that_ran_out_is_said_with_its_size(tiny):
    from ewq_gguf.bench.job import is_out_of_memory, too_large

    said = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    assert is_out_of_memory(said)
    assert "its weights alone are 0.0 GB" in str(too_large(tiny.folder, "is large"))


# Saved


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_saved_model_computes_the_same_bits(tmp_path, is_tied):
    folder = write_llama(tmp_path / "model", tied=is_tied)
    names = [tensor.name for _, tensor in open_checkpoint(str(folder)).tensors]
    matrices = [name for name in names if "_proj" in name]
    kinds = {name: ("nf4", "int8")[i % 2] for i, name in enumerate(matrices)}
    plan, out = applied(folder, kinds), tmp_path / "saved"

    assert save_quantised(folder, plan, SETUP, out, force=False)
    assert not save_quantised(folder, plan, SETUP, out, force=False)
    in_memory, saved = load(folder, kinds), load(out)
    np.testing.assert_array_equal(logits_of(saved), logits_of(in_memory))
    assert saved.engine == in_memory.engine
    # The file holds what is in memory, and a header.
    file_bytes = (out / SAVED_NAME).stat().st_size
    assert saved.engine.weights_bytes is not None
    assert 0 < file_bytes - saved.engine.weights_bytes < 50_000
    other = applied(folder, dict.fromkeys(matrices, "int8"))
    with pytest.raises(UsageError, match="made from other inputs"):
        save_quantised(folder, replace(other, sha256="1" * 64), SETUP, out, force=False)
    assert save_quantised(
        folder, replace(other, sha256="1" * 64), SETUP, out, force=True
    )
    assert load(out).engine.n_modules["int8"] == len(matrices)


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path):
    folder = write_llama(tmp_path / "model")
    plan, out = applied(folder, {"lm_head.weight": "int8"}), tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.tex").write_text("In the beginning")

    with pytest.raises(UsageError):
        save_quantised(folder, plan, SETUP, out, force=True)
    assert (out / "chapter1.tex").exists()


def test_weights_of_another_model_are_refused(tmp_path):
    folder = write_llama(tmp_path / "model", n_layers=1)
    out = tmp_path / "saved"
    plan = applied(folder, {"lm_head.weight": "int8"})
    save_quantised(folder, plan, SETUP, out, force=False)

    with pytest.raises(VerificationError, match="does not fit its config"):
        load(with_config(out, num_hidden_layers=2))


# The command line


def test_the_command_measures_in_memory_and_saved(tiny, request_of, tmp_path, capsys):
    text = request_of("kld").texts[0][1]
    plan, out = tmp_path / "mix.json", tmp_path / "result.json"
    record = make_plan(Run(tiny.checkpoint), UniformPolicy(ggml_type="Q8_0"))
    plan.write_text(record.to_json())
    argv = ["bench", str(tiny.folder), "--backend", "bnb", "--base", str(tiny.base),
            "--text", f"prose={text}", "--ctx", "64", "--chunks", "2",
            "--tasks", "kld", "--threads", "1"]  # fmt: skip
    planned = [*argv, "--plan", str(plan)]

    assert main([*planned, "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "mix.bnb" in printed
    assert "15 int8, 1 kept_raw" in printed
    first = load_record(Result, out, "test")
    assert first.parameters.plan_sha256 == record.sha256
    assert main([*planned, "-o", str(out)]) == 0
    assert "still valid" in capsys.readouterr().err
    saved = tmp_path / "saved"
    assert main([*planned, "--save", str(saved), "-o", str(tmp_path / "s.json")]) == 0
    argv[1] = str(saved)
    assert main([*argv, "-o", str(tmp_path / "t.json")]) == 0
    second, third = (
        load_record(Result, tmp_path / name, "test") for name in ("s.json", "t.json")
    )
    assert second == third
    assert second.kld_mean_nats == first.kld_mean_nats
    assert second.size_bytes == first.size_bytes


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        pytest.param(["--plan", "p.json"], 2, "for --backend bnb", id="llama"),
        pytest.param([], 2, "is a folder", id="folder"),
        pytest.param(["--backend", "bnb", "--save", "d"], 2, "needs a plan", id="save"),
        pytest.param(["x", "--backend", "bnb"], 2, "takes one", id="two"),
        pytest.param(
            ["--backend", "bnb", "--plan", "p.json"], 3, "cannot be read", id="no plan"
        ),
    ],
)
def test_options_that_do_not_go_together(exact, options, code, message, capsys):
    argv = ["bench", str(exact), "--tasks", "speed", *options]

    assert main(argv) == code
    assert message in capsys.readouterr().err


def test_models_that_transformers_does_not_load(exact, tiny, request_of):
    with pytest.raises(UsageError, match="is a GGUF file"):
        for_transformers(Run(str(tiny.base)), None)
    with pytest.raises(UsageError, match="give its folder"):
        for_transformers(Run(str(exact / "model.safetensors")), None)
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        identify(exact.parent)


def test_a_plan_of_another_checkpoint_is_refused(exact, tiny, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(
        make_plan(Run(tiny.checkpoint), UniformPolicy(ggml_type="Q8_0")).to_json()
    )

    with pytest.raises(InputError, match="the plan is for checkpoint"):
        for_transformers(Run(str(exact)), path)


# The built-in model


@pytest.mark.slow
def test_the_built_in_model_is_the_same_in_both_engines(toolchain):
    llama = pytest.importorskip("ewq_gguf.bench.engines.llama")
    folder = os.environ.get("EWQ_TEXT_DIR")
    path = Path(folder or "", "wikitext-2-raw", "wiki.test.raw")
    if not folder or not path.is_file():
        pytest.skip("EWQ_TEXT_DIR names no folder with wikitext-2-raw/wiki.test.raw")
    checkpoint = open_checkpoint("demo")
    base_path = base_file(Run(checkpoint))
    base = Named(base_path, llama.LlamaModel(base_path, SETUP, llama.Log()))
    names = [t.name for _, t in checkpoint.tensors if "_proj" in t.name]
    text = read_text(path)[:20_000]

    def windows_of(model) -> Windows:
        return Windows(chunks_of(model, text, 256, path).windows[:3])

    found = {}
    for kind in ("raw", "int8", "nf4"):
        precisions = {} if kind == "raw" else dict.fromkeys(names, kind)
        model = Named(checkpoint.folder, load(checkpoint.folder, precisions))
        windows = windows_of(model.model)
        check_comparable(model, base, windows, windows_of(base.model))
        parts = [p for _, p in score_text(model, base, windows, 256, lambda i: False)]
        found[kind] = text_result("wikitext", [p for p in parts if p], 0)

    raw, int8, nf4 = (found[kind].kld for kind in ("raw", "int8", "nf4"))
    assert raw is not None
    assert int8 is not None
    assert nf4 is not None
    # Activations are rounded to BF16 in one engine, not in the other.
    assert found["raw"].ppl == pytest.approx(raw.base_ppl, rel=0.01)
    assert raw.kld_mean_nats < 0.003
    assert raw.kld_mean_nats < int8.kld_mean_nats < 0.06
    assert int8.kld_mean_nats < nf4.kld_mean_nats < 0.4

"""llama.cpp's own words are the reason of what it cannot load or compute."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from ewq_gguf.bench.runner import Request, bench_file
from ewq_gguf.errors import ChildError
from ewq_gguf.llamacpp.calibrate import calibrate
from ewq_gguf.llamacpp.logs import child_log, engine_reason
from ewq_gguf.llamacpp.verify import PROMPT
from ewq_gguf.process import python_argv, run

pytest_plugins = ["tests.toolchain_fixtures"]

LACKING = "blk.1.ffn_up.weight"
NEGATIVE = {"llama.attention.layer_norm_rms_epsilon": -1.0}
#: Of each way to break a file the words that llama.cpp has for it.
WORDS = {
    "a tensor is missing": f"tensor '{LACKING}' not found",
    "a key is missing": "key not found in model: llama.context_length",
    "a key is wrong": "invalid n_rot: 1000, expected 16",
    "it is cut": "data is not within the file bounds, model is corrupted",
    "it is none": "bad GGUF version: 0",
    "it aborts": "ops.cpp:",
}


@pytest.fixture(scope="module")
def broken(tiny, tmp_path_factory) -> dict[str, Path]:
    """Files that llama.cpp refuses or aborts on."""
    folder = tmp_path_factory.mktemp("broken")
    paths = {name: folder / f"{i}.gguf" for i, name in enumerate(WORDS)}
    names = iter(paths.values())
    rewrite(tiny.base, next(names), without=LACKING)
    rewrite(tiny.base, next(names), without="llama.context_length")
    rewrite(tiny.base, next(names), changed={"llama.rope.dimension_count": 1000})
    next(names).write_bytes(tiny.base.read_bytes()[:-5000])
    next(names).write_bytes(b"GGUF" + bytes(100))
    rewrite(tiny.base, next(names), changed=NEGATIVE)
    return paths


def rewrite(source: Path, out: Path, *, without: str = "", changed=None) -> None:
    """A GGUF file again, without a key or tensor, or with other values."""
    read = gguf.GGUFReader(source)
    values = {key: field.contents() for key, field in read.fields.items()}
    writer = gguf.GGUFWriter(out, values["general.architecture"])
    for key, field in read.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", without):
            continue
        value = (changed or {}).get(key, values[key])
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(
            key, value, field.types[0], field.types[-1] if is_array else None
        )
    for tensor in read.tensors:
        if tensor.name != without:
            writer.add_tensor(
                tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.llamacpp
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", WORDS)
def test_what_does_not_load_is_told_in_llama_cpps_words(broken, name):
    path = broken[name]
    argv = python_argv("ewq_gguf.llamacpp.speak_child", path, PROMPT, "1")
    with pytest.raises(ChildError) as caught, child_log("load", path) as log_path:
        run(argv, stage="test", log_path=log_path)
    assert WORDS[name] in caught.value.problem
    ending = "ended by SIGABRT: " if name == "it aborts" else "exit code 1: "
    assert caught.value.problem.startswith(ending)


@pytest.mark.llamacpp
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", ["a tensor is missing", "it aborts"])
def test_a_matrix_that_cannot_be_computed_is_told_so(broken, toolchain, tmp_path, name):
    """Even where llama-imatrix ends before its log has said why."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog " * 200)
    with pytest.raises(ChildError) as caught:
        calibrate(broken[name], text, tmp_path / "i.gguf", toolchain, n_threads=1)
    assert WORDS[name] in caught.value.problem


@pytest.mark.llamacpp
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", ["a tensor is missing", "it aborts"])
def test_a_bench_that_fails_is_told_in_llama_cpps_words(broken, tmp_path, name):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog " * 200)
    request = Request(tasks=("perplexity",), texts=(("t", text),), n_ctx=64)
    with pytest.raises(ChildError) as caught:
        bench_file(broken[name], request, lambda _share, _use: None)
    assert WORDS[name] in caught.value.problem


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", None),
        ("llama_model_loader: - type  f32:    7 tensors\nmain: failed to init", None),
        (
            "0.00.004.039 E common_fit_params: encountered an error while trying to "
            "fit params to free device memory: failed to load model\n"
            "0.00.004.565 E llama_model_load: error loading model: check_tensor_dims: "
            "tensor 'x' has wrong shape; expected    256,    512, got   256\n",
            "tensor 'x' has wrong shape; expected 256, 512, got 256",
        ),
        (
            "/b/ggml/src/ggml-cuda/ggml-cuda.cu:98: CUDA error\n"
            "CUDA error: out of memory\n  current device: 0",
            "CUDA error: out of memory",
        ),
        ("/b/ggml/src/ggml.c:77: fatal error", "ggml.c:77: fatal error"),
        (
            "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of "
            "size 1234\nllama_init_from_model: failed to initialize the context: no",
            "no",
        ),
        (
            "alloc_tensor_range: failed to allocate CPU buffer of size 1234",
            "failed to allocate CPU buffer of size 1234",
        ),
        (
            "terminate called after throwing an instance of 'std::runtime_error'\n"
            "  what():  unsupported op\n",
            "unsupported op",
        ),
        ("main: failed to decode, ret = -3", "failed to decode, ret = -3"),
    ],
)
def test_a_reason_is_the_cause_and_no_later_line(log, reason):
    assert engine_reason(log) == reason


def test_a_failure_without_words_of_llama_cpp_keeps_its_last_line(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path))
    with (
        pytest.raises(ChildError, match="exit code 3; its last line: mine"),
        child_log("x", tmp_path / "y") as log_path,
    ):
        run(["sh", "-c", "echo mine; exit 3"], stage="test", log_path=log_path)
    assert log_path.exists()

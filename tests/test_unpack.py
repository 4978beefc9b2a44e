"""Packed checkpoints become plain ones: every weight is the integer times its scale."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from ewq_gguf.checkpoint.header import read_header
from ewq_gguf.checkpoint.source import Opening, open_checkpoint
from ewq_gguf.errors import InputError, ResourceError
from tests import lattices as made
from tests.checkpoints import write_llama, write_raw
from tests.range_server import Faults, serve

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
W8 = made.compressed_config(8, format="int-quantized")

#: How it is packed, its config, the stem of names, the dtype that holds every product,
#: the smallest type that holds every matrix.
KINDS: dict[str, tuple[Any, dict[str, object], str, str]] = {
    "int4-groups": (made.compressed, made.compressed_config(), ".weight", "F16"),
    "int4-rows": (
        partial(made.compressed, group=None),
        made.compressed_config(),
        ".weight",
        "F16",
    ),
    "int4-zeros": (
        partial(made.compressed, symmetric=False),
        made.compressed_config(),
        ".weight",
        "F32",
    ),
    "int4-ordered": (
        partial(made.compressed, order=True),
        made.compressed_config(),
        ".weight",
        "F16",
    ),
    "int8-packed": (
        partial(made.compressed, bits=8),
        made.compressed_config(8),
        ".weight",
        "F32",
    ),
    "int3-packed": (
        partial(made.compressed, bits=3),
        made.compressed_config(3),
        ".weight",
        "F16",
    ),
    "int8-rows": (made.int8_rows, W8, ".weight", "F32"),
    "gptq": (made.gptq, GPTQ, ".", "F32"),
    "gptq-zeros": (partial(made.gptq, symmetric=False), GPTQ, ".", "F32"),
    "gptq-8": (partial(made.gptq, bits=8), GPTQ | {"bits": 8}, ".", "F32"),
    "awq": (made.awq, AWQ, ".", "F32"),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path / "cache"))


def read(folder, name):
    """By another reader than ours, in float64."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensor = file.get_tensor(name)
        return str(tensor.dtype), tensor.double().numpy()


def tensors_of(folder: Path) -> dict[str, made.Raw]:
    """A one-file checkpoint's tensors, as `write_raw` takes them."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    with path.open("rb") as file:
        return {
            tensor.name: (
                tensor.dtype,
                list(tensor.shape),
                data[tensor.begin : tensor.end],
            )
            for tensor in read_header(file.fileno(), path).tensors
        }


def split(folder: Path, shard_of: Callable[[int, str], int]) -> None:
    """Divide a one-file checkpoint into two shards with an index."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for i in range(2):
        part = {
            name: tensors[name]
            for place, name in enumerate(sorted(tensors))
            if shard_of(place, name) == i
        }
        file = f"model-0000{i + 1}-of-00002.safetensors"
        write_raw(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without_the_second_shard(folder: Path, *, is_known_to_index: bool) -> None:
    """Divide a checkpoint by layers and lose the second layer's file."""
    split(folder, lambda i, name: ".layers.1." in name)
    lost = folder / "model-00002-of-00002.safetensors"
    lost.unlink()
    if not is_known_to_index:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"] = {
            name: file
            for name, file in index["weight_map"].items()
            if file != lost.name
        }
        path.write_text(json.dumps(index))


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_checkpoint_is_read_as_its_exact_products(tmp_path, kind):
    pack, quantised, stem, dtype = KINDS[kind]
    truth = made.write_packed_llama(tmp_path / "model", pack, quantised, stem=stem)

    opened = open_checkpoint(str(tmp_path / "model"))

    names = {tensor.name for _, tensor in opened.tensors}
    assert len(names) == 21
    assert "quantization_config" not in opened.config
    assert opened.is_mapped_by_name
    assert opened.identity.name == "model"
    assert opened.origin == str(tmp_path / "model")
    for name, values in truth.items():
        found, weights = read(opened.folder, name)
        assert found == {"F32": "torch.float32", "F16": "torch.float16"}[dtype]
        np.testing.assert_array_equal(weights, values)


def test_files_in_subfolders_come_along(tmp_path):
    folder = tmp_path / "model"
    made.write_packed_llama(folder, made.compressed, made.compressed_config())
    template = "additional_chat_templates/tool_use.jinja"
    (folder / template).parent.mkdir()
    (folder / template).write_text("of the folder")

    opened = open_checkpoint(str(folder))

    assert (opened.folder / template).read_text() == "of the folder"


def test_it_is_unpacked_once_and_again_when_it_changes(tmp_path):
    folder = tmp_path / "model"
    made.write_packed_llama(folder, made.compressed, made.compressed_config())
    said: list[str] = []
    opening = Opening(say=said.append)

    first = open_checkpoint(str(folder), opening)
    again = open_checkpoint(str(folder), opening)
    made.set_config(folder, rope_theta=20000.0)
    changed = open_checkpoint(str(folder), opening)

    assert first.folder == again.folder != changed.folder
    assert sum("unpacks compressed-tensors weights" in line for line in said) == 2


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    made.write_packed_llama(folder, made.compressed, made.compressed_config())
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    with pytest.raises(ResourceError, match="EWQ_CACHE") as caught:
        open_checkpoint(str(folder))

    assert "1,000 are free" in str(caught.value)
    assert not list((tmp_path / "cache" / "unpacked").rglob("*.safetensors"))


@pytest.mark.parametrize("method", KINDS)
def test_a_packed_checkpoint_without_one_tensor_is_refused_before_any_work(
    tmp_path, method
):
    pack, quantised, stem, _ = KINDS[method]
    folder = tmp_path / "model"
    made.write_packed_llama(folder, pack, quantised, stem=stem)
    whole = tensors_of(folder)
    layer = "model.layers.1.mlp.up_proj"
    parts = [name for name in whole if name.startswith(f"{layer}.")]

    for lost in [*([name] for name in parts if not is_optional(name)), parts]:
        rest = {name: raw for name, raw in whole.items() if name not in lost}
        write_raw(folder / "model.safetensors", rest)
        said: list[str] = []

        with pytest.raises(InputError, match=r"half a checkpoint: 1 of 21") as caught:
            open_checkpoint(str(folder), Opening(say=said.append))

        assert f"is missing: {layer}.weight;" in str(caught.value)
        assert caught.value.subject == str(folder)
        assert not said
        assert cached_files(tmp_path) == []


def is_optional(name: str) -> bool:
    """Whether there are weights of the same packing without this part."""
    return name.endswith(("zero_point", "g_idx"))


def cached_files(tmp_path: Path) -> list[Path]:
    cache = tmp_path / "cache" / "unpacked"
    return [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize("is_known_to_index", [True, False])
def test_a_packed_checkpoint_without_a_shard_is_refused_before_any_work(
    tmp_path, is_known_to_index
):
    folder = tmp_path / "model"
    made.write_packed_llama(folder, made.compressed, made.compressed_config())
    without_the_second_shard(folder, is_known_to_index=is_known_to_index)

    with pytest.raises(InputError) as caught:
        open_checkpoint(str(folder))

    assert caught.value.subject == str(folder)
    assert (
        "model-00002-of-00002.safetensors with 23 tensors (model.layers.1."
        if is_known_to_index
        else "half a checkpoint: 9 of 21 tensors that LlamaForCausalLM with 2 layers "
        "needs are missing: model.layers.1.* (9)"
    ) in caught.value.problem
    assert cached_files(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "part", "weights"),
    [
        ("int4-zeros", "weight_zero_point", {"symmetric": False}),
        ("int4-ordered", "weight_g_idx", {"actorder": "group"}),
        ("gptq", "g_idx", {}),
    ],
)
def test_a_part_that_the_config_tells_is_needed(tmp_path, kind, part, weights):
    pack, quantised, stem, _ = KINDS[kind]
    folder = tmp_path / "model"
    if weights:
        scheme = {"num_bits": 4} | weights
        quantised = quantised | {"config_groups": {"group_0": {"weights": scheme}}}
    else:
        quantised = quantised | {"desc_act": True}
    made.write_packed_llama(folder, pack, quantised, stem=stem)
    tensors = tensors_of(folder)
    layer = "model.layers.1.mlp.up_proj"
    del tensors[f"{layer}.{part}"]
    write_raw(folder / "model.safetensors", tensors)

    with pytest.raises(InputError, match=f"is missing: {layer}.weight;"):
        open_checkpoint(str(folder))


def test_a_part_without_its_weight_is_refused_where_layers_differ(tmp_path):
    folder = tmp_path / "model"
    made.write_packed_llama(folder, made.compressed, made.compressed_config())
    made.set_config(folder, architectures=["MadeUpForCausalLM"])
    tensors = tensors_of(folder)
    del tensors["model.layers.1.mlp.up_proj.weight_packed"]
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    write_raw(folder / "model.safetensors", tensors)

    with pytest.raises(InputError, match="half a checkpoint: 2 packed") as caught:
        open_checkpoint(str(folder))

    assert "of model.layers.0.mlp.up_proj.weight there is only" in str(caught.value)
    assert cached_files(tmp_path) == []


def test_other_tensors_beside_packed_weights_are_refused_before_any_work(tmp_path):
    folder = tmp_path / "model"
    made.write_packed_llama(folder, made.compressed, made.compressed_config())
    tensors = tensors_of(folder)
    norm = tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.lora_A.weight"] = norm
    write_raw(folder / "model.safetensors", tensors)

    with pytest.raises(InputError, match="holds tensors of an adapter") as caught:
        open_checkpoint(str(folder))

    assert caught.value.subject == str(folder)
    assert cached_files(tmp_path) == []


def test_weights_on_a_server_are_not_unpacked(tmp_path):
    folder = tmp_path / "model"
    made.write_packed_llama(folder, made.compressed, made.compressed_config())

    with serve(tmp_path, Faults()) as url:
        with pytest.raises(InputError, match="not on this machine"):
            open_checkpoint(f"{url}/model")


def test_several_shards_may_share_a_weight(tmp_path):
    folder = tmp_path / "model"
    truth = made.write_packed_llama(folder, made.compressed, made.compressed_config())
    split(folder, lambda i, name: i % 2)

    opened = open_checkpoint(str(folder))

    assert len(opened.shards) == 2
    assert {tensor.name for _, tensor in opened.tensors} >= truth.keys()


@pytest.mark.parametrize(
    ("quantised", "said"),
    [
        pytest.param(GPTQ | {"bits": 3}, "gptq", id="gptq-3"),
        pytest.param(AWQ | {"version": "gemv"}, "awq", id="awq-gemv"),
        pytest.param({"quant_method": "bitsandbytes"}, "bitsandbytes", id="bnb"),
        pytest.param(made.compressed_config(format="marlin-24"), "compressed", id="24"),
    ],
)
def test_other_packings_stay_refused_with_the_remedy(tmp_path, quantised, said):
    made.write_packed_llama(tmp_path / "model", made.compressed, quantised)

    with pytest.raises(InputError, match=said) as caught:
        open_checkpoint(str(tmp_path / "model"))

    assert "use the BF16 or F16 checkpoint" in str(caught.value)


def test_gptq_in_the_order_of_activations_is_refused(tmp_path):
    made.write_packed_llama(
        tmp_path / "model", partial(made.gptq, order=True), GPTQ, stem="."
    )

    with pytest.raises(InputError, match="another order"):
        open_checkpoint(str(tmp_path / "model"))


def test_a_config_that_no_tensor_follows_is_refused(tmp_path):
    write_llama(tmp_path / "model")
    made.set_config(tmp_path / "model", quantization_config=GPTQ)

    with pytest.raises(InputError, match="no tensor is packed so"):
        open_checkpoint(str(tmp_path / "model"))


def test_parts_that_do_not_fit_are_refused(tmp_path):
    def broken(shape, rng):
        values, parts = made.compressed(shape, rng)
        parts["_scale"] = made.raw_bf16(np.ones((shape[0], 5)))
        return values, parts

    made.write_packed_llama(tmp_path / "model", broken, made.compressed_config())

    with pytest.raises(InputError, match="do not fit together"):
        open_checkpoint(str(tmp_path / "model"))

"""The main path, from a checkpoint to a verified file, with the real toolchain."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ewq_gguf import api, store
from ewq_gguf.api import Made, Options, make_gguf
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.checkpoint.source import open_checkpoint
from ewq_gguf.cli import main
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.llamacpp.layout import cached_layout
from ewq_gguf.process import run
from ewq_gguf.records import EwqPolicy, Layout, Plan, UniformPolicy, load_record
from tests.checkpoints import write_llama
from tests.gguf_files import leftovers, using_cache

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.slow,
    pytest.mark.usefixtures("own_cache"),
]

QUICK = Options(n_threads=2, load=False)
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "BF16", "n_layers": 3},
    "f16-tied-3-shards": {"dtype": "F16", "n_layers": 3, "tied": True, "n_shards": 3},
    "f32-llama3-rope": {"dtype": "F32", "n_layers": 3, "rope_scaling": ROPE},
}


class Notes(api.Silent):
    """Progress that keeps what it was told."""

    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


@dataclass(frozen=True)
class Case:
    """A checkpoint, the folder it was made in, and what came of it."""

    shape: str
    folder: Path
    cwd: Path
    marker: Path
    made: Made


def write_hostile(folder: Path, marker: Path) -> None:
    """Code in every place where somebody may run a repository's."""
    code = f"import pathlib\npathlib.Path({str(marker)!r}).write_text(__file__)\n"
    names = "configuration_evil tokenization_evil modeling_evil torch gguf conversion"
    for name in (*names.split(), "numpy", "llama_cpp", "sitecustomize", "json"):
        (folder / f"{name}.py").write_text(code)
    for file, auto_map in {
        "config.json": {
            "AutoConfig": "configuration_evil.Config",
            "AutoModelForCausalLM": "modeling_evil.Model",
        },
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_evil.Tok", None]},
    }.items():
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, "auto_map": auto_map}))


@pytest.fixture(scope="module", params=list(SHAPES))
def case(request, tmp_path_factory, session_cache):
    """Made from inside the checkpoint's own folder, which is full of hostile code."""
    root = tmp_path_factory.mktemp("case")
    folder = write_llama(root / "my-model", seed=5, **SHAPES[request.param])
    write_hostile(folder, root / "marker")
    with using_cache(session_cache), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        made = make_gguf(
            ".", Path("out.gguf"), EwqPolicy(ladder=("Q4_0", "Q8_0", "raw"))
        )
    path = folder / made.path
    return Case(
        request.param, folder, folder, root / "marker", replace(made, path=path)
    )


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty working folder."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def identity(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written again."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


# What is made.


def test_the_file_is_its_plan_tensor_by_tensor_and_byte_by_byte(case):
    made, gguf = case.made, read_gguf(case.made.path)

    assert {t.name: t.ggml_type for t in gguf.tensors} == {
        t.name: t.written_type for t in made.plan.tensors
    }
    assert not made.plan.totals.is_estimate
    assert made.path.stat().st_size == made.plan.totals.file_size_bytes
    assert gguf.kv["ewq.plan.sha256"] == made.plan.sha256
    assert gguf.kv["general.name"] == "my-model"
    assert not made.is_reused


def test_all_three_precisions_of_the_rule_are_there(case):
    raw = {"bf16": "BF16", "f16-tied-3-shards": "F16", "f32-llama3-rope": "F16"}
    layers = [layer.ggml_type for layer in case.made.plan.layers]

    assert case.made.plan.raw_type == raw[case.shape]
    assert set(layers) <= {"Q4_0", "Q8_0", raw[case.shape]}
    assert len(set(layers)) > 1


def test_the_verification_record_is_complete(case):
    made = case.made
    found = made.verification

    assert found.file_sha256 == store.sha256_file(made.path)
    assert found.plan_sha256 == made.plan.sha256
    assert found.planned_size_bytes == found.found_size_bytes
    assert [t.name for t in found.tensors] == [t.name for t in made.plan.tensors]
    assert found.prompt == "The capital of France is"
    assert isinstance(found.answer, str)


def test_the_plan_is_written_and_nothing_else_is_left(case):
    plan_path = case.cwd / case.made.plan_path

    assert plan_path == case.cwd / "plans" / "my-model.ewq-Q4_0-Q8_0-raw.json"
    assert load_record(Plan, plan_path, "test") == case.made.plan
    assert leftovers(case.cwd) == leftovers(plan_path.parent) == []


@pytest.mark.fault(40)
def test_tied_embeddings_have_no_head_and_rope_factors_come_from_the_converter(case):
    names = {tensor.name for tensor in case.made.plan.tensors}

    assert ("output.weight" in names) == (case.shape != "f16-tied-3-shards")
    assert ("rope_freqs.weight" in names) == (case.shape == "f32-llama3-rope")


@pytest.mark.fault(36)
def test_code_of_the_repository_never_runs(case):
    assert not case.marker.exists(), case.marker.read_text()


def test_no_path_of_the_machine_is_in_the_file(case, session_cache):
    data = case.made.path.read_bytes()
    places = {case.folder, case.folder.parent, session_cache, Path.home(), Path.cwd()}

    for place in {*places, *(place.resolve() for place in places)} - {Path("/")}:
        assert os.fsencode(place) not in data, place
    assert b"ewq-gguf/" not in data


def test_the_layout_is_the_real_base_and_predicts_its_bytes(case, toolchain):
    checkpoint = open_checkpoint(str(case.folder))
    layout = cached_layout(checkpoint.identity.fingerprint, toolchain.key)
    base_path = api.base_file(api.Run(checkpoint))
    base = read_gguf(base_path)

    assert isinstance(layout, Layout)
    assert [(t.name, t.shape, t.ggml_type) for t in layout.tensors] == [
        (t.name, t.shape, t.ggml_type) for t in base.tensors
    ]
    assert layout.kv_bytes == base.kv_bytes
    assert api.layout_bytes(layout) == base_path.stat().st_size


@pytest.mark.parametrize("preset", ["Q8_0", "Q4_K_M", "Q2_K"])
def test_a_presets_predicted_size_is_the_real_one(case, toolchain, tmp_path, preset):
    base = api.base_file(api.Run(str(case.folder)))
    out = tmp_path / "preset.gguf"

    run(
        [toolchain.tool("llama-quantize"), base, out, preset],
        stage="test",
        log_path=tmp_path / "log",
    )

    assert case.made.preset_bytes[preset] == out.stat().st_size


def test_a_plan_of_the_scan_alone_is_as_exact(case):
    scan = api.scan(api.Run(str(case.folder)))

    assert api.plan(api.Run(scan), case.made.plan.policy) == case.made.plan


# What is there is used again, or refused.


def test_a_second_run_uses_what_is_there(case, monkeypatch):
    monkeypatch.chdir(case.cwd)
    before = identity(case.made.path)

    for policy in (case.made.plan.policy, case.made.plan):
        again = make_gguf(".", Path("out.gguf"), policy)
        assert again.is_reused
        assert again.verification == case.made.verification
    assert identity(case.made.path) == before


def test_another_plan_is_refused_unless_forced(tiny, empty):
    out = empty / "out.gguf"
    first = make_gguf(
        str(tiny.folder), out, UniformPolicy(ggml_type="Q8_0"), options=QUICK
    )
    before = identity(out)

    with pytest.raises(UsageError, match="--force") as caught:
        make_gguf(str(tiny.folder), out, UniformPolicy(ggml_type="Q4_0"), options=QUICK)
    assert caught.value.exit_code == 2
    assert identity(out) == before

    forced = replace(QUICK, force=True)
    second = make_gguf(
        str(tiny.folder), out, UniformPolicy(ggml_type="Q4_0"), options=forced
    )
    assert not second.is_reused
    assert out.stat().st_size == second.plan.totals.file_size_bytes
    assert second.plan.totals.file_size_bytes < first.plan.totals.file_size_bytes


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-5000], id="truncated"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: bytes(64) + data[64:], id="zeroed-header"),
        pytest.param(lambda data: data + bytes(32), id="longer"),
        pytest.param(lambda data: b"something else", id="no-gguf"),
    ],
)
def test_a_damaged_output_is_refused_unless_forced(tiny, empty, damage):
    out, policy = empty / "out.gguf", UniformPolicy(ggml_type="Q8_0")
    made = make_gguf(str(tiny.folder), out, policy, options=QUICK)
    bad = damage(out.read_bytes())
    out.write_bytes(bad)

    with pytest.raises(UsageError, match="damaged"):
        make_gguf(str(tiny.folder), out, policy, options=QUICK)
    assert out.read_bytes() == bad

    again = make_gguf(str(tiny.folder), out, policy, options=replace(QUICK, force=True))
    assert again.verification.file_sha256 == made.verification.file_sha256


def test_a_file_of_other_weights_is_not_taken_for_this_models(tmp_path, empty, tiny):
    """Same names, same shapes, same plan: a checkpoint that was trained on."""
    folder = tmp_path / tiny.folder.name
    shutil.copytree(tiny.folder, folder)
    out, policy = empty / "out.gguf", UniformPolicy(ggml_type="Q8_0")
    make_gguf(str(tiny.folder), out, policy, options=QUICK)
    write_llama(folder, seed=99)

    with pytest.raises(UsageError):
        make_gguf(str(folder), out, policy, options=QUICK)


def test_a_damaged_base_in_the_cache_is_made_anew(tiny, empty, toolchain):
    sound = tiny.base.read_bytes()
    tiny.base.write_bytes(sound[:-5000])
    try:
        api.base_file(api.Run(tiny.checkpoint))
        assert tiny.base.read_bytes() == sound
    finally:
        tiny.base.write_bytes(sound)


def test_a_damaged_scan_in_the_cache_is_made_anew(tiny, own_cache):
    scans = list((own_cache / "scans").glob("*.json"))
    sound = {path: path.read_bytes() for path in scans}
    for path in scans:
        path.write_bytes(b"{}")

    assert api.scan(api.Run(tiny.checkpoint)) == tiny.scan
    for path, data in sound.items():
        path.write_bytes(data)


# The same file from everywhere.


def test_the_same_plan_gives_the_same_bytes_from_another_folder(case, empty, tmp_path):
    """Another parent, working folder and base; for shards, another order too."""
    if case.shape.startswith("f32"):
        pytest.skip("two checkpoints are enough")
    folder = tmp_path / "elsewhere" / "my-model"
    shutil.copytree(case.folder, folder, ignore=shutil.ignore_patterns("out.gguf"))
    reordered = "shards" in case.shape
    if reordered:
        reorder_shards(folder)

    made = make_gguf(
        str(folder),
        empty / "other.gguf",
        case.made.plan,
        options=replace(QUICK, force=reordered),
    )

    assert not made.is_reused
    assert made.verification.file_sha256 == case.made.verification.file_sha256


def reorder_shards(folder: Path) -> None:
    """The tensors in other shards and in another order within them."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    tensors: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
        path.unlink()
    weight_map: dict[str, str] = {}
    names = sorted(tensors, reverse=True)
    for i in range(2):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        part = {name: tensors[name] for name in names[i::2]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def test_a_plan_for_another_checkpoint_is_refused(tiny, deep, empty):
    with pytest.raises(InputError, match="the plan is for checkpoint") as caught:
        make_gguf(str(tiny.folder), empty / "o.gguf", deep.plan(), options=QUICK)
    assert caught.value.exit_code == 3


# Policies and edges.


@pytest.mark.parametrize("ggml_type", ["Q8_0", "raw", "F16", "F32", "Q4_K"])
def test_uniform_policies_work_to_the_end(tiny, empty, ggml_type):
    made = make_gguf(
        str(tiny.folder), None, UniformPolicy(ggml_type=ggml_type), options=QUICK
    )

    written = {"raw": "BF16", "Q4_K": "Q5_0"}.get(ggml_type, ggml_type)
    found = {t.ggml_type for t in read_gguf(made.path).tensors if ".attn_q" in t.name}
    assert found == {written}
    assert made.path.stat().st_size == made.plan.totals.file_size_bytes
    assert made.path.name == f"tiny-BF16-EWQ-{nearest(made)}.gguf"
    assert sorted(path.name for path in empty.iterdir()) == ["plans", made.path.name]


def nearest(made: Made) -> str:
    """The preset whose size is nearest by ratio, slowly."""
    size = made.plan.totals.file_size_bytes
    return min(
        made.preset_bytes,
        key=lambda name: max(
            made.preset_bytes[name] / size, size / made.preset_bytes[name]
        ),
    )


def test_raw_type_is_converted_from_the_base(tiny, empty):
    made = make_gguf(
        str(tiny.folder),
        Path("f16.gguf"),
        EwqPolicy(ladder=("Q8_0", "raw")),
        raw_type="F16",
        options=QUICK,
    )

    types = {t.ggml_type for t in read_gguf(made.path).tensors}
    assert types == {"F32", "F16", "Q8_0"}


@pytest.mark.fault(37)
def test_without_a_tokenizer_a_plan_is_an_estimate_and_no_file_is_made(tmp_path, empty):
    folder = write_llama(tmp_path / "mute")
    for file in ("tokenizer.model", "tokenizer_config.json"):
        (folder / file).unlink()
    notes = Notes()

    plan = api.plan(api.Run(str(folder), progress=notes), EwqPolicy())

    assert plan.totals.is_estimate
    assert plan.totals.header_bytes is None
    assert any("tokenizer" in note and "an estimate" in note for note in notes.texts)
    with pytest.raises(InputError, match="has no tokenizer") as caught:
        make_gguf(str(folder), empty / "out.gguf")
    assert caught.value.exit_code == 3
    assert list(empty.iterdir()) == []


def test_the_output_is_never_the_input(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder, folder)
    shard = folder / "model.safetensors"
    before = store.sha256_file(shard)
    link = tmp_path / "link.gguf"
    link.hardlink_to(shard)

    for out in (shard, link):
        with pytest.raises(UsageError):
            make_gguf(str(folder), out, options=replace(QUICK, force=True))
    assert store.sha256_file(shard) == before


# The built-in model, as a user runs it.


def ewq(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "ewq_gguf", *map(str, args)]
    return subprocess.run(
        argv, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_built_in_model_end_to_end(empty, own_cache, tmp_path):
    out = tmp_path / "made" / "out.gguf"
    try:
        first = ewq("gguf", "demo", "-o", out, cwd=empty)
        assert first.returncode == 0, first.stderr
        assert first.stdout == f"{out}\n"
        before = identity(out)

        begin = time.perf_counter()
        second = ewq("gguf", "demo", "-o", out, "--json", "-q", cwd=empty)
        assert time.perf_counter() - begin < 10
        assert second.returncode == 0, second.stderr
        assert second.stderr == ""
        assert identity(out) == before
    finally:
        out.unlink(missing_ok=True)
        for base in (own_cache / "base").glob("SmolLM2*"):
            base.unlink()

    values = json.loads(second.stdout)
    plan = load_record(Plan, empty / "plans" / "SmolLM2-135M-Instruct.ewq.json", "test")
    assert values["schema_name"] == "ewq.verification"
    assert "Paris" in values["answer"]
    assert values["found_size_bytes"] == plan.totals.file_size_bytes
    assert {layer.ggml_type for layer in plan.layers} == {"Q4_K", "Q8_0", "BF16"}
    assert [path.name for path in empty.iterdir()] == ["plans"]


def test_a_flipped_bit_among_the_weights_is_not_reused(tiny, empty):
    """Header, size and types are right; only the hash tells."""
    out = empty / "out.gguf"
    make_gguf(str(tiny.folder), out, UniformPolicy(ggml_type="Q8_0"), options=QUICK)
    data = bytearray(out.read_bytes())
    data[-1000] ^= 1
    out.write_bytes(data)
    with pytest.raises(UsageError, match="made from another plan, or is damaged"):
        make_gguf(str(tiny.folder), out, UniformPolicy(ggml_type="Q8_0"), options=QUICK)
    assert out.read_bytes() == data


def test_a_file_that_was_not_loaded_yet_is_loaded_when_it_is_asked_for(tiny, empty):
    out, policy = empty / "out.gguf", UniformPolicy(ggml_type="Q6_K")
    first = make_gguf(str(tiny.folder), out, policy, options=Options(load=False))
    again = make_gguf(str(tiny.folder), out, policy)
    assert (first.verification.answer, again.is_reused) == (None, True)
    assert again.verification.answer is not None


def test_a_file_whose_answer_was_empty_is_not_loaded_again(tiny, empty, own_cache):
    out, policy = empty / "out.gguf", UniformPolicy(ggml_type="Q5_K")
    first = make_gguf(str(tiny.folder), out, policy)
    silent = first.verification.model_copy(update={"answer": ""})
    record = own_cache / "verifications" / f"{first.plan.sha256}.json"
    record.write_text(silent.to_json())

    again = make_gguf(str(tiny.folder), out, policy)

    assert (again.is_reused, again.verification.answer) == (True, "")


def test_quantize_uses_a_file_again_as_gguf_does(tiny, empty, capsys):
    out, plan = empty / "out.gguf", empty / "plan.json"
    argv = ["quantize", "plan.json", str(tiny.base), "-o", "out.gguf", "--no-load"]
    plan.write_text(tiny.plan("Q8_0").to_json())
    assert main(argv) == 0
    before = identity(out)

    assert main(argv) == 0
    assert "was there already, still valid" in capsys.readouterr().err
    assert identity(out) == before

    plan.write_text(tiny.plan("Q4_0").to_json())
    assert main(argv) == 2
    assert "made from another plan" in capsys.readouterr().err
    assert identity(out) == before
    assert main([*argv, "--force"]) == 0
    assert out.stat().st_size < before[2]


#: What a run is told beside the policy, and the commands that are told it too.
REPEATED = {
    "--threads 1": {"plan", "quantize"},
    "--allow-nonfinite": {"plan"},
    "--llama-cpp": {"convert", "plan", "quantize"},
    "--no-load": {"convert", "quantize"},
}


def test_a_dry_run_prints_every_option_that_its_commands_take(
    tmp_path, own_cache, toolchain, capsys
):
    folder = write_llama(tmp_path / "m", hidden=256, ffn=256)
    argv = ["gguf", str(folder), "-q", "--dry-run", "--policy", "uniform:Q4_0"]
    argv += ["--threads", "1", "--allow-nonfinite", "--no-load"]
    argv += ["--llama-cpp", str(toolchain.bin_dir)]

    assert main(argv) == 0

    lines = capsys.readouterr().out.splitlines()
    commands = {
        line.split()[1]: line
        for line in lines
        if line.startswith("ewq ") and not line.startswith("ewq plan export ")
    }
    for option, names in REPEATED.items():
        for name in names & commands.keys():
            assert option in commands[name]
    assert commands.keys() == {"convert", "plan"}
    assert lines[-1].startswith(str(toolchain.bin_dir))
    assert lines[-1].endswith(" 1")

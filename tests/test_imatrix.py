"""Importance matrices: read strictly, planned to the byte, followed for real."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest

from ewq_gguf import api, ggml_types, store
from ewq_gguf.api import Options
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.cli import main
from ewq_gguf.errors import ChildError, InputError, VerificationError
from ewq_gguf.llamacpp.export_script import export_sh
from ewq_gguf.llamacpp.imatrix import check_imatrix, read_imatrix
from ewq_gguf.llamacpp.layout import NEED_IMATRIX
from ewq_gguf.llamacpp.quantize import quantize, tensor_types
from ewq_gguf.llamacpp.verify import verify_file
from ewq_gguf.pipeline import planning
from ewq_gguf.plan.build import make_fast_plan, make_plan
from ewq_gguf.plan.importance import Importance, file_keys
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.plan.naming import plan_name
from ewq_gguf.plan.size_target import SizeTarget
from ewq_gguf.process import run
from ewq_gguf.records import (
    EwqPolicy,
    FastEwqPolicy,
    Imatrix,
    Plan,
    PresetPolicy,
    UniformPolicy,
    load_record,
)
from tests.gguf_files import dry_run, with_types, write_gguf
from tests.scans import decisions, make_layout, make_scan, types

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [pytest.mark.llamacpp, pytest.mark.usefixtures("own_cache")]

LAYER = {"attn_q": (256, 256)}
LAYERS = [f"blk.{i}.attn_q.weight" for i in range(5)]
WORDS = (
    "the river runs past an old stone house where nobody has lived for years".split()
)
LOW = EwqPolicy(ladder=("IQ1_M", "IQ2_XXS", "Q4_K"), factor=0.5)
IQ2 = UniformPolicy(ggml_type="IQ2_XXS", embedding_type="Q4_K")


@pytest.fixture(scope="module")
def matrices(deep, toolchain, tmp_path_factory):
    """What the real llama-imatrix writes for 24 layers: without and with the head."""
    folder = tmp_path_factory.mktemp("imatrix")
    text = " ".join(WORDS[i * i % len(WORDS)] for i in range(600))
    (folder / "text.txt").write_text(text)
    (folder / "base.gguf").symlink_to(deep.base)
    for name, more in (("plain.gguf", []), ("head.gguf", ["--process-output"])):
        run(
            [toolchain.tool("llama-imatrix"), "-m", "base.gguf", "-f", "text.txt"]
            + ["-o", name, "-c", "64", "--chunks", "4", "--no-ppl", "-t", "2", *more],
            stage="test",
            log_path=folder / f"{name}.log",
            cwd=folder,
        )
    return folder


@pytest.fixture(scope="module")
def plain(matrices):
    return matrices / "plain.gguf"


@pytest.fixture(scope="module")
def head(matrices):
    return matrices / "head.gguf"


@pytest.fixture
def planned(deep):
    """A plan of the deep model with a matrix."""

    def plan(policy, path, **budget):
        return make_plan(
            deep.scan,
            policy,
            deep.layout,
            budget=SizeTarget("test", **budget) if budget else None,
            importance=read_imatrix(path) if path else None,
        )

    return plan


@pytest.fixture
def made(deep, toolchain, tmp_path):
    """The file of a plan."""

    def make(plan, path=None, name="out.gguf"):
        out = tmp_path / name
        quantize(plan, deep.base, out, toolchain, imatrix=path, n_threads=2, load=False)
        return out

    return make


# What llama-imatrix writes.


def test_the_entries_are_those_of_llama_imatrix(deep, plain, head):
    read = read_imatrix(plain)
    assert read.n_values == matrices_of(deep.layout)
    assert read.record == Imatrix(
        file_name="plain.gguf",
        file_sha256=store.sha256_file(plain),
        n_entries=24 * 7,
        n_chunks=4,
        dataset="text.txt",
    )
    assert read_imatrix(head).n_values == matrices_of(deep.layout) | {
        "output.weight": 256
    }


# Plans and their files.


@pytest.mark.parametrize(
    ("policy", "budget"),
    [
        pytest.param(LOW, {}, id="ladder"),
        pytest.param(IQ2, {}, id="uniform"),
        pytest.param(EwqPolicy(), {"share": 0.15}, id="below-the-ladder"),
        pytest.param(FastEwqPolicy(ladder=LOW.ladder, n_low=3), {}, id="fastewq"),
    ],
)
def test_the_file_has_the_planned_types_and_bytes(
    planned, made, deep, head, policy, budget
):
    if isinstance(policy, FastEwqPolicy):
        subject = ModelTensors.of_tensors(
            deep.scan.model, deep.layout.tensors, deep.layout, "auto"
        )
        weighed = replace(subject, importance=read_imatrix(head))
        plan = make_fast_plan(weighed, policy, [1, 3, 5, 7, 20])
    else:
        plan = planned(policy, head, **budget)
    out = made(plan, head)

    assert not plan.totals.is_estimate
    assert out.stat().st_size == plan.totals.file_size_bytes
    found = {t.name: t.ggml_type for t in read_gguf(out).tensors}
    assert found == {t.name: t.written_type for t in plan.tensors}
    assert ggml_types.IMATRIX_TYPES & set(found.values())
    kv = read_gguf(out).kv
    assert {key: kv[key] for key in kv if key.startswith("quantize.")} == {
        "quantize.imatrix.file": "imatrix.gguf",
        "quantize.imatrix.dataset": "text.txt",
        "quantize.imatrix.entries_count": 24 * 7 + 1,
        "quantize.imatrix.chunks_count": 4,
    }


def test_a_file_that_says_nothing_of_its_matrix_is_found(planned, made, plain):
    plan = planned(UniformPolicy(ggml_type="Q8_0"), plain)
    out = made(plan, plain)
    data = out.read_bytes()
    out.write_bytes(data.replace(b"imatrix.dataset", b"imatrix.dataxet", 1))

    with pytest.raises(VerificationError) as caught:
        verify_file(plan, out, load=False)
    assert caught.value.differences == (
        "quantize.imatrix.dataset: planned text.txt, found None",
    )


def test_the_same_types_get_other_bytes_and_the_same_bytes_again(planned, made, plain):
    policy = UniformPolicy(ggml_type="Q4_K")
    without, weighed = planned(policy, None), planned(policy, plain)
    one, two = made(weighed, plain, "1.gguf"), made(weighed, plain, "2.gguf")
    none = made(without, name="0.gguf")

    assert store.sha256_file(one) == store.sha256_file(two)
    assert none.stat().st_size == without.totals.file_size_bytes
    assert one.stat().st_size == weighed.totals.file_size_bytes
    assert without.imatrix is None
    keys = read_imatrix(plain).kv_bytes
    assert read_gguf(one).kv_bytes - read_gguf(none).kv_bytes == keys
    assert [t.written_type for t in without.tensors] == [
        t.written_type for t in weighed.tensors
    ]
    first, second = (tensor_bytes(path) for path in (none, one))
    same = {name for name in first if first[name] == second[name]}
    assert {name for name in first if "blk" in name and "norm" not in name} == (
        first.keys() - same
    )


def test_a_preset_with_a_matrix_is_llama_quantizes_own(
    deep, toolchain, made, plain, tmp_path
):
    preset, own = PresetPolicy(preset="IQ4_XS"), tmp_path / "own.gguf"
    without = api.plan(api.Run(deep.checkpoint), preset)
    weighed = api.plan(api.Run(deep.checkpoint, Options(imatrix=plain)), preset)

    argv = [toolchain.tool("llama-quantize"), "--imatrix", plain, deep.base, own]
    run([*argv, preset.preset], stage="test", log_path=tmp_path / "log")
    out = made(weighed, plain)

    assert tensor_bytes(out) == tensor_bytes(own)
    assert out.stat().st_size == weighed.totals.file_size_bytes
    # Its mixture spares the first layers' down projections nothing then.
    changed = {
        tensor.role
        for tensor, other in zip(weighed.tensors, without.tensors, strict=True)
        if tensor.written_type != other.written_type
    }
    assert changed == {"ffn_down"}


def tensor_bytes(path):
    with path.open("rb") as file:
        found = {}
        for tensor in read_gguf(path).tensors:
            file.seek(tensor.offset)
            found[tensor.name] = file.read(tensor.size_bytes)
    return found


@pytest.mark.parametrize(
    "dataset", ["", "x" * 126 + "é" * 9, "ä/б 中\n", "a" * 500, None]
)
def test_any_name_of_a_dataset_is_predicted_to_the_byte(
    planned, made, deep, tmp_path, dataset
):
    entries = matrices_of(deep.layout)
    path = write_imatrix(tmp_path / "i.gguf", entries, dataset=dataset, n_chunks=0)
    plan = planned(UniformPolicy(ggml_type="Q4_0"), path)

    out = made(plan, path)

    assert out.stat().st_size == plan.totals.file_size_bytes
    kv = read_gguf(out).kv
    assert plan.imatrix is not None
    assert kv.get("quantize.imatrix.dataset") == plan.imatrix.dataset
    assert file_keys(plan.imatrix).keys() == {
        k for k in kv if k.startswith("quantize.")
    }


# An entry that is missing.


@pytest.mark.fault(46)
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("token_embd.weight", "--embedding-type"),
        ("output.weight", "--process-output, or give --output-type"),
        ("blk.3.ffn_up.weight", "more text, or choose a type that needs none"),
    ],
)
def test_a_type_without_its_entry_is_refused_before_the_start(
    deep, plain, tmp_path, name, option
):
    known = read_imatrix(plain)
    values = dict(known.n_values) | {"token_embd.weight": 256, "output.weight": 256}
    del values[name]
    policy = UniformPolicy(ggml_type="IQ2_XXS")

    with pytest.raises(InputError, match="cannot be IQ2_XXS: .* no entry") as caught:
        make_plan(deep.scan, policy, importance=Importance(known.record, values, 0))
    assert caught.value.subject == name
    assert option in caught.value.remedy


@pytest.mark.parametrize("ggml_type", sorted(ggml_types.IMATRIX_TYPES))
@pytest.mark.parametrize("name", ["blk.0.ffn_up.weight", "output.weight"])
def test_llama_quantize_fails_in_the_middle_or_ignores_it(
    toolchain, tmp_path, name, ggml_type
):
    """What the refusal is for; where the head does not abort, it is quantised blind."""
    names = ["blk.0.attn_q.weight", "blk.0.ffn_up.weight", "output.weight"]
    base = write_gguf(tmp_path / "base.gguf", dict.fromkeys(names, (2, 256)))
    path = write_imatrix(tmp_path / "i.gguf", {"blk.0.attn_q.weight": 256})
    tool = [toolchain.tool("llama-quantize"), "--imatrix", path, "--tensor-type"]
    argv = [*tool, f"^{name}$={ggml_type}", base, tmp_path / "out.gguf", "Q8_0"]

    if name == "output.weight" and ggml_type in ("IQ1_M", "IQ2_S", "IQ3_XXS"):
        run(argv, stage="test", log_path=tmp_path / "log")
    else:
        with pytest.raises(ChildError):
            run(argv, stage="test", log_path=tmp_path / "log")


def test_a_type_that_falls_back_needs_no_entry(tiny, tmp_path):
    entries = matrices_of(tiny.layout)
    path = write_imatrix(
        tmp_path / "i.gguf", {n: v for n, v in entries.items() if "attn" in n}
    )

    plan = make_plan(
        tiny.scan, UniformPolicy(ggml_type="IQ2_XXS"), importance=read_imatrix(path)
    )

    assert {t.written_type for t in plan.tensors} == {"IQ4_NL", "F32"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            dict.fromkeys(["blk.9.attn_q.weight", *LAYERS], 256),
            "tensors that the model does not have: blk.9.attn_q.weight; give the",
        ),
        (
            dict.fromkeys(["a", "b", "c", "d", "e", *LAYERS[:4]], 256),
            "does not have: a, b, c, d and 1 more;",
        ),
        (
            dict.fromkeys(LAYERS[:2], 256),
            r"no entry for 3 of the layers' 5 tensors: blk.2.attn_q.*blk.4.attn_q",
        ),
        ({"blk.0.attn_q.weight": 512}, "512 values for blk.0.attn_q.* needs 256"),
    ],
)
def test_the_matrix_of_another_model_is_refused(tmp_path, entries, message):
    path = write_imatrix(tmp_path / "i.gguf", entries)

    with pytest.raises(InputError, match=message) as caught:
        hand_made(EwqPolicy(), read_imatrix(path))
    assert caught.value.exit_code == 3


def test_tensors_without_an_entry_are_told_before_any_work(
    tiny, tmp_path, capsys, monkeypatch
):
    entries = matrices_of(tiny.layout)
    lacking = {n: v for n, v in entries.items() if "blk.1.ffn" not in n}
    path = write_imatrix(tmp_path / "i.gguf", lacking)
    monkeypatch.chdir(tmp_path)

    for command, out in (("plan", "p.json"), ("gguf", "o.gguf")):
        argv = [command, str(tiny.folder), "--imatrix", str(path), "-o", out]
        assert main([*argv, "--policy", "uniform:Q8_0"]) == 0
        assert " ".join(capsys.readouterr().err.split()).startswith(
            "ewq: i.gguf has no entry for 3 of the layers' 14 tensors, which are "
            "quantised without: blk.1.ffn_down.weight, blk.1.ffn_gate.weight, "
            "blk.1.ffn_up.weight"
        )


@pytest.mark.parametrize("command", ["plan", "gguf", "compare"])
def test_another_models_matrix_is_refused_before_any_work(
    tiny, deep, plain, tmp_path, capsys, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    text = ["--text", "domains"] if command == "compare" else []
    assert main([command, str(tiny.folder), "--imatrix", str(plain), *text]) == 3

    told = capsys.readouterr().err
    assert (
        "plain.gguf: has 256 values for blk.0.ffn_down.weight, which needs 96" in told
    )
    assert "scan" not in told
    assert "quantize" not in told


# Presets.


@pytest.mark.parametrize("preset", ["IQ2_XS", "IQ1_S", "Q2_K_S"])
def test_a_preset_that_needs_a_matrix_is_what_llama_quantize_makes(
    deep, plain, made, toolchain, tmp_path, preset
):
    options = Options(imatrix=plain)
    plan = api.plan(api.Run(deep.checkpoint, options), PresetPolicy(preset=preset))
    own = tmp_path / "own.gguf"
    tool = toolchain.tool("llama-quantize")
    argv = [tool, "--imatrix", plain, deep.base, own, preset]
    run(argv, stage="test", log_path=tmp_path / "log")

    out = made(plan, plain)

    assert tensor_bytes(out) == tensor_bytes(own)
    assert out.stat().st_size == plan.totals.file_size_bytes


def test_a_preset_without_the_matrix_or_entry_that_it_needs_is_refused(
    tiny, deep, tmp_path, capsys
):
    for preset in sorted(NEED_IMATRIX):
        assert main(["gguf", str(tiny.folder), "--policy", f"preset:{preset}"]) == 3
        told = capsys.readouterr().err
        assert f"{preset} needs an importance matrix, and none is given" in told
        assert told.count("\n") == 1

    lacking = {n: v for n, v in matrices_of(deep.layout).items() if ".1." not in n}
    path = write_imatrix(tmp_path / "i.gguf", lacking)
    with pytest.raises(InputError, match="blk.1.* cannot be IQ2_XS: i.gguf has no"):
        api.plan(
            api.Run(deep.checkpoint, Options(imatrix=path)),
            PresetPolicy(preset="IQ2_XS"),
        )


# Budgets.


def hand_made(policy, importance, n_bytes=None):
    scan = make_scan([1.0, 2.0, 3.0, 4.0, 10.0], layer=LAYER)
    ask = None if n_bytes is None else SizeTarget("test", n_bytes=n_bytes)
    layout = make_layout(scan)
    return make_plan(scan, policy, layout, budget=ask, importance=importance)


def weighing(names):
    """A matrix with entries for these tensors."""
    values = {n: 256 if n.startswith("blk") else 576 for n in names}
    record = Imatrix(
        file_name="i.gguf",
        file_sha256="0" * 64,
        n_entries=len(values),
        n_chunks=1,
        dataset=None,
    )
    return Importance(record, values, 0)


def least(policy, importance):
    """The smallest plan there is, found by the range that a refusal names."""
    with pytest.raises(InputError) as caught:
        hand_made(policy, importance, 1)
    n_bytes = str(caught.value).partition("reaches ")[2].split()[0].replace(",", "")
    return hand_made(policy, importance, int(n_bytes))


def test_below_the_ladder_a_matrix_gives_iq2_xxs_then_iq1_m():
    lowest = least(EwqPolicy(), weighing(LAYERS))
    size = lowest.totals.file_size_bytes

    assert decisions(lowest) == ["IQ1_M"] * 5
    steps = [
        decisions(hand_made(EwqPolicy(), weighing(LAYERS), size + n))
        for n in (2560, 5 * 2560, 5 * 2560 + 30_000)
    ]
    assert steps[0] == ["IQ1_M"] * 4 + ["IQ2_XXS"]
    assert steps[1] == ["IQ2_XXS"] * 5
    assert steps[2] == ["IQ2_XXS"] * 4 + ["Q4_K"]
    assert decisions(least(EwqPolicy(), None)) == ["TQ1_0"] * 5


def test_what_has_no_entry_passes_over_the_steps_that_need_one():
    policy = EwqPolicy(ladder=("IQ2_XXS", "Q3_K", "Q8_0"))
    lowest = least(policy, weighing([n for n in LAYERS if "2" not in n]))

    assert decisions(lowest) == ["IQ1_M", "IQ1_M", "Q3_K", "IQ1_M", "IQ1_M"]
    # Rows of 576: no step needs an entry where it is written as IQ4_NL.
    assert types(lowest)["token_embd.weight"] == "IQ2_XXS"
    assert types(lowest, "written_type")["token_embd.weight"] == "IQ4_NL"


def test_without_any_step_that_it_can_take_a_tensor_is_raw(planned, plain):
    policy = EwqPolicy(ladder=("IQ2_XXS", "IQ2_S"))
    plan = planned(policy, plain, share=0.5)

    assert types(plan)["token_embd.weight"] == "BF16"
    assert types(plan)["output.weight"] == "BF16"
    assert decisions(plan) == ["IQ2_S"] * 24


def test_a_ladder_that_is_as_low_has_no_floor():
    for ladder in (("IQ1_M", "Q4_K"), ("IQ1_S", "Q4_K"), ("TQ1_0", "Q4_K")):
        lowest = least(EwqPolicy(ladder=ladder), weighing(LAYERS))
        assert set(decisions(lowest)) == {ladder[0]}


def test_a_fixed_type_without_its_entry_is_refused_under_a_budget_too(planned, plain):
    policy = EwqPolicy(output_type="IQ2_XXS")

    with pytest.raises(InputError, match="output.weight: cannot be IQ2_XXS"):
        planned(policy, plain, share=0.5)


# The plan's own matrix, and no other.


def test_only_the_plans_own_matrix_is_taken(planned, made, plain, head, tmp_path):
    without, weighed = planned(EwqPolicy(), None), planned(EwqPolicy(), plain)

    for plan, path, message in (
        (weighed, head, "is not the plan's importance matrix plain.gguf"),
        (weighed, None, "is planned with the importance matrix plain.gguf; give it"),
        (without, plain, "the plan has no importance matrix; plan with it"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            made(plan, path)
        assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []
    copy = tmp_path / "by-another-name.gguf"
    copy.write_bytes(plain.read_bytes())
    check_imatrix(weighed, copy)


@pytest.mark.fault(46)
def test_an_edited_plan_is_refused_before_llama_quantize_runs(
    planned, made, deep, plain, tmp_path
):
    plan = planned(EwqPolicy(), plain)
    plan = with_types(plan, deep.layout, {"output.weight": "IQ3_XXS"})
    plan = plan.model_copy(update={"ftype": "Q8_0"})

    with pytest.raises(InputError, match="output.weight: cannot be IQ3_XXS"):
        check_imatrix(plan, plain)
    none = plan.model_copy(update={"imatrix": None})
    with pytest.raises(InputError, match="needs an importance matrix, and none is"):
        tensor_types(none)
    assert list(tmp_path.iterdir()) == []


def test_the_types_file_of_very_low_types_is_what_a_dry_run_gives(
    planned, deep, plain, toolchain
):
    for name in sorted(ggml_types.IMATRIX_TYPES):
        policy = UniformPolicy(ggml_type=name, embedding_type="raw", output_type="raw")
        plan = planned(policy, plain)
        found = dry_run(toolchain, deep.base, tensor_types(plan), plan.ftype)
        assert found == {t.name: t.written_type for t in plan.tensors}


# The command line.


def test_the_commands_take_it(deep, plain, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scan = Path("scan.json")
    scan.write_text(deep.scan.to_json())
    ewq = ["plan", scan, "--policy", "uniform:iq2_xs", "--imatrix", plain, "-q"]
    assert run_main(*ewq, "--embedding-type", "q4_k") == 3
    line = capsys.readouterr().err
    assert "output.weight: cannot be IQ2_XS: plain.gguf has no entry" in line
    assert run_main(*ewq, "--embedding-type", "q4_k", "--output-type", "Q6_K") == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == Path("plans/deep-24.uniform-IQ2_XS-embd-Q4_K-out-Q6_K-imatrix.json")
    plan = load_record(Plan, path, "test")
    assert path.name == f"{plan_name(plan)}.json"
    assert run_main("plan", "show", path) == 0
    assert "plain.gguf, 168 tensors, 4 chunks of text.txt" in capsys.readouterr().out
    own = ["quantize", path, deep.base, "-o", "o.gguf", "-q", "--no-load"]
    assert run_main(*own) == 3
    assert "give it: --imatrix FILE" in capsys.readouterr().err
    assert run_main(*own, "--imatrix", plain) == 0
    capsys.readouterr()
    assert run_main(*own, "--imatrix", plain, "--dry-run") == 0
    _, link, command = capsys.readouterr().out.splitlines()
    assert link == f"ln -s {plain} imatrix.gguf"
    assert " --imatrix imatrix.gguf " in command


def run_main(*args):
    return main([str(arg) for arg in args])


def test_everything_at_once_and_by_the_exported_script(
    deep, toolchain, head, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    policy = ["--policy", "uniform:IQ2_XXS", "--embedding-type", "Q4_K"]
    args = ["gguf", deep.folder, *policy, "--imatrix", head, "-o", "o.gguf", "-q"]
    assert run_main(*args, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"--imatrix {head}" in lines[2]
    assert lines[-2] == f"ln -s {head} imatrix.gguf"
    assert run_main(*args) == 0
    (path,) = Path("plans").iterdir()
    plan = load_record(Plan, path, "test")
    again = ["gguf", deep.folder, "--plan", path, "-o", "2.gguf", "-q"]
    assert run_main(*again) == 3
    assert run_main(*again, "--imatrix", head, "--no-load") == 0
    script = tmp_path / "make.sh"
    script.write_text(export_sh(plan))
    places = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {"LLAMA_CPP": str(toolchain.source_dir), "PATH": places}
    env["LLAMA_BIN"] = str(toolchain.bin_dir)
    other = ["sh", script, deep.folder, "3.gguf"]
    log = tmp_path / "sh.log"
    with pytest.raises(ChildError, match="is not the plan's importance matrix"):
        run([*other, script], stage="test", log_path=log, cwd=tmp_path, env=env)
    (tmp_path / "h.gguf").symlink_to(head)
    run([*other, "h.gguf"], stage="test", log_path=log, cwd=tmp_path, env=env)

    found = {store.sha256_file(Path(name)) for name in ("o.gguf", "2.gguf", "3.gguf")}
    assert len(found) == 1
    assert Path("o.gguf").stat().st_size == plan.totals.file_size_bytes


def test_the_matrix_is_read_before_any_weight(deep, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "scan", None)  # would be called for weights
    path = tmp_path / "i.gguf"
    path.write_bytes(b"no matrix")

    with pytest.raises(InputError, match="i.gguf: at byte 4: starts with"):
        api.plan(api.Run(deep.checkpoint, Options(imatrix=path)), EwqPolicy())


# Hostile files.

U32 = gguf.GGUFValueType.UINT32


def matrices_of(layout):
    """What llama-imatrix has an entry for, and how many values."""
    return {
        t.name: t.shape[-1]
        for t in layout.tensors
        if t.name.startswith("blk.") and len(t.shape) > 1
    }


def write_imatrix(
    path, entries, *, dataset="text.txt", n_chunks=4, lacks=(), kinds=None, values=None
):
    """A matrix of ones; what is to be wrong with it is told."""
    writer = gguf.GGUFWriter(str(path), "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    if "imatrix.datasets" not in lacks:
        names = [] if dataset is None else [dataset, "second.txt"]
        kind = gguf.GGUFValueType.ARRAY if names else gguf.GGUFValueType.UINT8
        writer.add_key_value("imatrix.datasets", names or 0, kind)
    for key, number in (("chunk_count", n_chunks), ("chunk_size", 64)):
        if key not in lacks:
            kind = (kinds or {}).get(key, U32)
            writer.add_key_value(f"imatrix.{key}", number, kind)
    for name, n in entries.items():
        shape = n if isinstance(n, tuple) else (n,)
        for part, size in (("in_sum2", shape), ("counts", (1,))):
            if part not in lacks:
                data = np.ones(size, np.float32)
                data = (values or {}).get(part, data)
                writer.add_tensor(f"{name}.{part}", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


Q = {"blk.0.attn_q.weight": 256}
ONES = np.ones(256, np.float32)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        pytest.param({"lacks": ["chunk_count"]}, "lacks imatrix.chunk_count", id="c"),
        pytest.param({"lacks": ["chunk_size"]}, "lacks imatrix.chunk_size", id="size"),
        pytest.param({"lacks": ["imatrix.datasets"]}, "lacks imatrix.data", id="data"),
        pytest.param({"lacks": ["counts"]}, "only one of sums and counts", id="counts"),
        pytest.param({"lacks": ["in_sum2"]}, "has no entry", id="sums"),
        pytest.param({"n_chunks": 1 << 31}, "is no number from 0", id="chunks"),
        pytest.param(
            {"kinds": {"chunk_count": gguf.GGUFValueType.INT32}}, "of type u32", id="i"
        ),
        pytest.param(
            {"kinds": {"chunk_size": gguf.GGUFValueType.UINT64}}, "of type u32", id="q"
        ),
        pytest.param(
            {"kinds": {"chunk_size": gguf.GGUFValueType.BOOL}}, "of type u32", id="bool"
        ),
        pytest.param({"values": {"in_sum2": ONES * np.nan}}, "non-finite", id="nan"),
        pytest.param({"values": {"in_sum2": ONES * np.inf}}, "non-finite", id="inf"),
        pytest.param({"values": {"in_sum2": -ONES}}, "negative", id="negative"),
        pytest.param({"values": {"counts": -ONES[:1]}}, "negative", id="minus"),
        pytest.param(
            {"values": {"in_sum2": ONES.astype(np.float16)}}, "is F16", id="f16"
        ),
        pytest.param({"values": {"counts": ONES[:3]}}, "shapes", id="three"),
    ],
)
def test_a_matrix_that_llama_quantize_could_not_use_is_refused(
    tmp_path, wrong, message
):
    read_imatrix(write_imatrix(tmp_path / "sound.gguf", Q))
    path = write_imatrix(tmp_path / "i.gguf", Q, **wrong)

    with pytest.raises(InputError, match=message) as caught:
        read_imatrix(path)
    assert caught.value.exit_code == 3
    assert "give a GGUF file of llama-imatrix" in caught.value.remedy


def test_an_old_dat_is_refused_with_the_command_that_converts_it(
    deep, plain, toolchain, tmp_path
):
    tool = [toolchain.tool("llama-imatrix"), "-m", deep.base]
    old, new = tmp_path / "old.dat", tmp_path / "new.gguf"
    log = tmp_path / "log"
    dat = [*tool, "--in-file", plain, "-o", old, "--output-format", "dat"]
    run(dat, stage="test", log_path=log)

    with pytest.raises(InputError, match="--in-file OLD.dat -o NEW.gguf"):
        read_imatrix(old)
    run([*tool, "--in-file", old, "-o", new], stage="test", log_path=log)
    assert read_imatrix(new).n_values == read_imatrix(plain).n_values


def test_cut_or_foreign_files_are_refused(deep, plain, tmp_path):
    data = plain.read_bytes()
    path = tmp_path / "i.gguf"
    for n_bytes in [*range(0, 400, 7), len(data) // 2, len(data) - 30]:
        path.write_bytes(data[:n_bytes])
        with pytest.raises(InputError):
            read_imatrix(path)
    for other in (deep.base, tmp_path / "absent", tmp_path):
        with pytest.raises(InputError):
            read_imatrix(other)


def test_flipped_bytes_are_refused_or_read(plain, tmp_path):
    data = bytearray(plain.read_bytes())
    path = tmp_path / "i.gguf"
    rng = np.random.default_rng(0)
    for _ in range(300):
        # Nothing else may be raised.
        at, old = int(rng.integers(0, 2000)), bytes(data)
        data[at] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        with suppress(InputError):
            read_imatrix(path)
        data[:] = old


def test_experts_have_a_value_for_each_column_of_each(tmp_path):
    shape = (4, 256)
    path = write_imatrix(tmp_path / "i.gguf", {"blk.0.ffn_up_exps.weight": shape})

    assert read_imatrix(path).n_values == {"blk.0.ffn_up_exps.weight": prod(shape)}

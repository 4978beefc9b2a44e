"""`ewq imatrix`: importance matrices by the real llama-imatrix, on any text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.cli import main
from ewq_gguf.errors import ChildError, InputError
from ewq_gguf.llamacpp.calibrate import calibrate
from ewq_gguf.llamacpp.ggml import Ggml
from ewq_gguf.llamacpp.imatrix import importance_values
from ewq_gguf.llamacpp.perturb import PerturbedCopy
from ewq_gguf.llamacpp.quant_error import error_of, quant_errors, sample
from ewq_gguf.optimal.error_table import error_table
from tests.checkpoints import write_llama
from tests.gguf_files import Tiny

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [pytest.mark.llamacpp, pytest.mark.usefixtures("own_cache")]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("the river runs past an old stone house " * 400)
    return path


def test_the_head_is_weighed_too_and_every_column_has_a_value(
    tiny: Tiny, toolchain, text, tmp_path
):
    out = tmp_path / "matrix.gguf"

    found = calibrate(tiny.base, text, out, toolchain, n_threads=1, n_chunks=2)

    assert found.record.n_chunks == 2
    assert found.record.dataset == "calibration.txt"  # no path of this machine
    values = importance_values(out)
    for tensor in tiny.layout.tensors:
        if tensor.name in values:
            assert values[tensor.name].shape[-1] == tensor.shape[-1]
            assert (values[tensor.name] >= 0).all()
    assert {"blk.0.ffn_down.weight", "output.weight"} <= values.keys()


def test_a_text_that_is_too_short_is_refused_with_both_numbers(
    tiny: Tiny, toolchain, tmp_path
):
    text = tmp_path / "short.txt"
    text.write_text("a few words")

    with pytest.raises(InputError, match="has 11 bytes, 1024 tokens are needed"):
        calibrate(tiny.base, text, tmp_path / "m.gguf", toolchain, n_threads=1)
    assert not (tmp_path / "m.gguf").exists()


def test_what_llama_imatrix_says_of_a_short_text_is_passed_on(
    tiny: Tiny, toolchain, text, tmp_path, monkeypatch
):
    # Its log's thread loses the lines when a tiny model ends at once: not run for real.
    error = ChildError("imatrix", "llama-imatrix", "exit code 1", "")
    error.log_tail = (
        "compute_imatrix: you need at least 1024 tokens for a context of 512 tokens",
        "compute_imatrix: the data file you provided tokenizes to only 1010 tokens",
    )

    def run(*_args, **_more):
        raise error

    monkeypatch.setattr("ewq_gguf.llamacpp.calibrate.run", run)
    with pytest.raises(InputError, match="has 1010 tokens, 1024 are needed"):
        calibrate(tiny.base, text, tmp_path / "m.gguf", toolchain, n_threads=1)


def test_the_command_takes_a_text_or_the_models_own_and_gives_the_same_bytes_again(
    tiny: Tiny, text, tmp_path, capsys
):
    given = ["imatrix", str(tiny.folder), "--threads", "1", "-q"]
    own, other, again = (tmp_path / f"{n}.gguf" for n in ("own", "other", "again"))

    assert main([*given, "-o", str(own), "--chunks", "2"]) == 0
    assert capsys.readouterr().out.strip() == str(own)
    assert main([*given, "-o", str(again), "--chunks", "2"]) == 0
    assert own.read_bytes() == again.read_bytes()
    argv = [*given, "-o", str(other), "--calibration", str(text), "--chunks", "2"]
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_chunks"] == 2
    assert other.read_bytes() != own.read_bytes()
    assert main(argv) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*given, "-o", str(text), "--calibration", str(text), "--force"]) == 2


@pytest.mark.parametrize(
    "argv",
    [
        ["imatrix", "M", "-o", "o.gguf"],
        ["gguf", "M", "-o", "o.gguf", "--policy", "optimal", "--budget", "60%"],
        ["plan", "M", "-o", "o.json", "--policy", "optimal", "--budget", "60%"],
    ],
    ids=lambda argv: argv[0],
)
def test_a_text_that_is_not_there_is_said_before_any_work(
    argv, own_cache, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "M")

    assert main([*argv, "--calibration", "missing.txt"]) == 3

    assert "missing.txt: cannot be read (No such file" in capsys.readouterr().err
    assert not list(own_cache.glob("*/M-*.gguf"))


# ggml's quantisers, errors, and bases that are moved.


@pytest.fixture
def ggml(toolchain) -> Ggml:
    return Ggml(toolchain.lib_dir)


@pytest.mark.parametrize("ggml_type", ["Q8_0", "Q4_0", "Q5_1", "IQ4_NL"])
def test_rows_become_the_blocks_that_llama_quantize_writes(
    tiny: Tiny, toolchain, ggml, tmp_path, ggml_type
):
    from ewq_gguf.llamacpp.quantize import quantize

    out = tmp_path / "out.gguf"
    plan = tiny.plan(ggml_type)
    quantize(plan, tiny.base, out, toolchain, n_threads=1, load=False)
    written = {tensor.name: tensor for tensor in read_gguf(out).tensors}
    base = {tensor.name: tensor for tensor in read_gguf(tiny.base).tensors}
    name = "blk.0.ffn_up.weight"

    with tiny.base.open("rb") as file:
        rows = sample(file.fileno(), tiny.base, base[name], 1.0, None).rows
    blocks = ggml.quantize(rows, ggml_type)

    data = out.read_bytes()
    begin = written[name].offset
    assert blocks.tobytes() == data[begin : begin + written[name].size_bytes]


def test_an_error_is_that_of_the_dequantised_rows(ggml):
    random = np.random.default_rng(0)
    rows = random.standard_normal((8, 64)).astype(np.float32)
    weight = random.uniform(0.1, 3, 64).astype(np.float32)
    from ewq_gguf.llamacpp.quant_error import Sample

    sampled = Sample(rows, np.zeros(8, np.int64), weight[None], 8)

    error, stderr, plain = error_of(ggml, sampled, "Q4_0")

    moved = ggml.dequantize(ggml.quantize(rows, "Q4_0", weight), "Q4_0", 64)
    lost, energy = (x.astype(np.float64) ** 2 for x in (rows - moved, rows))
    assert error == pytest.approx((weight * lost).sum() / (weight * energy).sum())
    assert plain == pytest.approx(lost.sum() / energy.sum())
    assert stderr == 0.0  # all rows were there


def test_errors_of_sampled_rows_are_those_of_all_within_their_own_error(deep, ggml):
    tensors = [t for t in read_gguf(deep.base).tensors if "ffn_up" in t.name][:6]
    types = ("Q8_0", "Q6_K", "Q4_K", "Q2_K")
    wanted = [(tensor, types) for tensor in tensors]

    few = list(quant_errors(deep.base, wanted, ggml, share=0.25, n_threads=2))
    whole = {e.name: e for e in quant_errors(deep.base, wanted, ggml, share=1.0)}

    assert len(few) == len(whole) == len(tensors) * len(types)
    for one in few:
        assert abs(one.error - whole[one.name].error) < 5 * one.error_stderr
    by_type = {
        ggml_type: np.mean([e.error for e in few if e.name.endswith(f" {ggml_type}")])
        for ggml_type in types
    }
    assert sorted(by_type.values()) == list(by_type.values())


def test_an_abort_of_ggml_is_an_error_that_names_the_tensor_and_the_type(
    deep, toolchain, own_cache
):
    """ggml asserts that IQ2_XXS has an importance matrix."""
    names = [t.name for t in read_gguf(deep.base).tensors if "ffn_up" in t.name][:2]
    types = {names[0]: ["Q8_0"], names[1]: ["Q8_0", "IQ2_XXS"]}

    with pytest.raises(ChildError, match="SIGABRT") as caught:
        error_table(deep.base, types, toolchain.lib_dir)

    assert f"{names[1]} as IQ2_XXS" in str(caught.value)
    # What was measured is kept.
    types[names[1]].remove("IQ2_XXS")
    table = error_table(deep.base, types, toolchain.lib_dir)
    assert 0.0 < table[names[1]]["Q8_0"].error < 1e-3


def test_a_base_is_moved_to_what_a_type_holds_and_back(tiny: Tiny, ggml, tmp_path):
    base = tiny.base.read_bytes()
    copy = PerturbedCopy(tiny.base, tmp_path / "copy.gguf", ggml, {}, n_threads=2)
    names = {t.name: t for t in read_gguf(tiny.base).tensors}
    tensor = names["blk.1.attn_q.weight"]

    with copy.perturbed([tensor.name], "Q4_0") as path:
        moved = path.read_bytes()
        changed = np.flatnonzero(
            np.frombuffer(base, np.uint8) != np.frombuffer(moved, np.uint8)
        )
        assert changed.size
        assert changed.min() >= tensor.offset
        assert changed.max() < tensor.offset + tensor.size_bytes
        with path.open("rb") as file:
            rows = sample(file.fileno(), path, tensor, 1.0, None).rows
        # What a type holds already it holds again, but for the rounding to BF16.
        again = ggml.dequantize(ggml.quantize(rows, "Q8_0"), "Q8_0", rows.shape[1])
        assert np.abs(again - rows).max() <= np.abs(rows).max() / 127
    assert copy.path.read_bytes() == base


def test_what_a_killed_process_left_overwritten_is_restored(tiny: Tiny, ggml, tmp_path):
    base = tiny.base.read_bytes()
    path = tmp_path / "copy.gguf"
    name = "blk.1.attn_q.weight"
    with PerturbedCopy(tiny.base, path, ggml, {}).perturbed([name], "Q4_0"):
        for file in list(tmp_path.iterdir()):  # as a killed process leaves them
            shutil.copyfile(file, file.with_stem("left"))
    left = tmp_path / "left.gguf"
    assert left.read_bytes() != base

    copy = PerturbedCopy(tiny.base, left, ggml, {})

    assert copy.path.read_bytes() == base
    assert [file.name for file in tmp_path.glob("left*")] == ["left.gguf"]

"""Plans from the proof of concept and from other GGUF files."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from ewq_gguf.api import Run, import_plan
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.cli import main
from ewq_gguf.errors import InputError
from ewq_gguf.llamacpp.quantize import quantize
from ewq_gguf.plan.assemble import assemble
from ewq_gguf.plan.check import check_sound
from ewq_gguf.plan.imported import gguf_types, poc_types
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.process import run
from ewq_gguf.records import (
    ImportedPolicy,
    LayoutTensor,
    Plan,
    Source,
    UniformPolicy,
    load_record,
)
from tests.gguf_files import make_tiny
from tests.scans import MODEL, make_scan, subject_of

pytest_plugins = ["tests.toolchain_fixtures"]

#: Two layers, named as in the file and as in the checkpoint; no head: tied embeddings.
SHAPES = {
    "token_embd.weight": ("model.embed_tokens.weight", (64, 256)),
    "blk.0.attn_norm.weight": ("model.layers.0.input_layernorm.weight", (256,)),
    "blk.0.attn_q.weight": ("model.layers.0.self_attn.q_proj.weight", (256, 256)),
    "blk.0.attn_q_norm.weight": ("model.layers.0.self_attn.q_norm.weight", (64,)),
    "blk.0.ffn_down.weight": ("model.layers.0.mlp.down_proj.weight", (256, 512)),
    "blk.1.attn_q.weight": ("model.layers.1.self_attn.q_proj.weight", (256, 256)),
    "blk.1.ffn_down.weight": ("model.layers.1.mlp.down_proj.weight", (256, 512)),
}
MATRICES = [name for name, (_, shape) in SHAPES.items() if len(shape) > 1]
FOUND = {
    name: (shape, "Q6_K" if len(shape) > 1 else "F32")
    for name, (_, shape) in SHAPES.items()
}


@pytest.fixture
def subject() -> ModelTensors:
    tensors = tuple(
        LayoutTensor(
            name=name,
            shape=shape,
            ggml_type="F16" if len(shape) > 1 else "F32",
            sources=(Source(hf_name=hf_name),),
        )
        for name, (hf_name, shape) in SHAPES.items()
    )
    return ModelTensors(MODEL, tensors, "F16", None, None)


# What a file says.


def test_a_plan_by_layer_is_about_its_matrices(subject):
    entries = {"0": "4-bit", "1": "8-bit"}
    for values in (entries, {"plan": entries}):
        imported = poc_types(values, subject, "p.json")
        assert imported.types == {
            "blk.0.attn_q.weight": "Q4_K",
            "blk.0.ffn_down.weight": "Q4_K",
            "blk.1.attn_q.weight": "Q8_0",
            "blk.1.ffn_down.weight": "Q8_0",
        }
        assert imported.notes == ("1 not named, which stay F16: token_embd.weight",)


def test_a_plan_by_tensor_in_the_proof_of_concepts_own_form(subject):
    """With a head that the model lacks, norms of any name, and its summary."""
    values = {
        "plan": {
            "output.weight": "f16",
            "token_embd.weight": "f16",
            "output_norm.weight": "f16",
            "blk.0.attn_q.weight": "Q8_0",
            "blk.0.q_norm.weight": "Q4_K",
            "blk.0.ffn_down.weight": "Q4_K",
            "blk.0.attn_norm.weight": "f16",
            "blk.1.attn_q.weight": "COPY",
        },
        "analysis_summary": {"total_tensors": 8, "granularity": "tensor-level"},
    }
    imported = poc_types(values, subject, "p.json")
    assert imported.types == {
        "token_embd.weight": "F16",
        "blk.0.attn_q.weight": "Q8_0",
        "blk.0.ffn_down.weight": "Q4_K",
        "blk.1.attn_q.weight": "F16",
    }
    assert imported.notes == (
        "4 left out, which llama-quantize never quantises or the model lacks: "
        "output.weight, output_norm.weight, blk.0.q_norm.weight, ...",
        "1 not named, which stay F16: blk.1.ffn_down.weight",
    )


def test_a_tensor_wins_over_its_layer_in_either_vocabulary(subject):
    values = {
        "model.layers.1.self_attn.q_proj.weight": "q6_k",
        "0": "raw",
        "1": "4bit",
    }
    types = poc_types(values, subject, "p.json").types
    assert types["blk.1.attn_q.weight"] == "Q6_K"
    assert types["blk.1.ffn_down.weight"] == "Q4_K"
    assert types["blk.0.attn_q.weight"] == "F16"


@pytest.mark.parametrize(
    ("value", "ggml_type"),
    [
        ("raw", "F16"),
        ("8-bit", "Q8_0"),
        ("8bit", "Q8_0"),
        ("4-bit", "Q4_K"),
        ("4 bit", "Q4_K"),
        ("1.58-bit", "TQ1_0"),
        ("Q4_K", "Q4_K"),
        ("q8_0", "Q8_0"),
        ("f16", "F16"),
        ("bF16", "BF16"),
        (" iq4_nl ", "IQ4_NL"),
    ],
)
def test_precisions_have_many_names(subject, value, ggml_type):
    types = poc_types({"0": value}, subject, "p.json").types
    assert set(types.values()) == {ggml_type}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param([], "is not a JSON object", id="list"),
        pytest.param({}, "names no layer and no tensor", id="empty"),
        pytest.param({"plan": []}, "names no layer and no tensor", id="list-inside"),
        pytest.param({"schema_name": "ewq.plan"}, "is an ewq.plan file", id="ours"),
        pytest.param({"2": "raw"}, "names layer 2, the model has 0 to 1", id="layer"),
        pytest.param(
            {"blk.0.attn_qq.weight": "Q8_0"},
            "no tensor blk.0.attn_qq.weight; the nearest name is blk.0.attn_q.weight",
            id="tensor",
            marks=pytest.mark.fault(42),
        ),
        pytest.param({"-1": "raw"}, "the model has no tensor -1", id="minus"),
        pytest.param({"²": "raw"}, "the model has no tensor ²", id="square"),
        pytest.param(
            {"0": "q4_k_m"},
            "at /0: 'q4_k_m' is a preset for whole files; use a ggml type such as Q4_K",
            id="preset",
            marks=pytest.mark.fault(43),
        ),
        pytest.param(
            {"0": "Q5_L"},
            "at /0: 'Q5_L' is a preset",
            id="l",
            marks=pytest.mark.fault(43),
        ),
        pytest.param({"0": "gut"}, "at /0: 'gut' is no type", id="type"),
        pytest.param({"0": "5-bit"}, "at /0: '5-bit' is no type", id="five"),
        pytest.param({"0": 4}, "at /0: 4 is no type", id="number"),
        pytest.param({"0": {"a": 1}}, "at /0: .* is no type", id="object"),
        pytest.param(
            {"0": "IQ2_XXS"},
            "at /0: IQ2_XXS needs an importance matrix, and none is given; import",
            id="imatrix",
            marks=pytest.mark.fault(46),
        ),
        pytest.param({"x" * 10**6: "raw"}, "has no tensor xxx", id="long"),
    ],
)
def test_what_cannot_be_followed_is_refused(subject, values, message):
    with pytest.raises(InputError, match=message) as caught:
        poc_types(values, subject, "p.json")
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith("plan: p.json: ")
    assert len(str(caught.value)) < 3000


def test_parts_of_one_tensor_must_agree(subject):
    parts = tuple(Source(hf_name=f"experts.{i}.weight") for i in range(3))
    experts = LayoutTensor(
        name="blk.0.ffn_up_exps.weight", shape=(3, 64, 256), ggml_type="F16"
    ).model_copy(update={"sources": parts})
    moe = ModelTensors(MODEL, (experts,), "F16", None, None)
    same = {f"experts.{i}.weight": "Q8_0" for i in range(3)}
    assert poc_types(same, moe, "p").types == {experts.name: "Q8_0"}
    with pytest.raises(InputError, match="/experts.2.weight: Q4_K, and Q8_0 for ano"):
        poc_types(same | {"experts.2.weight": "Q4_K"}, moe, "p")


def test_a_gguf_files_types_are_taken_and_its_norms_are_not(subject):
    found = FOUND | {"blk.0.attn_norm.weight": ((256,), "F16")}
    imported = gguf_types(found, subject, "f.gguf")
    assert imported.types == dict.fromkeys(MATRICES, "Q6_K")
    assert "1 left out" in imported.notes[0]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        pytest.param(
            FOUND | {"blk.2.attn_q.weight": ((256, 256), "Q6_K")},
            "the model has no tensor blk.2.attn_q.weight; the nearest name is blk.1",
            id="extra",
            marks=pytest.mark.fault(42),
        ),
        pytest.param(
            {"token_embd.weight": FOUND["token_embd.weight"]},
            "lacks 6 of the model's 7 tensors: blk.0.attn_norm.weight, blk.0.attn_q",
            id="missing",
        ),
        pytest.param(
            FOUND | {"blk.0.attn_q.weight": ((256, 512), "Q6_K")},
            r"blk.0.attn_q.weight has shape \(256, 512\), the model's \(256, 256\)",
            id="shape",
        ),
        pytest.param(
            FOUND | {"blk.0.attn_q.weight": ((256, 256), "IQ2_XXS")},
            "at blk.0.attn_q.weight: IQ2_XXS needs an importance matrix",
            id="imatrix",
            marks=pytest.mark.fault(46),
        ),
        pytest.param(
            FOUND | {"blk.0.attn_q.weight": ((256, 256), "Q8_K")},
            "at blk.0.attn_q.weight: Q8_K cannot be planned",
            id="activation-type",
        ),
    ],
)
def test_a_gguf_of_another_model_is_refused(subject, found, message):
    with pytest.raises(InputError, match=message):
        gguf_types(found, subject, "f.gguf")


@pytest.mark.fault(47)
def test_rows_that_do_not_divide_are_planned_as_they_will_be_written():
    scan = make_scan([1.0])  # rows of 576
    subject = subject_of(scan)
    types = poc_types({"0": "4-bit"}, subject, "p.json").types
    policy = ImportedPolicy(source="poc", file_name="p.json", file_sha256="0" * 64)
    plan = assemble(subject, policy, types)
    check_sound(plan)
    written = {t.name: t.written_type for t in plan.tensors}
    assert written["blk.0.attn_q.weight"] == "Q5_0"
    assert written["blk.0.ffn_down.weight"] == "Q4_K"


@pytest.mark.parametrize(
    ("dtype", "raw"), [("BF16", "BF16"), ("F16", "F16"), ("F32", "BF16")]
)
def test_raw_of_a_layout_is_its_matrices_16_bit_type(dtype, raw):
    scan = make_scan([1.0], dtype=dtype)
    assert subject_of(scan).raw_type == raw
    assert subject_of(scan, "F16").raw_type == "F16"


# To the end, with the real toolchain.


@pytest.fixture(scope="module")
def wide(tmp_path_factory, session_cache, toolchain):
    """Three layers with rows of 256, so that presets mix their types."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    return make_tiny(folder, session_cache, toolchain, n_layers=3, hidden=256, ffn=256)


@pytest.fixture(scope="module")
def preset(wide, toolchain, tmp_path_factory) -> Path:
    """What llama-quantize makes of the model as Q4_K_M."""
    out: Path = tmp_path_factory.mktemp("preset") / "wide-Q4_K_M.gguf"
    argv = [toolchain.tool("llama-quantize"), wide.base, out, "Q4_K_M", "1"]
    run(argv, stage="test", log_path=out.with_suffix(".log"))
    return out


@pytest.mark.llamacpp
def test_a_presets_types_are_imported_and_made_again(
    wide, preset, own_cache, toolchain, tmp_path
):
    plan = import_plan(Run(wide.checkpoint), preset)
    theirs = {t.name: t.ggml_type for t in read_gguf(preset).tensors}
    assert {"Q4_K", "Q6_K", "F32"} <= set(theirs.values())
    assert {t.name: t.ggml_type for t in plan.tensors} == theirs
    assert {t.name: t.written_type for t in plan.tensors} == theirs
    assert plan.weights_sha256 is None
    assert isinstance(plan.policy, ImportedPolicy)
    assert (plan.policy.source, plan.policy.file_name) == ("gguf", preset.name)

    out = tmp_path / "again.gguf"
    quantize(plan, wide.base, out, toolchain, n_threads=1)  # verifies every tensor
    assert {t.name: t.ggml_type for t in read_gguf(out).tensors} == theirs
    assert out.stat().st_size == plan.totals.file_size_bytes
    assert not plan.totals.is_estimate


@pytest.mark.llamacpp
def test_a_scan_and_its_model_give_the_same_plan(wide, preset, own_cache):
    assert import_plan(Run(wide.scan), preset) == import_plan(
        Run(wide.checkpoint), preset
    )


@pytest.mark.llamacpp
def test_the_command_line_imports_quantises_and_verifies(
    wide, own_cache, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    poc = tmp_path / "quant_plan_0.json"
    poc.write_text(json.dumps({"plan": {"0": "raw", "1": "4-bit", "2": "8-bit"}}))
    assert main(["plan", "import", str(poc), str(wide.folder)]) == 0
    printed = capsys.readouterr()
    path = Path(printed.out.strip())
    assert path.name.startswith("wide.imported-")
    said = " ".join(printed.err.split())
    assert "quant_plan_0.json: 2 not named, which stay BF16" in said
    plan = load_record(Plan, path, "test")
    assert [layer.ggml_type for layer in plan.layers] == ["BF16", "Q4_K", "Q8_0"]
    out = tmp_path / "out.gguf"
    assert main(["quantize", str(path), str(wide.base), "-o", str(out), "-q"]) == 0
    assert out.stat().st_size == plan.totals.file_size_bytes
    assert main(["gguf", str(wide.folder), "--plan", str(path), "-q"]) == 0
    assert main(["plan", "show", str(path)]) == 0
    assert "imported:poc:file=quant_plan_0.json:" in capsys.readouterr().out


# Hostile files.


@pytest.fixture
def scan_file(tmp_path, own_cache) -> Path:
    path: Path = tmp_path / "scan.json"
    path.write_text(make_scan([1.0, 2.0]).to_json())
    return path


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"a":' * 100_000, "is not JSON"),
        (b"[" * 1_000_000, "is not JSON"),
        (b'{"0": "raw", "0": "4-bit"}', "duplicate key '0'"),
        (b"GGUF", "at byte 4: "),
        (b"GGUF" + b"\xff" * 64, "GGUF version"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, "tensors do not fit"),
        (b'{"\x1b[31m": "raw"}', "is not JSON"),
        (b'{"\\u001b[31m\\u0000": "raw"}', r"no tensor \x1b[31m\x00"),
    ],
)
@pytest.mark.fault(52)
def test_a_hostile_file_is_one_line(tmp_path, scan_file, capsys, data, message):
    file = tmp_path / "quant_plan_x.json"
    file.write_bytes(data)
    assert main(["plan", "import", str(file), str(scan_file)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ewq: plan: ")
    assert line.isprintable()
    assert message in line


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: None])
def test_what_is_no_file_is_refused_and_not_waited_for(
    tmp_path, scan_file, capsys, make
):
    file = tmp_path / "plan"
    make(file)
    assert main(["plan", "import", str(file), str(scan_file)]) == 3
    assert "is no file; check the path" in capsys.readouterr().err


def test_a_part_of_a_split_file_is_refused(tmp_path, scan_file, capsys):
    writer = gguf.GGUFWriter(str(tmp_path / "part.gguf"), "llama")
    writer.add_uint16("split.count", 2)
    writer.add_tensor("token_embd.weight", np.zeros((64, 576), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    args = ["plan", "import", str(tmp_path / "part.gguf"), str(scan_file)]
    assert main(args) == 3
    assert "is one of 2 parts; join them first" in capsys.readouterr().err


# Export.


@pytest.fixture
def plan_file(tmp_path) -> Path:
    scan = make_scan([1.0, 2.0])
    subject = subject_of(scan)
    types = poc_types({"0": "4-bit"}, subject, "p.json").types
    path: Path = tmp_path / "plan.json"
    plan = assemble(subject, UniformPolicy(ggml_type="raw"), types)
    path.write_text(plan.to_json())
    return path


def test_a_table_of_the_tensors(plan_file, capsys):
    assert main(["plan", "export", str(plan_file), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    plan = load_record(Plan, plan_file, "test")
    assert [row["name"] for row in rows] == [t.name for t in plan.tensors]
    assert rows[2] == {
        "name": "blk.0.attn_q.weight",
        "role": "attn_q",
        "layer": "0",
        "shape": "576x576",
        "base_type": "BF16",
        "ggml_type": "Q4_K",
        "written_type": "Q5_0",
        "size_bytes": "228096",
        "bpw": "5.5000",
    }
    assert rows[0]["layer"] == ""


def test_the_plan_itself_in_canonical_form(plan_file, tmp_path, capsys):
    values = json.loads(plan_file.read_text())
    plan_file.write_text(json.dumps(values))  # another spelling of the same
    out = tmp_path / "out.json"
    args = ["plan", "export", str(plan_file), "--format", "json", "-o", str(out)]
    assert main(args) == 0
    assert out.read_text() == load_record(Plan, plan_file, "test").to_json()


def test_a_layer_has_one_spelling(subject):
    with pytest.raises(InputError, match="has no tensor 01"):
        poc_types({"1": "4-bit", "01": "8-bit"}, subject, "plan.json")

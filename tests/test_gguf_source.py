"""An unquantised GGUF file as the source of scans, plans and mixed files."""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from ewq_gguf import api
from ewq_gguf.api import Options, make_gguf
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.checkpoint.source import Opening, open_checkpoint
from ewq_gguf.cli import main
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.llamacpp.export_script import export_sh
from ewq_gguf.llamacpp.layout import layout_of
from ewq_gguf.process import python_argv
from ewq_gguf.records import EwqPolicy, Measures, UniformPolicy
from tests.checkpoints import write_llama
from tests.gguf_files import make_tiny, write_gguf
from tests.range_server import Faults, serve

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [pytest.mark.llamacpp, pytest.mark.usefixtures("own_cache")]

QUICK = Options(n_threads=1, load=False)

#: A Llama of one layer, with nothing but what llama-quantize asks for.
TENSORS = {
    "token_embd.weight": (64, 256),
    "blk.0.attn_norm.weight": (256,),
    "blk.0.ffn_up.weight": (256, 256),
    "blk.0.ffn_gate_exps.weight": (3, 256, 256),
    "output_norm.weight": (256,),
    "output.weight": (64, 256),
}


@pytest.fixture
def source(tiny, tmp_path) -> Path:
    """The base GGUF of the tiny checkpoint, as somebody would download it."""
    return Path(shutil.copy(tiny.base, tmp_path / "tiny-BF16.gguf"))


def write_source(path: Path, kv=(), tensors=TENSORS, *, dtype=np.float16, align=None):
    """A GGUF of seeded weights; `kv` are (key, value) pairs, 1-D tensors are F32."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    if align:
        writer.add_custom_alignment(align)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in kv:
        if isinstance(value, str):
            writer.add_string(key, value)
        elif key.startswith("split."):
            writer.add_uint16(key, value)
        else:
            writer.add_uint32(key, value)
    for name, shape in tensors.items():
        values = rng.standard_normal(shape)
        writer.add_tensor(name, values.astype(np.float32 if len(shape) == 1 else dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def made_from(path: Path, out: Path, policy=None):
    """The file made of a GGUF; its real size is the predicted one."""
    made = make_gguf(str(path), out, policy, options=QUICK)
    totals = made.plan.totals
    assert not totals.is_estimate
    assert out.stat().st_size == totals.file_size_bytes
    planned = {t.name: t.written_type for t in made.plan.tensors}
    assert {t.name: t.ggml_type for t in read_gguf(out).tensors} == planned
    return made


# Sound ones.


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_scan_is_that_of_the_checkpoint(dtype, tmp_path, session_cache, toolchain):
    made = make_tiny(tmp_path / "model", session_cache, toolchain, dtype=dtype)

    found = api.scan(api.Run(str(made.base)))

    wanted = {tensor.name: tensor for tensor in made.scan.tensors}
    assert [t.name for t in found.tensors] == list(wanted)
    assert found.dropped == ()
    assert {t.dtype for t in found.tensors if len(t.shape) > 1} == {dtype}
    for tensor in found.tensors:
        other = wanted[tensor.name].model_copy(update={"hf_names": (tensor.name,)})
        # Norms become F32, and a Llama's rows of attn_q and attn_k are permuted: 32-bit
        # weights are summed in another order then.
        is_permuted = tensor.role in ("attn_q", "attn_k")
        if tensor.dtype == other.dtype and not (dtype == "F32" and is_permuted):
            assert tensor == other
        else:
            assert tensor.shape == other.shape
            numbers, others = (
                [getattr(t, name) for name in NUMBERS] for t in (tensor, other)
            )
            assert numbers == pytest.approx(others, rel=1e-9, abs=1e-9)


#: What does not depend on how a weight is stored.
NUMBERS = (
    "n_weights", "n_nonfinite", "softmax_entropy_nats", "histogram_entropy_bits",
    "mean", "std", "min", "max", "excess_kurtosis", "outlier_share", "zero_share",
)  # fmt: skip


def test_the_identity_is_the_files(tiny, source):
    found = open_checkpoint(str(source), Opening(architectures={"OnlyThis"}))

    assert found.identity.is_gguf
    assert not tiny.checkpoint.identity.is_gguf
    assert found.identity.name == tiny.checkpoint.identity.name == "tiny-BF16"
    assert found.identity.hf_architecture == "llama"
    assert found.identity.n_layers == 2
    assert [shard.name for shard in found.identity.shards] == ["tiny-BF16.gguf"]
    assert len(found.shards[0].header.raw) == read_gguf(source).data_offset
    assert found.is_mapped_by_name


@pytest.mark.parametrize("name", ["../up", "Two words", "", ".hidden"])
def test_a_name_that_is_no_file_name_is_not_taken(name, tmp_path):
    path = write_source(tmp_path / "my.model.gguf", [("general.name", name)])

    assert open_checkpoint(str(path)).identity.name == "my.model"


def test_a_gguf_is_known_by_its_first_bytes(source, tmp_path):
    blob = shutil.copy(source, tmp_path / "sha256-0123")

    assert open_checkpoint(str(blob)).identity.name == "tiny-BF16"


@pytest.mark.parametrize(
    "policy", [None, UniformPolicy(ggml_type="Q8_0"), UniformPolicy(ggml_type="F16")]
)
def test_the_file_made_of_it_has_the_predicted_bytes(
    policy, tiny, source, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = source.read_bytes()

    made = made_from(source, tmp_path / "out.gguf", policy)

    assert source.read_bytes() == before
    assert made.plan_path
    assert made.plan_path.is_file()
    assert not list(tmp_path.glob(".*"))
    by_checkpoint = api.plan(api.Run(tiny.checkpoint), made.plan.policy)
    assert made.plan.totals == by_checkpoint.totals
    assert made.preset_bytes == {
        **tiny.layout.preset_bytes, "BF16": source.stat().st_size
    }  # fmt: skip
    again = make_gguf(str(source), tmp_path / "out.gguf", policy, options=QUICK)
    assert again.is_reused


def test_nothing_is_copied_into_the_cache(source, own_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set((own_cache / "base").glob("*"))

    made_from(source, tmp_path / "out.gguf", UniformPolicy(ggml_type="Q5_0"))

    assert set((own_cache / "base").glob("*")) == before


@pytest.mark.parametrize(
    "kv",
    [
        pytest.param((), id="none"),
        pytest.param([("general.file_type", 1)], id="file-type"),
        pytest.param([("general.quantization_version", 2)], id="version"),
        pytest.param([("ewq.version", "0"), ("ewq.plan.sha256", "x" * 99)], id="ewq"),
        pytest.param([("split.no", 0), ("split.count", 1)], id="split-of-one"),
        pytest.param([("split.count", 0)], id="merged"),
        pytest.param([("general.name", "n" * 500), ("a.b", "ü")], id="names"),
    ],
)
def test_keys_that_llama_quantize_sets_and_drops_are_predicted(
    kv, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = write_source(tmp_path / "in.gguf", kv)

    made = made_from(path, tmp_path / "out.gguf", UniformPolicy(ggml_type="Q4_K"))

    assert {t.base_type for t in made.plan.tensors} == {"F16", "F32"}


def test_a_file_of_ours_is_a_source_too(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_from(source, tmp_path / "one.gguf", UniformPolicy(ggml_type="F16"))

    made_from(tmp_path / "one.gguf", tmp_path / "two.gguf", EwqPolicy(factor=0.5))


def test_the_script_of_a_plan_gives_the_same_bytes(
    source, tmp_path, toolchain, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    made = made_from(source, tmp_path / "out.gguf")
    (tmp_path / "make.sh").write_text(export_sh(made.plan))

    subprocess.run(
        ["sh", "make.sh", source, "by-hand.gguf"],
        check=True,
        capture_output=True,
        env={
            "LLAMA_CPP": str(toolchain.source_dir),
            "LLAMA_BIN": str(toolchain.bin_dir),
            "PATH": "/usr/bin:/bin",
        },
    )

    assert Path("by-hand.gguf").read_bytes() == made.path.read_bytes()


def test_the_commands_of_a_dry_run_convert_nothing(source, tmp_path):
    argv = python_argv("ewq_gguf", "gguf", source, "--dry-run", "-q")

    child = subprocess.run(
        argv, cwd=tmp_path, check=True, capture_output=True, text=True
    )

    assert "ewq convert" not in child.stdout
    assert f"{source} out.gguf" in child.stdout


def test_a_gguf_on_a_server_is_scanned_and_planned_there(tiny, source, tmp_path):
    faults = Faults()
    with serve(tmp_path, faults) as url:
        found = open_checkpoint(f"{url}/tiny-BF16.gguf")
        scanned = api.scan(api.Run(found))
        planned = api.plan(api.Run(found), EwqPolicy())
        with pytest.raises(InputError, match="not on this machine"):
            make_gguf(f"{url}/tiny-BF16.gguf", tmp_path / "out.gguf", options=QUICK)

    local = open_checkpoint(str(source))
    assert scanned.to_json() == api.scan(api.Run(local)).to_json()
    assert planned == api.plan(api.Run(local), EwqPolicy())
    assert found.shards[0].header == local.shards[0].header


# Refused ones.


def refused(path: Path, match: str) -> InputError:
    with pytest.raises(InputError, match=match) as caught:
        open_checkpoint(str(path))
    error = caught.value
    assert (error.stage, error.exit_code) == ("scan", 3)
    assert path.name in str(error)
    assert error.remedy
    assert "\n" not in str(error)
    return error


def test_a_quantised_gguf_is_refused(tiny, toolchain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "q.gguf"
    made_from(tiny.base, out, UniformPolicy(ggml_type="Q8_0"))

    error = refused(out, r"output\.weight is Q8_0, not one of .*quantised already")

    assert "BF16 or F16" in error.remedy


def test_a_part_of_a_split_gguf_is_refused(tmp_path):
    path = write_source(tmp_path / "a.gguf", [("split.count", 3)])

    assert "llama-gguf-split --merge" in refused(path, "one of 3 files").remedy


def test_a_vocabulary_without_tensors_is_refused(tmp_path):
    refused(write_source(tmp_path / "a.gguf", tensors={}), "holds no tensors")


def test_a_gguf_without_layers_is_refused(tmp_path):
    for count in (0, 10_001):
        path = write_gguf(tmp_path / "a.gguf", {"x.weight": (32,)}, n_layers=count)
        refused(path, rf"llama\.block_count is {count}, needed is 1 to 10000")
    path = tmp_path / "b.gguf"
    data = write_source(path).read_bytes()
    path.write_bytes(data.replace(b"llama.block_count", b"llama.block_tnuoc"))
    refused(path, r"llama\.block_count is None")
    path.write_bytes(data.replace(b"general.architecture", b"general.arkhitecture"))
    refused(path, r"general\.architecture is None")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda data: data[:-64], "truncated"),
        (lambda data: data[:100], "at byte"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "big-endian"),
        (lambda data: b"PK\3\4" + data[4:], "not GGUF"),
        (lambda data: b"", "file ends"),
    ],
)
def test_a_damaged_gguf_is_refused(damage, match, tmp_path):
    path = write_source(tmp_path / "a.gguf")
    path.write_bytes(damage(path.read_bytes()))

    refused(path, match)


def test_another_alignment_can_be_scanned_but_not_planned(tmp_path, toolchain):
    path = write_source(tmp_path / "a.gguf", align=64)
    checkpoint = open_checkpoint(str(path))

    assert api.scan(api.Run(checkpoint)).layers
    with pytest.raises(InputError, match="aligned to 64 bytes"):
        layout_of(checkpoint, toolchain)


def test_64_bit_weights_can_be_scanned_but_not_planned(tmp_path, toolchain):
    path = write_source(tmp_path / "a.gguf", dtype=np.float64)
    checkpoint = open_checkpoint(str(path))

    assert {t.dtype for t in api.scan(api.Run(checkpoint)).tensors} == {"F32", "F64"}
    with pytest.raises(InputError, match="is F64: llama-quantize cannot read it"):
        layout_of(checkpoint, toolchain)


def test_a_gguf_that_changed_is_not_quantised(tiny, source, toolchain):
    checkpoint = open_checkpoint(str(source))
    api.scan(api.Run(checkpoint), Measures(epsilon=0.02))
    assert api.base_file(api.Run(checkpoint)) == source
    with source.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")

    with pytest.raises(InputError, match="changed since they were opened"):
        api.base_file(api.Run(checkpoint))


@pytest.mark.parametrize("force", [False, True])
def test_the_source_is_never_the_output(force, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = source.read_bytes()
    (tmp_path / "link.gguf").symlink_to(source)

    for out, why in ((source, "its own input"), (tmp_path / "link.gguf", "is a link")):
        with pytest.raises(UsageError, match=why):
            make_gguf(str(source), out, options=replace(QUICK, force=force))
    assert source.read_bytes() == before


def test_a_gguf_is_not_converted(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for extra in ([], ["--dry-run"]):
        assert main(["convert", str(source), "-q", *extra]) == 3
        assert "is a base GGUF already" in capsys.readouterr().err


def test_a_local_gguf_is_not_streamed(source):
    with pytest.raises(UsageError, match="is on this machine"):
        open_checkpoint(str(source), Opening(is_streamed=True))


def test_a_folder_and_its_gguf_share_a_name(tmp_path, session_cache, toolchain):
    write_llama(tmp_path / "both")
    checkpoint = open_checkpoint(str(tmp_path / "both"))
    base = api.base_file(api.Run(checkpoint))

    assert open_checkpoint(str(base)).identity.name == "both"

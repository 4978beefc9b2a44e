"""Every tensor gets exactly its planned type from the real llama-quantize, or nothing
appears at the final path."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest

from ewq_gguf import api, ggml_types, store
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.checkpoint.source import open_checkpoint
from ewq_gguf.errors import (
    ChildError,
    InputError,
    ResourceError,
    UsageError,
    VerificationError,
)
from ewq_gguf.llamacpp.export_script import export_sh
from ewq_gguf.llamacpp.logs import log_file
from ewq_gguf.llamacpp.quantize import (
    quantize,
    quantize_argv,
    tensor_pattern,
    tensor_types,
)
from ewq_gguf.llamacpp.verify import verify_file
from ewq_gguf.process import python_argv, run
from ewq_gguf.records import EwqPolicy
from ewq_gguf.tensor_names import layer_idx
from tests.checkpoints import write_llama
from tests.gguf_files import (
    dry_run,
    dry_run_argv,
    leftovers,
    with_types,
    write_gguf,
)

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [pytest.mark.llamacpp, pytest.mark.usefixtures("own_cache")]

#: Types that need no importance matrix and do not fall back on rows of 256.
QUANTISED = [
    name
    for name in ggml_types.PLANNABLE
    if name not in ggml_types.IMATRIX_TYPES | ggml_types.FLOAT_TYPES
]


def found_types(path):
    return {tensor.name: tensor.ggml_type for tensor in read_gguf(path).tensors}


@pytest.fixture(scope="module")
def mixed(deep):
    """A plan by hand: layer 1 and layers 10 to 19 each with types of their own."""
    types = {}
    for tensor in deep.layout.tensors:
        idx = layer_idx(tensor.name)
        if idx == 1:
            types[tensor.name] = "Q4_K"
        elif idx is not None and 10 <= idx <= 19:
            types[tensor.name] = QUANTISED[1 + idx % 10 + ("ffn" in tensor.name)]
        elif idx is not None:
            types[tensor.name] = "Q8_0" if idx % 2 else "BF16"
    types |= {"token_embd.weight": "Q5_1", "output.weight": "Q6_K"}
    plan = deep.plan("Q8_0")
    wanted = {t.name for t in plan.tensors if t.is_quantizable}
    return with_types(plan, deep.layout, {n: types[n] for n in wanted})


@pytest.fixture(scope="module")
def made(mixed, deep, toolchain, tmp_path_factory):
    """The file that the real llama-quantize makes of it."""
    out = tmp_path_factory.mktemp("made") / "mixed.gguf"
    quantize(mixed, deep.base, out, toolchain, n_threads=2, load=False)
    return out


# The patterns.


def test_layers_10_to_19_keep_their_own_types_beside_layer_1(mixed, made):
    planned = {tensor.name: tensor.written_type for tensor in mixed.tensors}

    assert found_types(made) == planned

    by_layer = [
        [t.written_type for t in mixed.tensors if t.layer_idx == i] for i in range(24)
    ]
    assert all(one != two for one, two in pairwise(by_layer))
    assert all(by_layer[1] != by_layer[i] for i in range(10, 20))
    assert made.stat().st_size == mixed.totals.file_size_bytes


def test_the_proof_of_concepts_pattern_would_have_taken_layers_10_to_19(
    deep, toolchain, tmp_path
):
    """Without this the test above could not fail."""
    found = dry_run_argv(
        [toolchain.tool("llama-quantize"), "--dry-run"]
        + ["--tensor-type", "blk.1.*=Q4_K", deep.base, "Q8_0"],
        tmp_path / "poc.log",
    )

    taken = {
        layer_idx(name) for name, ggml_type in found.items() if ggml_type == "Q4_K"
    }
    assert taken == {1, *range(10, 20)}


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("blk.1.attn_q.weight", r"^blk\.1\.attn_q\.weight$"),
        ("a-b", r"^a\-b$"),
        ("Wq", r"^\x57q$"),
        ("a=b c", r"^a\x3db\x20c$"),
        ("(a|b)*", r"^\x28a\x7cb\x29\x2a$"),
        ("é", r"^\xc3\xa9$"),
    ],
)
def test_a_pattern_is_anchored_escaped_and_survives_lowering(name, pattern):
    assert tensor_pattern(name) == pattern
    assert not re.search(r"[A-Z=\s]", tensor_pattern(name))


@pytest.mark.parametrize("one", [1, 2, 3])
def test_no_layers_pattern_matches_another_layer(one):
    pattern = tensor_pattern(f"blk.{one}.attn_q.weight")

    matched = [i for i in range(400) if re.search(pattern, f"blk.{i}.attn_q.weight")]
    assert matched == [one]


def test_names_with_capitals_and_metacharacters_match_only_themselves(
    toolchain, tmp_path
):
    roles = [
        "attn_q", "Attn_Q", "ATTN_Q", "attn.q", "attn-q", "attnxq", "a+b", "aab", "ab",
        "(a)", "a", "[a]", "a|b", "a*", "aa", "a?", "^a$", "a{2}", r"a\b", r"\x61",
        "a=b", "a b", "é", "e", "中", "#a", '"a"', "$(a)", "`a`", "a/b", "~",
    ]  # fmt: skip
    names = [f"blk.0.{role}.weight" for role in roles]
    types = {name: QUANTISED[i % len(QUANTISED)] for i, name in enumerate(names)}
    base = write_gguf(tmp_path / "odd.gguf", dict.fromkeys(names, (2, 256)))
    lines = [f"{tensor_pattern(n)}={types[n].lower()}" for n in reversed(names)]

    assert dry_run(toolchain, base, "\n".join(lines)) == types


def test_each_quantizable_tensor_has_one_line_and_no_other_has(mixed):
    lines = tensor_types(mixed).splitlines()

    assert len(lines) == sum(t.is_quantizable for t in mixed.tensors)
    assert all(re.fullmatch(r"\^\S+\$=[a-z0-9_]+", line) for line in lines)
    assert not any("norm" in line for line in lines)


@pytest.mark.parametrize(
    "ggml_type", sorted({*QUANTISED, *ggml_types.FLOAT_TYPES} - {"Q8_0"})
)
@pytest.mark.parametrize("model", ["tiny", "deep"])
def test_a_uniform_plan_is_what_a_dry_run_gives(
    request, toolchain, tmp_path, model, ggml_type
):
    """Base types included: none of them ignores an override, all fallbacks hold."""
    made_of = request.getfixturevalue(model)
    plan = made_of.plan(ggml_type)
    (tmp_path / "types").write_text(tensor_types(plan))
    argv = quantize_argv(
        plan,
        toolchain.tool("llama-quantize"),
        base=str(made_of.base),
        types=str(tmp_path / "types"),
        out=str(tmp_path / "out.gguf"),
        n_threads=1,
    )

    found = dry_run_argv([argv[0], "--dry-run", *argv[1:]], tmp_path / "dry.log")

    assert found == {t.name: t.written_type for t in plan.tensors}


def test_every_flag_we_emit_is_in_the_tools_help(mixed, toolchain, tmp_path):
    tool = toolchain.tool("llama-quantize")
    argv = quantize_argv(mixed, tool, base="b", types="t", out="o", n_threads=2)
    with pytest.raises(ChildError) as caught:
        run([tool, "--help"], stage="test", log_path=tmp_path / "help.log")
    assert caught.value.return_code == 1
    usage = (tmp_path / "help.log").read_text()

    flags = {arg for arg in argv if arg.startswith("-")} | {"--dry-run"}
    assert flags == {"--tensor-type-file", "--override-kv", "--dry-run"}
    for flag in flags:
        assert re.search(rf"^  {flag}\b", usage, re.MULTILINE), flag
    assert re.search(rf" or +{mixed.ftype} ", usage)


def test_the_command_line_has_fixed_names_and_the_plans_own_provenance(mixed):
    argv = quantize_argv(
        mixed, "llama-quantize", base="base.gguf", types="t.txt", out="o", n_threads=3
    )

    assert argv == [
        "llama-quantize",
        "--tensor-type-file",
        "t.txt",
        "--override-kv",
        f"ewq.plan.sha256=str:{mixed.sha256}",
        "--override-kv",
        f"ewq.version=str:{mixed.ewq_version}",
        "base.gguf",
        "o",
        mixed.ftype,
        "3",
    ]


# Verification.


def test_a_made_file_carries_its_plans_hash(mixed, made):
    kv = read_gguf(made).kv

    assert kv["ewq.plan.sha256"] == mixed.sha256
    assert kv["ewq.version"] == mixed.ewq_version
    verification = verify_file(mixed, made, load=False)
    assert verification.plan_sha256 == mixed.sha256
    assert verification.file_sha256 == store.sha256_file(made)
    assert verification.found_size_bytes == verification.planned_size_bytes
    assert [(t.name, t.planned_type) for t in verification.tensors] == [
        (t.name, t.written_type) for t in mixed.tensors
    ]
    assert all(t.planned_type == t.found_type for t in verification.tensors)


def tampered(source: Path, target: Path, *, drop=(), extra=None, shape=None) -> Path:
    """A sound GGUF that differs from another in what is asked for."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        sub = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], sub)
    if extra:
        writer.add_string(*extra)
    for tensor in reader.tensors:
        if tensor.name in drop:
            continue
        data = np.array(tensor.data)
        if shape and tensor.name == shape[0]:
            data = data.reshape(shape[1])
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture
def differences(mixed, tmp_path):
    """What verify says of a file."""

    def verify(path):
        with pytest.raises(VerificationError) as caught:
            verify_file(mixed, path, load=False)
        assert caught.value.exit_code == 8
        return caught.value.differences

    return verify


def test_an_untampered_copy_is_sound(mixed, made, tmp_path):
    """So that what the next tests find is what they changed."""
    copy = tampered(made, tmp_path / "copy.gguf")

    verify_file(mixed, copy, load=False)


@pytest.mark.fault(57)
def test_types_of_another_plan_are_all_listed(
    mixed, deep, toolchain, tmp_path, differences
):
    """An override that is ignored: the base type's own mixture, exit code 0."""
    other = with_types(
        mixed,
        deep.layout,
        {"blk.1.ffn_up.weight": "Q5_K", "blk.10.attn_v.weight": "F16"},
    )
    out = tmp_path / "other.gguf"
    quantize(other, deep.base, out, toolchain, n_threads=2, load=False)

    found = differences(out)

    assert found[:2] == (
        "blk.1.ffn_up.weight: planned Q4_K, found Q5_K",
        f"blk.10.attn_v.weight: planned {QUANTISED[1]}, found F16",
    )
    assert found[2].startswith("ewq.plan.sha256: planned ")
    assert found[3].startswith("size: planned ")
    assert len(found) == 4


@pytest.mark.fault(57)
def test_a_dropped_tensor_is_found(made, tmp_path, differences):
    found = differences(
        tampered(made, tmp_path / "t.gguf", drop=["blk.3.ffn_up.weight"])
    )

    assert found[0] == "blk.3.ffn_up.weight: planned Q8_0, absent"


@pytest.mark.fault(57)
def test_an_unplanned_tensor_is_found(mixed, made, tmp_path):
    smaller = mixed.model_copy(update={"tensors": mixed.tensors[1:]})

    with pytest.raises(VerificationError) as caught:
        verify_file(smaller, made, load=False)
    assert f"{mixed.tensors[0].name}: found" in caught.value.differences[0]
    assert caught.value.differences[0].endswith("not planned")


def test_another_shape_is_found(made, tmp_path, differences):
    found = differences(
        tampered(made, tmp_path / "t.gguf", shape=("blk.0.attn_norm.weight", (2, 128)))
    )

    assert found[0] == "blk.0.attn_norm.weight: planned (256,), found (2, 128)"


def test_a_key_too_many_is_found_by_the_size(made, tmp_path, differences):
    found = differences(tampered(made, tmp_path / "t.gguf", extra=("x.note", "y" * 40)))

    assert len(found) == 1
    assert found[0].startswith("size: planned ")


@pytest.mark.parametrize("n_bytes", [1, 33, 100_000])
def test_a_truncated_file_is_found(mixed, made, tmp_path, n_bytes):
    path = tmp_path / "t.gguf"
    path.write_bytes(made.read_bytes()[:-n_bytes])

    with pytest.raises(VerificationError, match="truncated"):
        verify_file(mixed, path, load=False)


def test_bytes_after_the_end_are_found(made, tmp_path, differences):
    path = tmp_path / "t.gguf"
    path.write_bytes(made.read_bytes() + bytes(32))

    assert differences(path)[0].startswith("size: planned ")


def test_a_file_that_cannot_be_loaded_is_found(mixed, made, tmp_path):
    """The types are right, the vocabulary is gone: only loading shows it."""
    path = tmp_path / "t.gguf"
    path.write_bytes(
        made.read_bytes().replace(b"tokenizer.ggml.model", b"tokenizer.ggml.modem")
    )

    with pytest.raises(
        ChildError, match="is what its plan says, and does not"
    ) as caught:
        verify_file(mixed, path)
    assert "log is " in caught.value.remedy


@pytest.mark.fault(79)
def test_loading_a_file_that_never_ends_is_ended(mixed, made, monkeypatch):
    # Python alone takes longer to start, on any machine.
    monkeypatch.setenv("EWQ_CHILD_TIMEOUT", "0.001")
    monkeypatch.setattr("ewq_gguf.llamacpp.verify._SLOWEST_DISK", 1e15)

    with pytest.raises(ChildError, match="took longer than") as caught:
        verify_file(mixed, made)
    assert "EWQ_CHILD_TIMEOUT" in caught.value.remedy


@pytest.mark.fault(59)
def test_weights_that_are_nan_are_found_by_loading(tiny, toolchain, tmp_path):
    plan = tiny.plan("F16")
    out = tmp_path / "nan.gguf"
    quantize(plan, tiny.base, out, toolchain, n_threads=1, load=False)
    norm = next(t for t in read_gguf(out).tensors if t.name == "output_norm.weight")
    with out.open("r+b") as file:
        file.seek(norm.offset)
        file.write(np.full(64, np.nan, np.float32).tobytes())

    with pytest.raises(VerificationError, match="numerically broken"):
        verify_file(plan, out)


def test_the_command_line_exits_with_8_and_a_table(mixed, deep, made, tmp_path):
    (tmp_path / "plan.json").write_text(mixed.to_json())
    bad = tampered(made, tmp_path / "bad.gguf", drop=["blk.3.ffn_up.weight"])
    log = tmp_path / "verify.log"
    argv = ["verify", tmp_path / "plan.json", bad, "--no-load"]

    with pytest.raises(ChildError) as caught:
        run(python_argv("ewq_gguf", *argv), stage="test", log_path=log)

    assert caught.value.return_code == 8
    first, *table = log.read_text().splitlines()
    assert first.startswith("ewq: verify: ")
    assert "  blk.3.ffn_up.weight: planned Q8_0, absent" in table


# What goes wrong leaves the output as it was.


@pytest.fixture
def old(tmp_path):
    """An output that is there already."""
    path = tmp_path / "out" / "model.gguf"
    path.parent.mkdir()
    path.write_bytes(b"old")
    return path


@pytest.fixture
def fake(toolchain, tmp_path):
    """A toolchain whose llama-quantize is a shell script."""

    def make(script: str):
        folder = tmp_path / "bin"
        folder.mkdir()
        tool = folder / "llama-quantize"
        tool.write_text(f"#!/bin/sh\nreal={toolchain.tool('llama-quantize')}\n{script}")
        tool.chmod(0o755)
        return replace(toolchain, bin_dir=folder)

    return make


def assert_untouched(old: Path) -> None:
    assert old.read_bytes() == b"old"
    assert list(old.parent.iterdir()) == [old]


def test_the_base_of_another_model_is_refused(mixed, tiny, toolchain, old):
    with pytest.raises(InputError, match="is not the plan's base") as caught:
        quantize(mixed, tiny.base, old, toolchain, n_threads=1)

    assert caught.value.exit_code == 3
    assert_untouched(old)


def test_a_base_of_another_float_type_is_refused(tiny, toolchain, old, tmp_path):
    base = tmp_path / "f16.gguf"
    f16 = tiny.plan("F16")
    quantize(f16, tiny.base, base, toolchain, n_threads=1, load=False)

    with pytest.raises(InputError, match="'F16'.*planned for.*'BF16'"):
        quantize(tiny.plan("Q8_0"), base, old, toolchain, n_threads=1)
    assert_untouched(old)


def test_the_base_is_never_its_own_output(tiny, toolchain, tmp_path):
    base = tmp_path / "base.gguf"
    shutil.copy(tiny.base, base)
    link = tmp_path / "link.gguf"
    link.hardlink_to(base)

    for out in (base, link):
        with pytest.raises(UsageError) as caught:
            quantize(tiny.plan(), base, out, toolchain, n_threads=1)
        assert caught.value.exit_code == 2
    assert base.read_bytes() == tiny.base.read_bytes()


@pytest.mark.fault(78)
def test_a_tool_that_exits_with_0_but_writes_another_file_is_caught(tiny, fake, old):
    """It takes the file of a stock preset for the plan's."""
    wrong = fake('exec "$real" base.gguf out.gguf Q4_0 1')

    with pytest.raises(VerificationError, match="differences from the plan") as caught:
        quantize(tiny.plan("Q8_0"), tiny.base, old, wrong, n_threads=1)

    assert caught.value.exit_code == 8
    assert "blk.0.attn_k.weight: planned Q8_0, found Q4_0" in caught.value.differences
    assert_untouched(old)


@pytest.mark.fault(78)
@pytest.mark.parametrize(
    "script",
    [
        pytest.param("exit 0", id="nothing"),
        pytest.param(": > out.gguf", id="empty"),
        pytest.param("head -c 5000 base.gguf > out.gguf", id="cut"),
        pytest.param("cp base.gguf out.gguf", id="base"),
        pytest.param("mkdir out.gguf", id="folder"),
        pytest.param("mkfifo out.gguf", id="pipe"),
    ],
)
def test_a_tool_that_exits_with_0_without_a_file_is_caught(tiny, fake, old, script):
    with pytest.raises(VerificationError):
        quantize(tiny.plan(), tiny.base, old, fake(script), n_threads=1)
    assert_untouched(old)


def test_a_failing_tool_ends_with_its_last_lines(tiny, fake, old):
    failing = fake("seq 1 30; echo 'ggml_abort: no' >&2; exit 3")

    with pytest.raises(ChildError, match="exit code 3; its last line: ggml_abort: no"):
        quantize(tiny.plan(), tiny.base, old, failing, n_threads=1)
    assert_untouched(old)


@pytest.mark.fault(77)
def test_a_failing_tool_gives_exit_code_5_and_20_lines(tiny, fake, old):
    with pytest.raises(ChildError) as caught:
        quantize(tiny.plan(), tiny.base, old, fake("seq 1 30; exit 3"), n_threads=1)

    assert caught.value.exit_code == 5
    assert caught.value.log_tail == tuple(str(i) for i in range(11, 31))
    assert caught.value.log_path is not None
    assert caught.value.log_path.read_text().startswith("1\n2\n")


def test_a_full_disk_leaves_the_old_output(mixed, deep, tmp_path, old):
    """A limit on the size of files acts where the disk would end."""
    (tmp_path / "plan.json").write_text(mixed.to_json())
    code = (
        "import resource, sys; n = int(sys.argv[1]);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (n, n));"
        "from ewq_gguf.cli import main; sys.exit(main(sys.argv[2:]))"
    )
    arguments = ["quantize", tmp_path / "plan.json", deep.base, "-o", old]
    for limit in (9_000, 100_000, mixed.totals.file_size_bytes - 1):
        with pytest.raises(ChildError) as caught:
            run(
                [sys.executable, "-c", code, str(limit), *arguments]
                + ["--force", "--no-load", "-q"],
                stage="test",
                log_path=tmp_path / "full.log",
            )
        assert caught.value.return_code in (5, 6), caught.value
        assert "Traceback" not in (tmp_path / "full.log").read_text()
        assert_untouched(old)


def test_a_disk_that_is_full_for_the_tool_is_exit_code_6(mixed, deep, fake, old):
    """The same limit, with the signal ignored: writing fails as on a full disk."""
    full = fake('trap \'\' XFSZ; ulimit -f 200; exec "$real" "$@"')

    with pytest.raises(ResourceError, match="the disk is full") as caught:
        quantize(mixed, deep.base, old, full, n_threads=1)

    assert caught.value.exit_code == 6
    assert_untouched(old)


@pytest.mark.parametrize("data", [None, b"", b"GGUF", bytes(100)])
def test_a_base_that_is_no_gguf_is_bad_input(tiny, toolchain, old, tmp_path, data):
    base = tmp_path / "base.gguf"
    if data is not None:
        base.write_bytes(data)

    with pytest.raises(InputError, match="make it with `ewq convert`") as caught:
        quantize(tiny.plan(), base, old, toolchain, n_threads=1)

    assert caught.value.exit_code == 3
    assert_untouched(old)


def test_outputs_of_one_name_in_two_folders_have_logs_of_their_own(tmp_path):
    one, two = (log_file("load", tmp_path / name / "out.gguf") for name in "ab")

    assert one != two
    assert one == log_file("load", tmp_path / "a" / "out.gguf")
    assert len(log_file("load", tmp_path / ("x" * 250)).name) < 120


def test_progress_rises_to_the_whole(tiny, toolchain, tmp_path):
    shares: list[float] = []

    quantize(
        tiny.plan(),
        tiny.base,
        tmp_path / "out.gguf",
        toolchain,
        n_threads=1,
        load=False,
        on_progress=shares.append,
    )

    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert leftovers(tmp_path) == []


def test_the_number_of_threads_does_not_change_a_byte(
    mixed, deep, made, toolchain, tmp_path
):
    out = tmp_path / "one.gguf"

    quantize(mixed, deep.base, out, toolchain, n_threads=1, load=False)

    assert store.sha256_file(out) == store.sha256_file(made)


# Plans that were edited.


def edited(plan, index, **update):
    tensors = list(plan.tensors)
    tensors[index] = tensors[index].model_copy(update=update)
    return plan.model_copy(update={"tensors": tuple(tensors)})


def index_of(plan, name):
    return next(i for i, t in enumerate(plan.tensors) if t.name == name)


@pytest.mark.parametrize(
    ("name", "update", "match"),
    [
        pytest.param(
            "blk.0.attn_q.weight", {"ggml_type": "q4_k_m"}, "ggml_type", id="preset"
        ),
        pytest.param(
            "blk.0.attn_q.weight",
            {"ggml_type": "Q8_0\nTYPES\ntouch pwned\n"},
            "ggml_type",
            id="injection",
        ),
        pytest.param(
            "blk.0.attn_q.weight", {"ggml_type": "IQ1_S"}, "ggml_type", id="imatrix"
        ),
        pytest.param(
            "blk.0.attn_q.weight", {"ggml_type": "Q4_0"}, "written_type", id="fallback"
        ),
        pytest.param("blk.0.attn_q.weight", {"size_bytes": 1}, "size_bytes", id="size"),
        pytest.param(
            "blk.0.attn_norm.weight", {"ggml_type": "Q8_0"}, "ggml_type", id="norm"
        ),
        pytest.param(
            "blk.0.attn_norm.weight",
            {"is_quantizable": True},
            "is_quantizable",
            id="never-quantised",
        ),
        pytest.param(
            "blk.0.attn_q.weight", {"base_type": "nonsense"}, "base_type", id="base"
        ),
        pytest.param(
            "blk.0.attn_q.weight", {"name": "blk.0.attn_k.weight"}, "", id="two"
        ),
        pytest.param("blk.0.attn_q.weight", {"shape": ()}, "shape", id="no-shape"),
        pytest.param("blk.0.attn_q.weight", {"shape": (64, -64)}, "shape", id="minus"),
    ],
)
def test_an_edited_plan_is_refused_before_anything_runs(
    tiny, fake, old, name, update, match
):
    plan = tiny.plan("Q8_0")
    index = index_of(plan, name)
    plan = edited(plan, index, **update)
    never = fake("touch /proc/nonsense; exit 1")

    with pytest.raises(InputError, match=f"at /tensors/\\d+/{match}") as caught:
        quantize(plan, tiny.base, old, never, n_threads=1)
    assert caught.value.exit_code == 3
    with pytest.raises(InputError):
        export_sh(plan)
    assert_untouched(old)


@pytest.mark.parametrize("ftype", ["F16", "Q4_K", '"$(touch pwned)"', "COPY"])
def test_a_base_type_that_is_not_the_tensors_is_refused(tiny, toolchain, old, ftype):
    plan = tiny.plan("Q8_0").model_copy(update={"ftype": ftype})

    with pytest.raises(InputError, match="at /ftype"):
        quantize(plan, tiny.base, old, toolchain, n_threads=1)
    with pytest.raises(InputError, match="at /ftype"):
        export_sh(plan)


# The script.


@pytest.fixture(scope="module")
def llama_cpp(toolchain, tmp_path_factory):
    """A checkout as a user has it: the converter and build/bin."""
    folder = tmp_path_factory.mktemp("llama.cpp")
    for name in ("convert_hf_to_gguf.py", "conversion", "gguf-py"):
        (folder / name).symlink_to(toolchain.source_dir / name)
    (folder / "build").mkdir()
    (folder / "build" / "bin").symlink_to(toolchain.bin_dir)
    return folder


def test_the_exported_script_gives_the_same_bytes(toolchain, llama_cpp, tmp_path):
    folder = write_llama(tmp_path / "it's a $(touch pwned)", n_layers=1)
    checkpoint = open_checkpoint(str(folder))
    policy = EwqPolicy(ladder=("Q4_K", "Q5_0"), output_type="Q6_K")
    plan = api.plan(api.Run(api.scan(api.Run(checkpoint))), policy)
    assert plan.totals.is_estimate
    base = api.base_file(api.Run(checkpoint))
    quantize(plan, base, tmp_path / "ours.gguf", toolchain, n_threads=2, load=False)
    (tmp_path / "make.sh").write_text(export_sh(plan))
    python = Path(sys.executable).parent

    run(
        ["sh", "make.sh", folder, "theirs.gguf"],
        stage="test",
        log_path=tmp_path / "sh.log",
        cwd=tmp_path,
        env={"LLAMA_CPP": str(llama_cpp), "PATH": f"{python}:{os.environ['PATH']}"},
    )

    ours, theirs = (tmp_path / f"{who}.gguf" for who in ("ours", "theirs"))
    assert store.sha256_file(theirs) == store.sha256_file(ours)
    assert not (tmp_path / "pwned").exists()


def test_the_script_runs_nothing_that_a_plans_name_says(tiny, tmp_path):
    plan = tiny.plan()
    name = "x\ntouch pwned #'\"$(touch pwned)`touch pwned`"
    plan = plan.model_copy(
        update={"model": plan.model.model_copy(update={"name": name})}
    )
    script = tmp_path / "hostile.sh"
    script.write_text(export_sh(plan))

    with pytest.raises(ChildError):
        run(
            ["sh", script, tiny.folder, "out.gguf"],
            stage="test",
            log_path=tmp_path / "sh.log",
            cwd=tmp_path,
            env={"LLAMA_CPP": str(tmp_path / "absent")},
        )
    assert not (tmp_path / "pwned").exists()


def test_the_script_says_what_it_needs(tiny, tmp_path):
    script = tmp_path / "make.sh"
    script.write_text(export_sh(tiny.plan()))

    with pytest.raises(ChildError, match="set LLAMA_CPP to the folder of convert_hf"):
        run(
            ["sh", script], stage="test", log_path=tmp_path / "l", env={"LLAMA_CPP": ""}
        )


def test_a_plans_json_is_enough_to_make_the_file_again(
    mixed, deep, made, toolchain, tmp_path
):
    again = type(mixed).model_validate(
        type(mixed).model_validate_json(json.dumps(json.loads(mixed.to_json())))
    )

    quantize(again, deep.base, tmp_path / "o.gguf", toolchain, n_threads=2, load=False)

    assert store.sha256_file(tmp_path / "o.gguf") == store.sha256_file(made)

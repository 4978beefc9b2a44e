"""What is quantised already goes over exactly, by every policy, and it is measured."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from ewq_gguf import api
from ewq_gguf.api import Options, make_gguf
from ewq_gguf.checkpoint.source import open_checkpoint
from ewq_gguf.cli import main
from ewq_gguf.errors import InputError
from ewq_gguf.llamacpp.exact import write_exactly
from ewq_gguf.llamacpp.export_script import export_sh
from ewq_gguf.plan.check import check_sound
from ewq_gguf.plan.lattice import allowed, exact_types, without_loss
from ewq_gguf.plan.size_target import SizeTarget
from ewq_gguf.records import (
    EwqPolicy,
    Exactness,
    FastEwqPolicy,
    LayoutTensor,
    Plan,
    PresetPolicy,
    UniformPolicy,
    Verification,
    load_record,
)
from ewq_gguf.report.made_view import exact_lines
from tests import lattices as made
from tests.families import write_family

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [pytest.mark.llamacpp, pytest.mark.usefixtures("own_cache")]

QUICK = Options(n_threads=1, load=False)
SHAPE = (64, 256)


def on_q4_1(shape, rng):
    """Integers of 4 bits with zero points, in scales of few bits."""
    scales = rng.integers(1, 8, (shape[0], shape[1] // 32, 1)) * 2.0**-10
    zeros = rng.integers(0, 16, scales.shape)
    q = rng.integers(0, 16, (*scales.shape[:2], 32))
    q[..., 0], q[..., 1] = 0, 15
    return (scales * (q - zeros)).reshape(shape)


def normal(shape, rng):
    return rng.standard_normal(shape) * 0.02


#: Matrices of a layer, and the smallest type that holds each.
KINDS = {
    "attn_q": (made.on_q4_0, "Q4_0"),
    "attn_k": (made.on_int4, "Q4_0"),
    "attn_v": (made.on_mxfp4, "MXFP4"),
    "attn_output": (made.on_ternary, "TQ1_0"),
    "ffn_gate": (on_q4_1, "Q4_1"),
    "ffn_up": (made.on_int8, "Q8_0"),
    "ffn_down": (normal, None),
}


def write_base(path, dtype):
    """A GGUF of one layer with a matrix of each kind; its true values by name."""
    rng, truth = np.random.default_rng(7), {}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    kind = gguf.GGMLQuantizationType[dtype]
    for name, (values_of, _) in KINDS.items():
        values = truth[f"blk.0.{name}.weight"] = values_of(SHAPE, rng)
        data = quantize(values.astype(np.float32), kind)
        writer.add_tensor(f"blk.0.{name}.weight", data, raw_dtype=kind)
    for name in (
        "blk.0.attn_norm.weight",
        "blk.0.ffn_norm.weight",
        "output_norm.weight",
    ):
        writer.add_tensor(name, np.ones(256, np.float32))
    embedding = quantize(normal(SHAPE, rng).astype(np.float32), kind)
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, embedding, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return truth


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Plans are written to the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=["F32", "BF16"])
def base(request, tmp_path):
    path = tmp_path / f"kinds-{request.param}.gguf"
    return path, request.param, write_base(path, request.param)


def read(path):
    """The file's weights by another reader than ours, with their types."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            dequantize(tensor.data, tensor.tensor_type).astype(np.float64),
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def assert_exact(path, truth, dtype, names):
    found = read(path)
    for name in names:
        weights, values = found[name][1].reshape(truth[name].shape), truth[name]
        if dtype == "BF16":
            weights, values = made.bf16(weights), made.bf16(values)
        np.testing.assert_array_equal(weights, values, err_msg=name)


def exact_names(plan):
    return [tensor.name for tensor in plan.tensors if tensor.is_exact]


def test_the_scan_finds_the_smallest_type_of_each_kind(base):
    path, _, _ = base
    scanned = api.scan(api.Run(str(path), QUICK))

    found = {t.role: t.lattice[0] for t in scanned.tensors if t.lattice}

    assert found == {role: of for role, (_, of) in KINDS.items() if of}


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(EwqPolicy(ladder=("Q8_0", "raw")), id="ewq"),
        pytest.param(FastEwqPolicy(ladder=("Q8_0", "raw")), id="fastewq"),
        pytest.param(UniformPolicy(ggml_type="Q8_0"), id="uniform"),
        pytest.param(PresetPolicy(preset="Q8_0"), id="preset"),
    ],
)
def test_every_policy_keeps_the_values_and_measures_them(base, policy, tmp_path):
    path, dtype, truth = base

    result = make_gguf(str(path), tmp_path / "out.gguf", policy, options=QUICK)

    names = exact_names(result.plan)
    assert len(names) == 6
    assert_exact(result.path, truth, dtype, names)
    exact = result.verification.exact
    assert exact.keys() == set(names)
    assert all(one.n_wrong == 0 and one.max_error == 0 for one in exact.values())
    if dtype == "F32":
        assert not any(one.max_rounding for one in exact.values())
    check_sound(result.plan)
    again = Plan.model_validate_json(result.plan.to_json())
    assert again == result.plan
    assert Verification.model_validate_json(result.verification.to_json())


def test_llama_quantize_alone_would_lose_them(base, tmp_path):
    path, _, truth = base
    policy = UniformPolicy(ggml_type="Q4_0")
    options = Options(n_threads=1, load=False, keep_lattice=False)

    result = make_gguf(str(path), tmp_path / "out.gguf", policy, options=options)

    assert exact_names(result.plan) == []
    name = "blk.0.attn_q.weight"
    weights = read(result.path)[name][1].reshape(SHAPE)
    assert (made.bf16(weights) != made.bf16(truth[name])).mean() > 0.1


def test_a_budget_is_for_the_rest_where_the_exact_types_fit_it(base, tmp_path):
    path, _, _ = base
    checkpoint = open_checkpoint(str(path))
    roomy = api.plan(
        api.Run(checkpoint, QUICK), EwqPolicy(), budget=SizeTarget("60%", share=0.6)
    )
    tight = api.plan(
        api.Run(checkpoint, QUICK), EwqPolicy(), budget=SizeTarget("2 bpw", bpw=2.0)
    )

    assert len(exact_names(roomy)) == 6
    assert roomy.budget is not None
    assert tight.budget is not None
    assert roomy.totals.file_size_bytes <= roomy.budget.limit_bytes
    assert tight.totals.file_size_bytes <= tight.budget.limit_bytes
    assert exact_names(tight) == ["blk.0.attn_output.weight"]
    check_sound(roomy)
    check_sound(tight)


def test_the_same_plan_gives_the_same_bytes_and_the_script_says_what_it_cannot(
    base, tmp_path
):
    path, _, _ = base
    policy = UniformPolicy(ggml_type="Q8_0")
    one, two = (
        make_gguf(str(path), tmp_path / f"{n}.gguf", policy, options=QUICK)
        for n in (1, 2)
    )

    assert one.path.read_bytes() == two.path.read_bytes()
    assert "ewq quantize" in export_sh(one.plan)


def test_a_tensor_that_is_not_what_the_plan_says_is_told(base, tmp_path):
    path, _, _ = base
    plan = api.plan(api.Run(str(path), QUICK), UniformPolicy(ggml_type="Q4_0"))
    made_file = make_gguf(str(path), tmp_path / "out.gguf", plan, options=QUICK)
    name = "blk.0.ffn_down.weight"  # normal weights
    tensors = tuple(
        t.model_copy(update={"is_exact": t.name == name}) for t in plan.tensors
    )
    lying = plan.model_copy(update={"tensors": tensors})

    found = write_exactly(lying, path, made_file.path, None)[name]

    assert found.n_wrong > 0
    assert found.max_error > 1e-4


def test_a_plan_that_calls_any_type_exact_is_refused(base):
    path, _, _ = base
    plan = api.plan(api.Run(str(path), QUICK), UniformPolicy(ggml_type="Q6_K"))
    tensors = tuple(t.model_copy(update={"is_exact": True}) for t in plan.tensors)

    with pytest.raises(InputError, match="is_exact"):
        check_sound(plan.model_copy(update={"tensors": tensors}))


def test_a_plan_without_exact_tensors_has_no_word_of_them(base):
    path, _, _ = base
    options = Options(n_threads=1, keep_lattice=False)
    plan = api.plan(api.Run(str(path), options), UniformPolicy(ggml_type="Q4_0"))

    assert "is_exact" not in plan.to_json()


def test_only_a_type_of_no_more_bytes_replaces_what_was_chosen():
    tensors = [
        LayoutTensor(name=f"blk.{i}.ffn_up.weight", shape=(4, 256), ggml_type="BF16")
        for i in range(3)
    ]
    names = [tensor.name for tensor in tensors]
    lattices = {names[0]: ("Q4_0", "Q8_0"), names[1]: ("Q8_0",)}

    types = dict(zip(names, ("Q4_K", "Q4_K", "Q4_K"), strict=True))
    found = exact_types(tensors, types, "BF16", lattices)

    assert list(found.values()) == ["Q4_0", "Q4_K", "Q4_K"]
    assert exact_types(tensors, {}, "BF16", lattices) == {
        names[0]: "Q4_0", names[1]: "Q8_0",
    }  # fmt: skip


def test_optimal_takes_exact_types_that_it_may_have_to_cost_nothing():
    lattices = {"a": ("MXFP4", "Q8_0"), "b": ("Q4_0",)}
    menus = {"a": ("Q8_0", "Q4_K"), "b": ("Q8_0",)}

    kept = allowed(lattices, menus)

    assert kept == {"a": ("Q8_0",)}
    assert without_loss({"a": {"Q8_0": 1.0, "Q4_K": 2.0}}, kept) == {
        "a": {"Q8_0": 0.0, "Q4_K": 2.0}
    }


def unrotated(weights, n_head):
    """Rows as the checkpoint has them; the converter pairs a head's halves."""
    half = len(weights) // n_head // 2
    pairs = weights.reshape(n_head, half, 2, -1)
    return pairs.swapaxes(1, 2).reshape(weights.shape)


@pytest.mark.slow
def test_compressed_int4_goes_from_its_codes_to_the_file_with_error_0(tmp_path):
    truth = made.write_packed_llama(
        tmp_path / "int4", made.compressed, made.compressed_config()
    )

    result = make_gguf(str(tmp_path / "int4"), tmp_path / "o.gguf", options=QUICK)

    assert len(exact_names(result.plan)) == 14
    assert all(not one.max_rounding for one in result.verification.exact.values())
    found, n_heads = read(result.path), {"attn_q": 4, "attn_k": 2}
    for tensor in result.plan.tensors:
        if tensor.is_exact:
            assert tensor.written_type == "Q4_0"
            (source,) = (
                values
                for name, values in truth.items()
                if name.split(".")[2] == str(tensor.layer_idx)
                and tensor.role == ROLES[name.split(".")[-2]]
            )
            weights = found[tensor.name][1]
            if tensor.role in n_heads:
                weights = unrotated(weights, n_heads[tensor.role])
            np.testing.assert_array_equal(weights, source, err_msg=tensor.name)


ROLES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}  # fmt: skip


@pytest.mark.slow
def test_the_mxfp4_of_gpt_oss_goes_into_the_file_with_error_0(tmp_path):
    write_family(tmp_path / "oss", "gpt-oss")
    truth = made.pack_gpt_oss(tmp_path / "oss")

    result = make_gguf(str(tmp_path / "oss"), tmp_path / "o.gguf", options=QUICK)

    names = exact_names(result.plan)
    assert len(names) == 6
    assert all(not one.max_rounding for one in result.verification.exact.values())
    found = read(result.path)
    for name in names:
        assert found[name][0] == "MXFP4"
        layer, role = name.split(".")[1], name.split(".")[2]
        of = "down_proj" if role == "ffn_down_exps" else "gate_up_proj"
        source = truth[f"model.layers.{layer}.mlp.experts.{of}"]
        if of == "gate_up_proj":
            source = source[:, role == "ffn_up_exps" :: 2]
        weights = found[name][1].reshape(source.shape)
        np.testing.assert_array_equal(weights, source, err_msg=name)


def test_the_mxfp4_of_gpt_oss_is_read_as_transformers_reads_it(tmp_path):
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    from safetensors.torch import load_file

    write_family(tmp_path / "oss", "gpt-oss")
    made.pack_gpt_oss(tmp_path / "oss")
    packed = load_file(tmp_path / "oss" / "model.safetensors")

    folder = open_checkpoint(str(tmp_path / "oss")).folder
    plain = load_file(folder / "model.safetensors")

    for name in [name for name in packed if name.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        scales = packed[f"{stem}_scales"]
        theirs = mxfp4.convert_moe_packed_tensors(packed[name], scales)
        assert torch.equal(theirs, plain[stem])


def test_no_lattice_plans_such_matrices_like_any_others(base, tmp_path, capsys):
    path, _, _ = base
    argv = ["plan", str(path), "--policy", "uniform:Q8_0"]
    files = tmp_path / "kept.json", tmp_path / "plain.json"

    assert main([*argv, "-o", str(files[0])]) == 0
    assert "matrices hold the values" in " ".join(capsys.readouterr().err.split())
    assert main([*argv, "--no-lattice", "-o", str(files[1])]) == 0

    plans = [load_record(Plan, file, "plan") for file in files]
    assert [bool(exact_names(plan)) for plan in plans] == [True, False]


def test_a_dry_run_names_the_command_that_keeps_them(base, tmp_path, capsys):
    path, _, _ = base
    policy = ["--policy", "uniform:Q8_0"]
    dry = ["gguf", str(path), "--dry-run", "-q"]
    plan = str(tmp_path / "plan.json")
    assert main(["plan", str(path), *policy, "-o", plan, "-q"]) == 0
    capsys.readouterr()

    assert main([*dry, *policy]) == 0
    kept = capsys.readouterr().out
    assert main([*dry, "--plan", plan]) == 0
    planned = capsys.readouterr().out
    assert main([*dry, *policy, "--no-lattice"]) == 0
    plain = capsys.readouterr().out
    assert main(["quantize", plan, str(path), "-o", "o.gguf", "--dry-run"]) == 0
    alone = capsys.readouterr().out
    assert main([*dry, "--plan", plan, "--no-lattice"]) == 2

    assert "--no-lattice is in the plan already" in capsys.readouterr().err
    assert kept.endswith(f".json {path} -o out.gguf\n")
    assert planned.endswith(f"\newq quantize {plan} {path} -o out.gguf\n")
    for text in (kept, planned, alone):
        assert "# 6 matrices that are quantised already are exact only as" in text
    assert " --policy uniform:Q8_0 --no-lattice -o " in plain
    assert "# 6 matrices" not in plain
    assert "llama-quantize --tensor-type-file" in plain


def test_people_are_told_what_is_exact_and_what_is_not():
    right = Exactness(n_wrong=0, max_error=0.0, max_rounding=0.0)
    rounded = Exactness(n_wrong=0, max_error=0.0, max_rounding=1e-5)
    wrong = Exactness(n_wrong=3, max_error=0.02, max_rounding=0.0)

    def lines(**exact):
        record = Verification(
            plan_sha256="", file_sha256="", planned_size_bytes=0, found_size_bytes=0,
            tensors=(), prompt=None, answer=None, exact=exact,
        )  # fmt: skip
        return exact_lines(record)

    assert lines() == []
    (line,) = lines(a=right)
    assert line.endswith("error 0")
    assert "rounded to its dtype (by up to 1e-05)" in lines(a=right, b=rounded)[0]
    assert lines(a=wrong) == ["a: 3 weights are not the base's, by up to 0.02"]

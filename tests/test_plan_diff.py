"""Two plans side by side, and maps that fit 80 columns."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from ewq_gguf.cli import main
from ewq_gguf.errors import InputError
from ewq_gguf.plan.assemble import assemble
from ewq_gguf.plan.build import make_plan
from ewq_gguf.records import EwqPolicy, Plan, UniformPolicy
from ewq_gguf.report.plan_diff_view import plan_diff_values, plan_diff_view
from ewq_gguf.report.plan_view import plan_view
from ewq_gguf.report.text import in_order, short_role
from tests.scans import make_layout, make_scan, subject_of

MOE = {
    "attn_norm": (2048,),
    "attn_q": (2048, 2048),
    "attn_k": (512, 2048),
    "attn_v": (512, 2048),
    "attn_output": (2048, 2048),
    "ffn_gate_inp": (64, 2048),
    "ffn_gate_exps": (64, 1024, 2048),
    "ffn_up_exps": (64, 1024, 2048),
    "ffn_down_exps": (64, 2048, 1024),
    "ffn_gate_shexp": (1024, 2048),
    "ffn_up_shexp": (1024, 2048),
    "ffn_down_shexp": (2048, 1024),
}
DENSE = {
    "attn_q": (256, 256),
    "attn_k": (256, 256),
    "attn_v": (256, 256),
    "attn_output": (256, 256),
    "ffn_gate": (256, 256),
    "ffn_up": (256, 256),
    "ffn_down": (256, 256),
}


def plan_of(n_layers: int = 6, layer=None, base: str = "Q8_0", **types: str) -> Plan:
    """A plan of one type; others for the tensors named, with `_` for `.`."""
    scan = make_scan([1.0] * n_layers, layer=layer or DENSE)
    subject = subject_of(scan)
    asked = {
        tensor.name: types.get(tensor.name.replace(".", "_"), base)
        for tensor in subject.tensors
    }
    return assemble(subject, UniformPolicy(ggml_type=base), asked)


def lines_of(view: RenderableType, width: int = 80) -> list[str]:
    """What a terminal of this width prints, without colour."""
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(view)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_equal_plans_differ_in_nothing():
    lines = lines_of(plan_diff_view(plan_of(), plan_of()))
    assert "B - A    +0 bytes (+0.0%), +0.000 bits per weight" in lines
    assert "changed  0 of 45 tensors, in 0 of 6 layers" in lines
    assert len(lines) == 6
    values = plan_diff_values(plan_of(), plan_of())
    assert values["tensors"] == values["layers"] == {}


def test_the_layers_that_change_are_mapped_and_the_others_folded():
    b = plan_of(
        blk_2_attn_q_weight="Q4_K", blk_2_ffn_up_weight="BF16", output_weight="Q4_0"
    )
    text = "\n".join(lines_of(plan_diff_view(plan_of(), b)))
    assert "changed  3 of 45 tensors, in 1 of 6 layers" in text
    assert (
        "layer     MB  q          k v o gate down  up\n"
        "  0-1      0  =          =                =\n"
        "    2  +0.03  Q8_0>Q4_K  =                Q8_0>BF16\n"
        "  3-5      0  =          =                ="
    ) in text
    assert "Q8_0>BF16        1  +0.06  up" in text
    assert "output.weight  Q8_0>Q4_0  -0.02 MB" in text


def test_values_have_the_signed_bytes_of_every_tensor_and_layer():
    a, b = plan_of(), plan_of(blk_2_attn_q_weight="Q4_K", output_weight="BF16")
    values = plan_diff_values(a, b)
    lost = 256 * 256 * 4 // 8
    assert values["tensors"]["blk.2.attn_q.weight"] == {
        "a": "Q8_0",
        "b": "Q4_K",
        "size_bytes_difference": -lost,
    }
    assert set(values["tensors"]) == {"blk.2.attn_q.weight", "output.weight"}
    assert values["layers"] == {"2": {"size_bytes_difference": -lost}}
    gains = [entry["size_bytes_difference"] for entry in values["tensors"].values()]
    assert values["file_size_bytes_difference"] == sum(gains)
    assert values["file_size_bytes_difference"] == (
        b.totals.file_size_bytes - a.totals.file_size_bytes
    )


def test_tensors_that_only_one_plan_has_are_named():
    a, b = plan_of(2), plan_of(3)
    lines = lines_of(plan_diff_view(a, b))
    shown = "blk.2.attn_q.weight, blk.2.attn_k.weight,"
    assert any(line.startswith("only in B  7 tensors: " + shown) for line in lines)
    assert any("none>Q8_0" in line for line in lines)
    values = plan_diff_values(b, a)
    assert values["tensors"]["blk.2.attn_q.weight"]["b"] is None
    assert values["layers"]["2"]["size_bytes_difference"] < 0


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (DENSE | {"attn_q": (512, 256)}, r"attn_q.weight has shape \(256, 256\) in A"),
        ({"attn_q": (512, 256)}, "has shape"),
    ],
)
def test_plans_of_other_shapes_are_not_compared(layer, message):
    for compare in (plan_diff_view, plan_diff_values):
        with pytest.raises(InputError, match=message) as caught:
            compare(plan_of(), plan_of(layer=layer))
        assert caught.value.exit_code == 3


def test_plans_without_a_common_tensor_are_not_compared():
    plan = plan_of()
    names = [t.model_copy(update={"name": f"x.{t.name}"}) for t in plan.tensors]
    other = plan.model_copy(update={"tensors": tuple(names)})
    with pytest.raises(InputError, match="has no tensor in common with B"):
        plan_diff_view(plan, other)


def written(tmp_path: Path, name: str, plan: Plan) -> str:
    path = tmp_path / name
    path.write_text(plan.to_json())
    return str(path)


def test_the_command_line_prints_a_view_or_json(tmp_path, capsys):
    a = written(tmp_path, "a.json", plan_of())
    b = written(tmp_path, "b.json", plan_of(base="Q4_K"))
    other = written(tmp_path, "c.json", plan_of(layer=DENSE | {"attn_q": (512, 256)}))
    assert main(["plan", "diff", a, b]) == 0
    assert "Q8_0>Q4_K" in capsys.readouterr().out
    assert main(["plan", "diff", a, b, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["a"]["policy"] == "uniform-Q8_0"
    assert values["file_size_bytes_difference"] < 0
    assert main(["plan", "diff", a, other]) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("ewq: plan: hand-made: blk.0.attn_q.weight has sha")


# Maps in 80 columns.


def every_other(n_layers: int, layer, ggml_type: str) -> Plan:
    """Each role changes in layers of its own, so that no two share a column."""
    roles = [role for role in layer if not role.endswith(("norm", "inp"))]
    types = {
        f"blk_{i}_{role}_weight": ggml_type
        for i in range(n_layers)
        for k, role in enumerate(roles)
        if i % len(roles) == k
    }
    return plan_of(n_layers, layer, "IQ4_NL", **types)


@pytest.mark.parametrize("layer", [DENSE, MOE])
@pytest.mark.parametrize("n_layers", [4, 126])
def test_views_fit_80_columns_and_lose_nothing(layer, n_layers):
    a, b = plan_of(n_layers, layer, "IQ4_NL"), every_other(n_layers, layer, "IQ3_S")
    for width in (80, 200):
        shown = lines_of(plan_view(b), width)
        assert max(map(len, shown)) <= width
        n_quantizable = sum(t.is_quantizable for t in b.tensors)
        cells = sum(line.count("IQ4_NL") + line.count("IQ3_S") for line in shown)
        assert cells >= n_quantizable
        diff = lines_of(plan_diff_view(a, b), width)
        assert max(map(len, diff)) <= width
        changed = plan_diff_values(a, b)["tensors"]
        marks = sum(line.count("IQ4_NL>IQ3_S") for line in diff)
        assert marks == len(changed) + 1, "each in the map, and one in the table"


def test_a_view_by_tensor_fits_too():
    scan = make_scan([float(i) for i in range(8)], layer=MOE)
    plan = make_plan(scan, EwqPolicy(granularity="tensor"), make_layout(scan))
    lines = lines_of(plan_view(plan))
    assert max(map(len, lines)) <= 80
    header = next(line for line in lines if line.startswith("layer "))
    assert header.split()[1] == "q", "no z where no layer was decided"


@pytest.mark.parametrize("width", [1, 20])
def test_a_terminal_of_no_width_is_no_error(width):
    lines_of(plan_view(plan_of(layer=MOE)), width)
    lines_of(plan_diff_view(plan_of(), plan_of(base="Q4_K")), width)


def test_roles_stand_in_the_order_of_a_layer():
    roles = ["ffn_down_exps", "attn_output", "ssm_in", "ffn_gate_exps", "attn_q",
             "attn_qkv", "ffn_up_exps", "ffn_gate_shexp"]  # fmt: skip
    assert [short_role(role) for role in in_order(roles)] == [
        "q", "o", "qkv", "gate_exps", "gate_shexp", "up_exps", "down_exps", "ssm_in",
    ]  # fmt: skip

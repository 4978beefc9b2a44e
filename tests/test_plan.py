"""The rule, the types and the bytes of a plan, against numbers worked out by hand."""

from __future__ import annotations

import json
from math import inf, prod, sqrt
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ewq_gguf import ggml_types
from ewq_gguf._version import __version__
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.ggml_types import n_dims
from ewq_gguf.plan.assemble import provenance
from ewq_gguf.plan.build import make_plan
from ewq_gguf.plan.check import check_sound
from ewq_gguf.plan.ewq import decide, thresholds
from ewq_gguf.plan.policy import check_policy
from ewq_gguf.plan.size_target import SizeTarget
from ewq_gguf.plan.sizes import header_bytes, padded, tensor_info_bytes
from ewq_gguf.records import (
    EwqPolicy,
    LayoutTensor,
    Plan,
    UniformPolicy,
    load_record,
)
from ewq_gguf.records.plan import Thresholds
from tests.scans import MODEL, decisions, make_layout, make_scan, types

LADDER = ("Q4_K", "Q8_0", "raw")
ENTROPIES = st.lists(
    st.floats(min_value=0, max_value=40, allow_subnormal=False), min_size=1, max_size=40
)


# The rule.


def test_threshold_is_mean_minus_factor_times_population_deviation():
    limits = thresholds([1.0, 2.0, 3.0, 4.0, 10.0], 0.5)

    assert limits.mean == 4.0
    assert limits.std == pytest.approx(sqrt(10), rel=1e-15)
    assert limits.low == pytest.approx(4 - 0.5 * sqrt(10), rel=1e-15)


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        # mu = 4, sigma = 3.1623
        pytest.param(0.0, "Q4_K Q4_K Q4_K raw raw", id="T-is-mu"),
        pytest.param(0.5, "Q4_K Q4_K Q8_0 raw raw", id="T-2.42"),
        pytest.param(0.9, "Q4_K Q8_0 Q8_0 raw raw", id="T-1.15"),
        pytest.param(1.0, "Q8_0 Q8_0 Q8_0 raw raw", id="T-0.84"),
        pytest.param(1e300, "Q8_0 Q8_0 Q8_0 raw raw", id="huge"),
    ],
)
def test_layers_are_decided_by_hand_computed_thresholds(factor, expected):
    scan = make_scan([1.0, 2.0, 3.0, 4.0, 10.0])

    plan = make_plan(scan, EwqPolicy(factor=factor))

    assert decisions(plan) == expected.replace("raw", "BF16").split()


def test_entropy_at_the_mean_is_raw_and_at_the_threshold_is_middle():
    # mu = 2, sigma = 1, T = 1: both edges are hit exactly.
    assert decisions(make_plan(make_scan([1.0, 2.0, 3.0]), EwqPolicy(factor=0.0))) == [
        "Q4_K",
        "BF16",
        "BF16",
    ]
    assert thresholds([1.0, 3.0], 1.0) == Thresholds(
        mean=2.0, std=1.0, low=1.0, high=2.0
    )
    assert decisions(make_plan(make_scan([1.0, 3.0]), EwqPolicy())) == ["Q8_0", "BF16"]


@given(st.floats(-40, 40, allow_subnormal=False), st.integers(1, 40), st.floats(0, 9))
def test_equal_entropies_are_all_raw(entropy, n_layers, factor):
    limits = thresholds([entropy] * n_layers, factor)

    assert limits.std == 0.0
    assert LADDER[decide(entropy, limits, 3)] == "raw"


def test_a_single_layer_is_raw():
    assert decisions(make_plan(make_scan([4.6]), EwqPolicy())) == ["BF16"]


def test_a_ladder_of_two_decides_at_the_mean_alone():
    scan = make_scan([1.0, 2.0, 3.0, 4.0, 10.0])

    for factor in (0.0, 0.5, 3.0):
        plan = make_plan(scan, EwqPolicy(factor=factor, ladder=("Q6_K", "raw")))
        assert decisions(plan) == ["Q6_K"] * 3 + ["BF16"] * 2


def test_a_ladder_without_raw_has_its_own_top():
    plan = make_plan(make_scan([0.0, 9.0, 10.0]), EwqPolicy(ladder=("Q2_K", "Q4_K")))

    assert decisions(plan) == ["Q2_K", "Q4_K", "Q4_K"]


def test_the_measure_named_decides():
    scan = make_scan([1.0, 3.0], bits=[8.0, 5.0])

    softmax = make_plan(scan, EwqPolicy(measure="softmax"))
    histogram = make_plan(scan, EwqPolicy(measure="histogram"))

    assert decisions(softmax) == ["Q8_0", "BF16"]
    assert decisions(histogram) == ["BF16", "Q8_0"]
    assert [layer.entropy for layer in histogram.layers] == [8.0, 5.0]
    assert histogram.thresholds == {
        "layer": Thresholds(mean=6.5, std=1.5, low=5.0, high=6.5)
    }


@given(ENTROPIES, st.floats(0, 5), st.floats(0, 5))
def test_a_larger_factor_never_lowers_a_layers_precision(entropies, one, other):
    small, large = sorted((one, other))

    for entropy in entropies:
        before = decide(entropy, thresholds(entropies, small), 3)
        after = decide(entropy, thresholds(entropies, large), 3)
        assert before <= after


@given(ENTROPIES, st.floats(0, 5))
def test_more_entropy_never_means_less_precision(entropies, factor):
    limits = thresholds(entropies, factor)

    ranks = [decide(h, limits, 3) for h in sorted(entropies)]

    assert ranks == sorted(ranks)
    assert ranks[-1] == 2  # the largest is never below the mean


@given(ENTROPIES, st.randoms())
def test_the_order_of_the_layers_does_not_change_the_thresholds(entropies, random):
    shuffled = list(entropies)
    random.shuffle(shuffled)

    assert thresholds(shuffled, 1.0) == thresholds(entropies, 1.0)


def test_the_proof_of_concepts_rule_is_raw_from_the_75th_percentile():
    # Weights 1, 1, 6 of 1, 2, 9: mu 57/8; sigma of 1, 2, 9 is sqrt(38/3); q75 5.5.
    limits = thresholds([1.0, 2.0, 9.0], 1.0, rule="q75", n_weights=[1, 1, 6])

    assert limits.mean == 7.125
    assert limits.std == pytest.approx(sqrt(38 / 3), rel=1e-15)
    assert limits.low == pytest.approx(7.125 - sqrt(38 / 3), rel=1e-15)
    assert limits.high == 5.5
    assert [decide(h, limits, 3) for h in (1.0, 3.6, 5.4, 5.5, 9.0)] == [0, 1, 1, 2, 2]
    # At a small factor T lies above the percentile, which then decides first.
    assert (
        decide(6.0, thresholds([1, 2, 9], 0.0, rule="q75", n_weights=[1, 1, 6]), 3) == 2
    )


def test_rule_q75_weighs_layers_by_their_parameters():
    scan = make_scan([1.0, 2.0, 3.0, 4.0, 10.0])  # each of 1000 weights: mu stays 4

    plan = make_plan(scan, EwqPolicy(rule="q75", factor=0.9))

    assert plan.thresholds["layer"].high == 4.0
    assert decisions(plan) == ["Q4_K", "Q8_0", "Q8_0", "BF16", "BF16"]
    high = make_plan(make_scan([1.0, 2.0, 3.0, 4.0]), EwqPolicy(rule="q75"))
    assert high.thresholds["layer"].high == 3.25
    assert decisions(high) == ["Q4_K", "Q8_0", "Q8_0", "BF16"]


def test_a_ladder_of_four_keeps_its_lowest_for_budgets():
    ladder = ("TQ1_0", "Q4_K", "Q8_0", "raw")

    plan = make_plan(make_scan([0.0, 9.0, 10.0]), EwqPolicy(ladder=ladder))

    assert decisions(plan) == ["Q4_K", "BF16", "BF16"]


def by_tensor(entropies, budget=None, **policy):
    """A scan whose tensors have these (attn_q, ffn_down, ffn_up) entropies."""
    scan = make_scan([0.0] * len(entropies))
    found = {
        f"blk.{idx}.{role}.weight": entropy
        for idx, layer in enumerate(entropies)
        for role, entropy in zip(("attn_q", "ffn_down", "ffn_up"), layer, strict=True)
    }
    tensors = tuple(
        t.model_copy(update={"softmax_entropy_nats": found.get(t.name, 0.0)})
        for t in scan.tensors
    )
    scan = scan.model_copy(update={"tensors": tensors})
    return make_plan(scan, EwqPolicy(granularity="tensor", **policy), budget=budget)


def test_tensors_are_decided_within_their_role():
    plan = by_tensor([(1.0, 50.0, 7.0), (2.0, 50.0, 6.0), (9.0, 50.0, 5.0)], factor=0.7)

    # attn_q: mu 4, sigma 3.56, T 1.51; ffn_down: equal; ffn_up: mu 6, T 5.43.
    asked = types(plan)
    assert [asked[f"blk.{i}.attn_q.weight"] for i in range(3)] == [
        "Q4_K",
        "Q8_0",
        "BF16",
    ]
    assert {asked[f"blk.{i}.ffn_down.weight"] for i in range(3)} == {"BF16"}
    assert [asked[f"blk.{i}.ffn_up.weight"] for i in range(3)] == [
        "BF16",
        "BF16",
        "Q4_K",
    ]
    assert plan.thresholds["attn_q"].mean == 4.0
    assert {t.entropy for t in plan.tensors if t.role == "ffn_up"} == {7.0, 6.0, 5.0}
    assert [layer.ggml_type for layer in plan.layers] == [None, None, None]
    assert [layer.decision for layer in plan.layers] == [None, None, None]


def test_tensors_are_promoted_by_their_distance_from_the_roles_mean():
    # z within the role: attn_q -0.84, -0.56, 1.40; ffn_up 1.22, 0, -1.22.
    values = [(1.0, 5.0, 70.0), (2.0, 5.0, 60.0), (9.0, 5.0, 50.0)]
    policy = {"ladder": ("Q8_0", "raw"), "embedding_type": "raw", "output_type": "raw"}
    # Q8_0 of 576 is 612 bytes, of 1536 1632; embedding, head and four norms.
    uniform = 3 * (576 * 612 + 576 * 1632 + 1536 * 612) + 2 * 73_728 + 4 * 2304
    step = 576 * 576 * 2 - 576 * 612  # of attn_q, the smallest matrix

    plan = by_tensor(
        values, budget=SizeTarget("test", n_bytes=uniform + step), **policy
    )

    assert plan.totals.file_size_bytes == uniform + step
    raw = [t.name for t in plan.tensors if t.layer_idx is not None]
    raw = [n for n in raw if types(plan)[n] == "BF16"]
    assert raw == ["blk.2.attn_q.weight"]


# The types.


def test_a_layers_type_is_for_its_matrices_and_norms_stay():
    plan = make_plan(make_scan([1.0, 3.0]), EwqPolicy(ladder=("Q4_0", "Q8_0", "raw")))

    assert types(plan) == {
        "token_embd.weight": "BF16",
        "blk.0.attn_norm.weight": "F32",
        "blk.0.attn_q.weight": "Q8_0",
        "blk.0.ffn_down.weight": "Q8_0",
        "blk.0.ffn_up.weight": "Q8_0",
        "blk.1.attn_norm.weight": "F32",
        "blk.1.attn_q.weight": "BF16",
        "blk.1.ffn_down.weight": "BF16",
        "blk.1.ffn_up.weight": "BF16",
        "output_norm.weight": "F32",
        "output.weight": "BF16",
    }
    norm = plan.tensors[1]
    assert (norm.is_quantizable, norm.base_type, norm.size_bytes) == (
        False,
        "F32",
        2304,
    )
    assert [t.layer_idx for t in plan.tensors] == [None, *[0] * 4, *[1] * 4, None, None]


def test_embedding_and_head_have_types_of_their_own():
    policy = EwqPolicy(embedding_type="Q8_0", output_type="Q6_K")

    asked = types(make_plan(make_scan([4.0]), policy))

    assert asked["token_embd.weight"] == "Q8_0"
    assert asked["output.weight"] == "Q6_K"
    assert asked["blk.0.attn_q.weight"] == "BF16"


def test_uniform_gives_every_quantizable_tensor_one_type():
    plan = make_plan(make_scan([1.0, 3.0]), UniformPolicy(ggml_type="Q5_0"))

    assert {t.ggml_type for t in plan.tensors if t.is_quantizable} == {"Q5_0"}
    assert {t.ggml_type for t in plan.tensors if not t.is_quantizable} == {"F32"}
    assert plan.thresholds == {}
    assert [layer.entropy for layer in plan.layers] == [None, None]
    assert plan.ftype == "Q5_0"


@pytest.mark.parametrize(
    ("dtype", "largest", "asked", "raw"),
    [
        pytest.param("BF16", 1.0, "auto", "BF16", id="bf16"),
        pytest.param("F16", 1.0, "auto", "F16", id="f16"),
        pytest.param("F32", 65504.0, "auto", "F16", id="f32-that-fits-f16"),
        pytest.param("F32", 65505.0, "auto", "BF16", id="f32-too-large-for-f16"),
        pytest.param("BF16", 1.0, "F16", "F16", id="bf16-as-f16"),
        pytest.param("F32", 1.0, "BF16", "BF16", id="f32-as-bf16"),
    ],
)
def test_raw_is_the_sources_16_bit_type(dtype, largest, asked, raw):
    scan = make_scan([1.0], dtype=dtype, largest=largest)

    plan = make_plan(scan, UniformPolicy(ggml_type="raw"), raw_type=asked)

    assert plan.raw_type == raw
    assert {t.written_type for t in plan.tensors if t.is_quantizable} == {raw}
    assert plan.ftype == raw


def test_raw_of_a_mixed_source_is_what_most_weights_have():
    scan = make_scan([1.0, 2.0], dtype="F16")
    few = scan.tensors[0].model_copy(update={"dtype": "BF16"})
    scan = scan.model_copy(update={"tensors": (few, *scan.tensors[1:])})

    assert make_plan(scan, EwqPolicy()).raw_type == "F16"


@pytest.mark.parametrize(
    ("policy", "ftype"),
    [
        (EwqPolicy(), "Q8_0"),
        (EwqPolicy(ladder=("Q4_K", "raw")), "Q4_K_M"),
        (UniformPolicy(ggml_type="Q2_K"), "Q2_K"),
        (UniformPolicy(ggml_type="Q3_K"), "Q3_K_M"),
        (UniformPolicy(ggml_type="Q5_K"), "Q5_K_M"),
        (UniformPolicy(ggml_type="MXFP4"), "MXFP4_MOE"),
        (UniformPolicy(ggml_type="F16"), "F16"),
        # Two float types: overrides need a quantised base type.
        (UniformPolicy(ggml_type="raw"), "BF16"),
        (UniformPolicy(ggml_type="F16", embedding_type="BF16"), "Q8_0"),
    ],
)
def test_the_base_type_takes_overrides_unless_all_is_one_float_type(policy, ftype):
    assert make_plan(make_scan([1.0, 3.0]), policy).ftype == ftype


# Fallbacks and bytes.


@pytest.mark.parametrize(
    ("asked", "written", "row"),
    [
        # 576 = 18 x 32: bytes per row by hand
        ("Q4_K", "Q5_0", 18 * 22),
        ("Q5_K", "Q5_1", 18 * 24),
        ("Q6_K", "Q8_0", 18 * 34),
        ("Q3_K", "Q4_0", 18 * 18),
        ("Q2_K", "Q4_0", 18 * 18),
        ("TQ1_0", "Q4_0", 18 * 18),
        ("IQ4_XS", "IQ4_NL", 18 * 18),
        ("IQ3_S", "IQ4_NL", 18 * 18),
        ("Q8_0", "Q8_0", 18 * 34),
        ("MXFP4", "MXFP4", 18 * 17),
        ("BF16", "BF16", 2 * 576),
    ],
)
def test_rows_of_576_are_planned_as_they_will_be_written(asked, written, row):
    plan = make_plan(make_scan([1.0]), UniformPolicy(ggml_type=asked))

    q = plan.tensors[2]
    assert (q.name, q.ggml_type, q.written_type) == (
        "blk.0.attn_q.weight",
        asked,
        written,
    )
    assert q.size_bytes == 576 * row


def test_fallback_is_per_tensor_not_per_layer():
    written = types(
        make_plan(make_scan([1.0]), UniformPolicy(ggml_type="Q4_K")), "written_type"
    )

    assert written["blk.0.ffn_up.weight"] == "Q5_0"  # rows of 576
    assert written["blk.0.ffn_down.weight"] == "Q4_K"  # rows of 1536 = 6 x 256


def test_rows_that_32_does_not_divide_are_written_as_f16():
    scan = make_scan([1.0], layer={"attn_q": (8, 40)})

    plan = make_plan(scan, UniformPolicy(ggml_type="Q4_K"))

    assert types(plan, "written_type")["blk.0.attn_q.weight"] == "F16"


def test_totals_are_the_hand_computed_sum_of_the_parts():
    scan = make_scan([1.0], layer={"attn_norm": (10,), "attn_q": (3, 64)})
    plan = make_plan(scan, UniformPolicy(ggml_type="Q8_0"), make_layout(scan))

    matrices = 2 * 64 * 612 + 3 * 2 * 34  # the last is 204 bytes, padded to 224
    data = 2 * 64 * 612 + 224 + 64 + 2304  # a norm of 10: 40 bytes padded to 64
    names = ["token_embd.weight", "blk.0.attn_q.weight", "output.weight"]
    infos = sum(8 + len(name) + 4 + 2 * 8 + 4 + 8 for name in names)
    names = ["blk.0.attn_norm.weight", "output_norm.weight"]
    infos += sum(8 + len(name) + 4 + 1 * 8 + 4 + 8 for name in names)
    ours = 8 + len("ewq.version") + 4 + 8 + len(__version__)
    ours += 8 + len("ewq.plan.sha256") + 4 + 8 + 64
    header = -(-(24 + 1000 + ours + infos) // 32) * 32
    totals = plan.totals
    assert sum(t.size_bytes for t in plan.tensors if t.is_quantizable) == matrices
    assert totals.tensor_bytes == data
    assert totals.header_bytes == header
    assert totals.file_size_bytes == header + data
    assert totals.n_weights == 2 * 64 * 576 + 3 * 64 + 10 + 576
    assert totals.bpw == 8 * (header + data) / totals.n_weights
    assert not totals.is_estimate


def test_without_a_layout_the_size_is_an_estimate_of_the_data_alone():
    scan = make_scan([1.0, 3.0])

    exact = make_plan(scan, EwqPolicy(), make_layout(scan))
    estimate = make_plan(scan, EwqPolicy())

    assert estimate.totals.is_estimate
    assert estimate.totals.header_bytes is None
    assert estimate.totals.file_size_bytes == exact.totals.tensor_bytes
    assert types(estimate) == types(exact)
    assert estimate.totals.file_size_bytes < exact.totals.file_size_bytes


def test_tensors_that_only_the_converter_makes_are_planned_too():
    scan = make_scan([1.0])
    layout = make_layout(scan)
    extra = LayoutTensor(name="rope_freqs.weight", shape=(32,), ggml_type="F32")
    layout = layout.model_copy(update={"tensors": (*layout.tensors, extra)})

    plan = make_plan(scan, UniformPolicy(ggml_type="Q4_0"), layout)

    assert plan.tensors[-1].name == "rope_freqs.weight"
    assert plan.tensors[-1].written_type == "F32"
    assert plan.tensors[-1].size_bytes == 128


def test_a_revision_is_carried_by_the_file_and_counted():
    hub = MODEL.model_copy(update={"revision": "a" * 40})
    scan, other = make_scan([1.0]), make_scan([1.0], model=hub)

    assert provenance(hub, "1", "2")["ewq.source.revision"] == "a" * 40
    assert "ewq.source.revision" not in provenance(MODEL, "1", "2")
    one = make_plan(scan, EwqPolicy(), make_layout(scan)).totals
    two = make_plan(other, EwqPolicy(), make_layout(other)).totals
    # Padding to 32 leaves 79 bytes of key and value as 64 to 96.
    assert 64 <= two.file_size_bytes - one.file_size_bytes <= 96


@settings(max_examples=60)
@given(
    st.lists(st.floats(0, 40, allow_subnormal=False), min_size=1, max_size=6),
    st.sampled_from([t for t in ggml_types.PLANNABLE if t.startswith(("Q", "T"))]),
    st.integers(0, 5000),
)
def test_totals_equal_the_sum_of_parts(entropies, lowest, kv_bytes):
    scan = make_scan(entropies)
    policy = EwqPolicy(ladder=(lowest, "F16" if lowest == "Q8_0" else "raw"))
    plan = make_plan(scan, policy, make_layout(scan, kv_bytes))

    totals = plan.totals
    assert totals.header_bytes is not None
    assert totals.tensor_bytes == sum(padded(t.size_bytes) for t in plan.tensors)
    assert totals.file_size_bytes == totals.header_bytes + totals.tensor_bytes
    assert totals.file_size_bytes % 32 == 0
    assert totals.n_weights == sum(prod(t.shape) for t in plan.tensors)
    for tensor in plan.tensors:
        assert tensor.size_bytes == ggml_types.tensor_bytes(
            tensor.written_type, tensor.shape
        )


@pytest.mark.parametrize(
    ("shape", "dims"),
    [((3, 5), 2), ((5,), 1), ((1, 5), 1), ((1, 1, 5), 1), ((2, 1, 5), 3), ((1, 1), 1)],
)
def test_slowest_dimensions_of_one_are_not_written(shape, dims):
    assert n_dims(shape) == dims
    assert tensor_info_bytes("ab", shape) == 8 + 2 + 4 + 8 * dims + 4 + 8


def test_names_are_counted_in_bytes():
    assert tensor_info_bytes("é", (5,)) == tensor_info_bytes("ee", (5,))
    assert header_bytes(0, []) == 32
    assert header_bytes(8, []) == 32
    assert header_bytes(9, []) == 64


def test_a_matrix_of_one_row_is_a_vector_to_llama_quantize():
    scan = make_scan([1.0], layer={"attn_q": (1, 256)})

    tensor = make_plan(scan, UniformPolicy(ggml_type="Q4_K"), make_layout(scan))

    row = tensor.tensors[1]
    assert (row.is_quantizable, row.written_type) == (False, "BF16")


# What is refused.


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(UniformPolicy(ggml_type="q4_k_m"), id="preset"),
        pytest.param(UniformPolicy(ggml_type="Q4_K_M"), id="upper-case-preset"),
        pytest.param(UniformPolicy(ggml_type="I8"), id="integer-type"),
        pytest.param(UniformPolicy(ggml_type=""), id="empty"),
        pytest.param(EwqPolicy(embedding_type="Q9"), id="embedding"),
        pytest.param(EwqPolicy(output_type="RAW"), id="output"),
        pytest.param(EwqPolicy(ladder=("Q4_K",)), id="one-step"),
        pytest.param(EwqPolicy(ladder=()), id="no-step"),
        pytest.param(EwqPolicy(ladder=("raw", "Q8_0", "Q4_K")), id="falling"),
        pytest.param(EwqPolicy(ladder=("Q4_K", "Q4_K", "raw")), id="twice"),
        pytest.param(EwqPolicy(ladder=("Q4_K", "Q8_0", "Q9_9")), id="unknown"),
        pytest.param(EwqPolicy(factor=-0.1), id="negative-factor"),
        pytest.param(EwqPolicy(epsilon=-1e-9), id="negative-epsilon"),
        pytest.param(EwqPolicy(n_bins=1), id="one-bin"),
    ],
)
def test_an_impossible_policy_is_a_usage_error(policy):
    with pytest.raises(UsageError) as caught:
        check_policy(policy)
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError):
        make_plan(make_scan([1.0]), policy)


@pytest.mark.parametrize("ggml_type", sorted(ggml_types.IMATRIX_TYPES))
def test_a_type_that_needs_an_imatrix_is_refused_before_any_work(ggml_type):
    with pytest.raises(InputError, match="needs an importance matrix"):
        check_policy(UniformPolicy(ggml_type=ggml_type))


@pytest.mark.parametrize("value", [inf, -inf, float("nan")])
@pytest.mark.parametrize("name", ["factor", "epsilon"])
def test_parameters_that_are_no_numbers_make_no_policy(name, value):
    with pytest.raises(ValueError, match="finite"):
        EwqPolicy(**{name: value})


def test_a_scan_with_another_epsilon_is_refused():
    scan = make_scan([1.0, 2.0], epsilon=0.0)

    with pytest.raises(InputError, match=r"epsilon 0.0, the policy 0.01"):
        make_plan(scan, EwqPolicy())
    assert make_plan(scan, EwqPolicy(epsilon=0.0)).thresholds


def test_only_the_parameters_of_the_deciding_measure_must_agree():
    scan = make_scan([1.0, 2.0], epsilon=0.0)

    make_plan(scan, EwqPolicy(measure="histogram"))
    make_plan(scan, UniformPolicy(ggml_type="Q8_0"))
    with pytest.raises(InputError, match="256 bins, the policy 100"):
        make_plan(scan, EwqPolicy(measure="histogram", n_bins=100))


# The record.


@pytest.fixture
def plan():
    scan = make_scan([1.0, 2.0, 3.0, 4.0, 10.0])
    return make_plan(scan, EwqPolicy(factor=0.5), make_layout(scan))


def test_plan_json_has_the_names_of_the_command_line_reference(plan):
    values = json.loads(plan.to_json())

    assert values["schema_name"] == "ewq.plan"
    assert values["schema_version"] == 3
    assert {"name", "ggml_type", "written_type", "size_bytes"} <= values["tensors"][
        0
    ].keys()
    assert {"file_size_bytes", "bpw"} <= values["totals"].keys()
    assert values["policy"] == {
        "name": "ewq",
        "measure": "softmax",
        "epsilon": 0.01,
        "n_bins": 256,
        "factor": 0.5,
        "rule": "mean",
        "granularity": "layer",
        "ladder": ["Q4_K", "Q8_0", "raw"],
        "embedding_type": "auto",
        "output_type": "auto",
    }


def test_json_round_trip_is_equal_sorted_and_to_the_last_bit(plan, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())

    again = load_record(Plan, path, "plan")

    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.sha256 == plan.sha256
    assert (
        plan.to_json()
        == json.dumps(json.loads(plan.to_json()), indent=1, sort_keys=True) + "\n"
    )


@settings(max_examples=50)
@given(st.lists(st.floats(0, 40), min_size=1, max_size=8), st.floats(0, 100))
def test_any_plan_survives_json(entropies, factor):
    plan = make_plan(make_scan(entropies), EwqPolicy(factor=factor))

    assert Plan.model_validate_json(plan.to_json()) == plan


def test_same_inputs_give_the_same_bytes():
    def text():
        scan = make_scan([1.0, 2.0, 3.0])
        return make_plan(scan, EwqPolicy(), make_layout(scan)).to_json()

    assert text() == text()


def test_no_path_of_the_machine_is_in_a_plan(plan, tmp_path):
    assert str(tmp_path.home()) not in plan.to_json()


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        pytest.param(lambda v: v.update(extra=1), "/extra", id="extra-at-top"),
        pytest.param(
            lambda v: v["tensors"][3].update(bits=4), "/tensors/3/bits", id="extra-deep"
        ),
        pytest.param(lambda v: v.pop("totals"), "/totals", id="missing"),
        pytest.param(
            lambda v: v["layers"][0].pop("ggml_type"),
            "/layers/0/ggml_type",
            id="missing-deep",
        ),
        pytest.param(
            lambda v: v.update(schema_version=4), "/schema_version", id="newer"
        ),
        pytest.param(
            lambda v: v["totals"].update(file_size_bytes="9"),
            "/totals/file_size_bytes",
            id="number-as-text",
        ),
        pytest.param(
            lambda v: v["tensors"][0].update(size_bytes=1.5),
            "/tensors/0/size_bytes",
            id="half-a-byte",
        ),
        pytest.param(
            lambda v: v["policy"].update(name="magic"), "/policy", id="policy"
        ),
        pytest.param(
            lambda v: v["policy"].update(measure="gut"),
            "/policy/ewq/measure",
            id="measure",
        ),
        pytest.param(lambda v: v.update(tensors={}), "/tensors", id="wrong-kind"),
    ],
)
@pytest.mark.fault(41)
def test_what_is_no_plan_is_refused_with_a_json_pointer(
    plan, tmp_path, change, pointer
):
    values = json.loads(plan.to_json())
    change(values)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))

    with pytest.raises(InputError) as caught:
        load_record(Plan, path, "plan")

    assert caught.value.exit_code == 3
    assert f"at {pointer}: " in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"schema_name": "ewq.scan"}', id="other-record"),
        pytest.param(b'{"schema_name": ["ewq.plan"]}', id="odd-name"),
        pytest.param(b"\xff\xfe{}", id="not-utf-8"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'{"a":' * 100_000, id="deep-objects"),
        pytest.param(b'{"schema_name": "ewq.plan", "x": 1e400}', id="infinite"),
        pytest.param(
            b'{"schema_name": "ewq.plan", "x": ' + b"9" * 5000 + b"}", id="long"
        ),
    ],
)
def test_a_file_that_is_no_plan_is_an_input_error(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_bytes(text)

    with pytest.raises(InputError) as caught:
        load_record(Plan, path, "plan")
    assert "plan.json" in str(caught.value)


def test_nan_in_a_plan_is_refused(plan, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json().replace('"factor": 0.5', '"factor": NaN'))

    with pytest.raises(InputError):
        load_record(Plan, path, "plan")


def test_a_plan_file_of_gigabytes_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(10 << 30)

    with pytest.raises(InputError, match="10,737,418,240 bytes are more than"):
        load_record(Plan, path, "plan")


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_a_plan_that_cannot_be_read_is_an_input_error(tmp_path, name):
    with pytest.raises(InputError, match="cannot be read"):
        load_record(Plan, tmp_path / name, "plan")


def test_the_checked_in_examples_are_sound_plans():
    examples = sorted((Path(__file__).parent.parent / "plans/examples").glob("*.json"))
    assert len(examples) >= 2
    for path in examples:
        check_sound(load_record(Plan, path, "test"))

"""Algorithm 1, against numbers worked out by hand and a slow reading of its text.

Five layers of one 256 x 256 matrix with entropies 1, 2, 3, 4, 10 (mu 4, sigma 3.16,
T 1.15 at factor 0.9); embedding and head of 64 rows of 576, and a norm of 2304 bytes.

    bytes of       raw    Q8_0    Q4_K   TQ1_0
    a layer     131072   69632   36864   13824
    64 x 576     73728   39168   25344   20736

(on rows of 576 Q4_K falls back to Q5_0, TQ1_0 to Q4_0).
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ewq_gguf import ggml_types
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.plan.budget import FLOOR, fit_types
from ewq_gguf.plan.build import make_fast_plan, make_plan
from ewq_gguf.plan.groups import AllocationGroup
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.plan.size_target import SizeLimit, SizeTarget, parse_bpw, parse_budget
from ewq_gguf.plan.sizes import padded
from ewq_gguf.records import EwqPolicy, FastEwqPolicy, LayoutTensor, UniformPolicy
from tests.scans import decisions, make_layout, make_scan, types

ENTROPIES = [1.0, 2.0, 3.0, 4.0, 10.0]
LAYER = {"attn_q": (256, 256)}
POLICY = EwqPolicy(factor=0.9)
RAW = 805_120
DECISION = 588_032
ALL_Q8, ALL_Q4, ALL_FLOOR = 428_800, 237_312, 112_896


def planned(n_bytes, policy=POLICY, **ask):
    scan = make_scan(ENTROPIES, layer=LAYER)
    return make_plan(scan, policy, budget=SizeTarget("test", n_bytes=n_bytes, **ask))


def seen(plan):
    """Layers, embedding and head, and the bytes."""
    asked = types(plan)
    outside = [asked["token_embd.weight"], asked["output.weight"]]
    return " ".join([*decisions(plan), *outside]), plan.totals.file_size_bytes


@pytest.mark.parametrize(
    ("limit", "case", "expected", "size"),
    [
        pytest.param(RAW, 1, "BF16 " * 7, RAW, id="raw-fits"),
        pytest.param(
            RAW - 1, 2, "Q8_0 BF16 BF16 BF16 BF16 BF16 BF16", RAW - 61_440, id="not"
        ),
        pytest.param(
            DECISION, 2, "Q4_K Q8_0 Q8_0 BF16 BF16 BF16 BF16", DECISION, id="decision"
        ),
        # 3 and 2 need 61440; the lowest layer's step of 32768 fits.
        pytest.param(
            DECISION + 61_439,
            2,
            "Q8_0 Q8_0 Q8_0 BF16 BF16 BF16 BF16",
            DECISION + 32_768,
            id="skips",
        ),
        pytest.param(
            DECISION + 61_440,
            2,
            "Q4_K Q8_0 BF16 BF16 BF16 BF16 BF16",
            DECISION + 61_440,
            id="highest-entropy-first",
        ),
        # From Q8_0 everywhere: head, embedding, then the layer of entropy 10.
        pytest.param(
            DECISION - 1,
            3,
            "Q8_0 Q8_0 Q8_0 Q8_0 BF16 BF16 BF16",
            559_360,
            id="uniform-8-bit",
        ),
        pytest.param(ALL_Q8, 3, "Q8_0 " * 7, ALL_Q8, id="uniform-8-bit-exactly"),
        pytest.param(
            ALL_Q8 - 1,
            3,
            "Q4_K Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0",
            396_032,
            id="uniform-4-bit",
        ),
        pytest.param(ALL_Q4, 3, "Q4_K " * 7, ALL_Q4, id="uniform-4-bit-exactly"),
        pytest.param(
            ALL_Q4 - 1,
            4,
            "TQ1_0 Q4_K Q4_K Q4_K Q4_K Q4_K Q4_K",
            ALL_Q4 - 23_040,
            id="lowest-entropy-below",
        ),
        pytest.param(
            122_112,
            4,
            "TQ1_0 TQ1_0 TQ1_0 TQ1_0 TQ1_0 Q4_K Q4_K",
            122_112,
            id="embedding-and-head-last",
        ),
        pytest.param(
            122_111,
            4,
            "TQ1_0 TQ1_0 TQ1_0 TQ1_0 TQ1_0 TQ1_0 Q4_K",
            117_504,
            id="embedding-before-the-head",
        ),
        pytest.param(ALL_FLOOR, 4, "TQ1_0 " * 7, ALL_FLOOR, id="the-least"),
    ],
)
def test_each_case_at_its_edges(limit, case, expected, size):
    plan = planned(limit)

    assert seen(plan) == (expected.strip(), size)
    assert plan.budget is not None
    assert plan.budget.case == case
    assert plan.budget.limit_bytes == limit


def test_the_decision_stays_in_the_plan_beside_what_the_budget_made_of_it():
    plan = planned(ALL_Q8)

    assert [layer.decision for layer in plan.layers] == [
        "Q4_K", "Q8_0", "Q8_0", "BF16", "BF16",
    ]  # fmt: skip
    assert plan.budget is not None
    assert (plan.budget.start, plan.budget.n_steps) == ("Q8_0", 0)


@pytest.mark.parametrize("limit", [ALL_FLOOR - 1, 1, RAW + 1])
def test_a_budget_out_of_reach_is_refused_with_the_range(limit):
    with pytest.raises(InputError) as caught:
        planned(limit)

    assert "112,896 to 805,120" in str(caught.value)


def test_a_machine_may_have_more_than_is_needed():
    plan = planned(RAW + 1, may_exceed=True)

    assert plan.budget is not None
    assert (plan.budget.case, plan.totals.file_size_bytes) == (1, RAW)


def test_a_type_given_explicitly_is_fixed():
    policy = POLICY.model_copy(update={"embedding_type": "Q6_K", "output_type": "raw"})
    small, large = planned(200_000, policy), planned(700_000, policy)

    for plan in (small, large):
        assert types(plan)["token_embd.weight"] == "Q6_K"
        assert types(plan)["output.weight"] == "BF16"


def test_steps_that_the_fallback_makes_void_do_not_count():
    # On rows of 576 Q2_K and Q3_K are both written as Q4_0.
    scan = make_scan([1.0, 2.0], layer={"attn_q": (64, 576)})
    policy = EwqPolicy(ladder=("Q2_K", "Q3_K", "Q8_0"))
    least = 4 * 20_736 + 2304

    exactly = make_plan(scan, policy, budget=SizeTarget("test", n_bytes=least))
    more = make_plan(scan, policy, budget=SizeTarget("test", n_bytes=least + 18_432))

    assert exactly.budget is not None
    assert exactly.budget.n_steps == 0
    assert types(more)["output.weight"] == "Q8_0"
    assert more.budget is not None
    assert more.budget.n_steps == 1


def test_a_ladder_of_the_edge_has_its_own_ends():
    policy = EwqPolicy(ladder=("TQ1_0", "Q3_K"))
    decision = make_plan(make_scan(ENTROPIES, layer=LAYER), policy)

    same = planned(decision.totals.file_size_bytes, policy)
    less = planned(decision.totals.file_size_bytes - 1, policy)

    # What is outside the layers is raw with and without a budget that holds it.
    assert [t.ggml_type for t in same.tensors] == [
        t.ggml_type for t in decision.tensors
    ]
    assert seen(same)[0].endswith("BF16 BF16")
    # Q3_K everywhere leaves room for the head alone.
    assert seen(less)[0] == "Q3_K Q3_K Q3_K Q3_K Q3_K Q3_K BF16"
    assert less.totals.file_size_bytes < decision.totals.file_size_bytes
    with pytest.raises(InputError, match="112,896 to"):
        planned(1000, EwqPolicy(ladder=("TQ1_0", "Q3_K")))


@given(
    st.lists(st.floats(0, 10, allow_subnormal=False), min_size=1, max_size=8),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(["layer", "tensor"]),
)
@settings(max_examples=200)
def test_more_budget_never_means_fewer_bytes_nor_one_over(
    entropies, one, other, granularity
):
    layer = {"attn_q": (32, 256), "attn_k": (16, 256), "ffn_down": (32, 288)}
    scan = make_scan(entropies, layer=layer)
    policy = EwqPolicy(granularity=granularity)
    layout = make_layout(scan)
    ends = [
        make_plan(scan, UniformPolicy(ggml_type=t), layout).totals.file_size_bytes
        for t in ("TQ1_0", "raw")
    ]
    sizes = []

    for share in sorted((one, other)):
        n_bytes = round(ends[0] + share * (ends[1] - ends[0]))
        plan = make_plan(
            scan, policy, layout, budget=SizeTarget("test", n_bytes=n_bytes)
        )
        assert plan.totals.file_size_bytes <= n_bytes
        sizes.append(plan.totals.file_size_bytes)

    assert sizes == sorted(sizes)


#: Types by ggml's bits; ladders are drawn from them in this order.
_TYPES = ("TQ1_0", "Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q4_1", "Q5_K", "Q6_K", "Q8_0")


@st.composite
def problems(draw):
    """Units of a few rows, a ladder, and a limit."""
    n_columns = st.sampled_from([32, 64, 256, 288, 512])
    groups = []
    for index in range(draw(st.integers(1, 6))):
        shapes = draw(st.lists(st.tuples(st.integers(1, 9), n_columns), min_size=1))
        tensors = tuple(
            LayoutTensor(name=f"{index}.{i}", shape=shape, ggml_type="F16")
            for i, shape in enumerate(shapes[:3])
        )
        priority = (draw(st.integers(0, 2)), -index)
        rung = draw(st.sampled_from([None, 0, 1]))
        groups.append(AllocationGroup(index, tensors, rung, priority))
    ladder = [
        *draw(st.lists(st.sampled_from(_TYPES), min_size=2, max_size=4, unique=True))
    ]
    ladder.sort(key=ggml_types.bits_per_weight)
    if draw(st.booleans()):
        ladder.append("F16")
    return groups, ladder, draw(st.integers(1, 60_000))


def slowly(groups, ladder, limit):
    """The text of method.md section 3, types counted as written."""

    def size(types):
        return sum(
            padded(
                ggml_types.tensor_bytes(
                    ggml_types.written_type(types[u.key], t.shape[-1]), t.shape
                )
            )
            for u in groups
            for t in u.tensors
        )

    def written(group, name):
        return [ggml_types.written_type(name, t.shape[-1]) for t in group.tensors]

    def group_size(group, name):
        return size({**dict.fromkeys(range(len(groups)), "F32"), group.key: name})

    def rungs(group):
        return (
            ladder if group.rung is not None else list(dict.fromkeys([*ladder, "F16"]))
        )

    def promote(types):
        changed = True
        while changed:
            changed = False
            for group in sorted(groups, key=lambda g: g.priority, reverse=True):
                now = types[group.key]
                for name in rungs(group)[rungs(group).index(now) + 1 :]:
                    larger = group_size(group, name) >= group_size(group, now)
                    if larger and written(group, name) != written(group, now):
                        if size({**types, group.key: name}) <= limit:
                            types = {**types, group.key: name}
                            changed = True
                        break
        return types

    raw = {u.key: "F16" for u in groups}
    if size(raw) <= limit:
        return raw
    decision = {u.key: "F16" if u.rung is None else ladder[u.rung] for u in groups}
    if size(decision) <= limit:
        return promote(decision)
    uniform = [{u.key: name for u in groups} for name in ladder if name != "F16"]
    fitting = [types for types in uniform if size(types) <= limit]
    if fitting:
        return promote(max(fitting, key=size))
    types = min(reversed(uniform), key=size)
    below = ladder[: ladder.index(types[groups[0].key])]
    if ladder[0] != FLOOR:
        below = [FLOOR, *below]
    for group in sorted(groups, key=lambda g: g.priority):
        for name in reversed(below):
            if size(types) > limit and group_size(group, name) < group_size(
                group, types[group.key]
            ):
                types = {**types, group.key: name}
    return types if size(types) <= limit else None


@given(problems())
@settings(max_examples=300)
def test_the_result_is_what_the_repeated_passes_reach(problem):
    groups, ladder, n_bytes = problem
    expected = slowly(groups, ladder, n_bytes)

    try:
        found = fit_types(
            groups, ladder, "F16", SizeLimit("", n_bytes, True), other_bytes=0
        )
    except InputError:
        assert expected is None
    else:
        assert expected is not None
        assert list(found.types) == [expected[group.key] for group in groups]


def test_a_budget_is_bytes_a_share_or_bits():
    scan = make_scan(ENTROPIES, layer=LAYER)
    n_weights = 5 * 256 * 256 + 2 * 64 * 576 + 576

    share = make_plan(scan, POLICY, budget=parse_budget("80%"))
    bpw = make_plan(scan, POLICY, budget=parse_bpw("9.5"))

    assert share.budget is not None
    assert bpw.budget is not None
    assert share.budget.limit_bytes == int(0.8 * RAW)
    assert bpw.budget.limit_bytes == int(9.5 * n_weights / 8)
    assert bpw.totals.bpw <= 9.5


@pytest.mark.fault(62)
@pytest.mark.parametrize(
    "text",
    ["0", "0GB", "-1GB", "nan", "NaN%", "inf", "1e400", "1e400GB", "4.5.6GB", "6",
     "GiB", "", "6 parsecs", "0.1B", "0%", "-5%", "%", "6GiB7", "6_0GB", "٣GB",
     "+1GiB", "1,5GB", "9" * 400 + "GB"],
)  # fmt: skip
def test_a_budget_that_is_no_size_is_a_usage_error(text):
    with pytest.raises(UsageError):
        parse_budget(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e400", "4.5.6", "x", ""])
def test_bits_that_are_no_number_are_a_usage_error(text):
    with pytest.raises(UsageError):
        parse_bpw(text)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("6GiB", 6 << 30),
        ("5.5GB", 5_500_000_000),
        ("700MB", 700_000_000),
        ("124918432B", 124_918_432),
        ("1.5 kib", 1536),
        ("2TiB", 2 << 40),
        ("0.1GB", 100_000_000),
    ],
)
def test_sizes_as_people_write_them(text, n_bytes):
    assert parse_budget(text).n_bytes == n_bytes


def test_a_policy_without_choices_takes_no_budget():
    with pytest.raises(UsageError, match="uniform"):
        planned(RAW, UniformPolicy(ggml_type="Q8_0"))


def fast(n_bytes, **policy):
    scan = make_scan(ENTROPIES, layer=LAYER)
    subject = ModelTensors.of_scan(scan, None, "auto")
    ask = None if n_bytes is None else SizeTarget("test", n_bytes=n_bytes)
    return make_fast_plan(subject, FastEwqPolicy(**policy), [1, 3, 4], budget=ask)


def test_fastewq_quantises_what_was_selected_and_the_last_of_it_lower():
    assert decisions(fast(None)) == "BF16 Q8_0 BF16 Q8_0 Q8_0".split()
    assert decisions(fast(None, n_low=1)) == "BF16 Q8_0 BF16 Q8_0 Q4_K".split()
    assert decisions(fast(None, n_low=9)) == "BF16 Q4_K BF16 Q4_K Q4_K".split()


def test_fastewq_under_a_budget_gives_way_from_the_last_layer():
    whole = RAW - 3 * 61_440

    assert decisions(fast(whole)) == "BF16 Q8_0 BF16 Q8_0 Q8_0".split()
    assert decisions(fast(whole - 1)) == "BF16 Q8_0 BF16 Q8_0 Q4_K".split()
    assert decisions(fast(whole - 32_769)) == "BF16 Q8_0 BF16 Q4_K Q4_K".split()
    assert decisions(fast(whole + 61_440)) == "BF16 BF16 BF16 Q8_0 Q8_0".split()
    # Beyond the selected ones: 8-bit everywhere, promoted from the first layer on.
    lower = whole - 3 * 32_768 - 1
    assert decisions(fast(lower)) == ["Q8_0"] * 5
    assert types(fast(lower))["token_embd.weight"] == "BF16"

"""Policy `optimal`: sensitivities, predictions, selections; and the whole search."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ewq_gguf.checkpoint.gguf_file import GgufTensor
from ewq_gguf.ggml_types import QUANTISED_TYPES, tensor_bytes
from ewq_gguf.llamacpp.quant_error import by_matrix
from ewq_gguf.optimal.allocation import solve_allocation
from ewq_gguf.optimal.candidate_types import (
    candidate_types,
    candidate_types_within,
    fixed_bytes,
    floor_unmeasured,
    keeps_bounds,
    min_file_bytes,
    quantizable,
)
from ewq_gguf.optimal.cost_model import measured_slopes, probed_costs
from ewq_gguf.optimal.latency import (
    Latency,
    LatencyTarget,
    fit_latency,
    needed_weights,
)
from ewq_gguf.optimal.predictor import Prediction, Predictor
from ewq_gguf.optimal.sensitivity import (
    groups_to_halve,
    halves,
    needs_own_probe,
    roles_of,
    slopes,
)
from ewq_gguf.optimal.settings import DEFAULT
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.plan.sizes import padded
from ewq_gguf.records import LayoutTensor, OptimalPolicy
from ewq_gguf.records.quant_error import QuantError
from tests.scans import MODEL

if TYPE_CHECKING:
    from ewq_gguf.optimal.type_prober import TypeProber

LAYERS = 4


def layout(n_columns=256):
    """A model of a few layers, an embedding and a head."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (512, n_columns),
        "output.weight": (512, n_columns),
    }
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (n_columns,),
            f"blk.{i}.attn_q.weight": (n_columns, n_columns),
            f"blk.{i}.ffn_down.weight": (n_columns, 2 * n_columns),
        }
    return tuple(
        LayoutTensor(
            name=name, shape=shape, ggml_type="BF16" if len(shape) > 1 else "F32"
        )
        for name, shape in shapes.items()
    )


def subject_of(tensors):
    return ModelTensors.of_tensors(MODEL, tensors, None, "auto")


def quant_error(error, plain):
    return QuantError(
        name="x", error=error, error_stderr=0.0, plain_error=plain, n_rows=1
    )


def test_groups_are_roles_with_their_layers_in_order():
    names = [t.name for t in reversed(quantizable(subject_of(layout())))]

    groups = roles_of(names)

    assert sorted(groups) == [
        tuple(f"blk.{i}.attn_q.weight" for i in range(LAYERS)),
        tuple(f"blk.{i}.ffn_down.weight" for i in range(LAYERS)),
        ("output.weight",),
        ("token_embd.weight",),
    ]


def test_the_costliest_groups_are_halved_until_tensors_are_known_one_by_one():
    # One tensor of sixteen costs nearly everything: it is found by halving.
    costs = dict.fromkeys((f"blk.{i}.attn_q.weight" for i in range(16)), 1e-4)
    costs["blk.11.attn_q.weight"] = 1.0
    leaves = {group: sum(costs[n] for n in group) for group in roles_of(costs)}
    n_probes = len(leaves)

    while large := groups_to_halve(leaves, 0.01):
        for group in large:
            del leaves[group]
            for half in halves(group):
                leaves[half] = sum(costs[n] for n in half)
                n_probes += 1

    assert leaves["blk.11.attn_q.weight",] == 1.0
    assert n_probes == 1 + 2 * 4  # of 16 to 1, both halves each
    found = slopes(leaves, dict.fromkeys(costs, 0.5))
    assert found["blk.11.attn_q.weight"] == 2.0
    # What was not halved is taken as equal.
    assert found["blk.0.attn_q.weight"] == pytest.approx(1e-4 / 0.5)
    assert found.keys() == costs.keys()


def test_a_tensor_that_loses_nothing_costs_nothing():
    assert slopes({("a", "b"): 0.0}, {"a": 0.0, "b": 0.0}) == {"a": 0.0, "b": 0.0}


def test_an_error_is_doubtful_where_one_column_decides_it():
    probed = quant_error(0.01, 0.008)

    assert not needs_own_probe(quant_error(0.0025, 0.002), probed, 2.0)
    assert not needs_own_probe(quant_error(0.0025, 0.0035), probed, 2.0)
    # The probe's type missed the sink's column, this one hits it.
    assert needs_own_probe(quant_error(0.0001, 0.005), probed, 2.0)
    assert needs_own_probe(quant_error(0.04, 0.005), probed, 2.0)
    assert not needs_own_probe(quant_error(0.0, 0.0), probed, 2.0)


def predictor_of(costs, measured=(), floor=0.0):
    return Predictor(costs, floor, measured=tuple(measured))


COSTS = {
    "blk.0.attn_q.weight": {"Q4_0": 0.02, "Q8_0": 0.001},
    "blk.0.ffn_down.weight": {"Q4_0": 0.04, "Q8_0": 0.002},
    "blk.1.ffn_down.weight": {"Q4_0": 0.06, "Q8_0": 0.003},
}
LOW = dict.fromkeys(COSTS, "Q4_0")


def test_before_anything_is_measured_a_file_costs_the_sum_and_the_floor():
    predictor = predictor_of(COSTS, floor=0.005)

    found = predictor.predict(LOW)

    assert found.kld_nats == pytest.approx(0.125)
    assert 0.02 < found.std_nats < 0.06
    # No multiplier is ever taken as less than a tenth.
    assert found.at_least(100.0) == pytest.approx(0.0125)
    assert predictor.predict({}).kld_nats == 0.005
    now = predictor.corrected_costs()
    assert now == {n: pytest.approx(one) for n, one in COSTS.items()}


def test_a_prediction_that_says_little_still_says_what_cannot_be():
    assert Prediction(0.1, 0.02, 0.01).at_least(3) == pytest.approx(0.04)
    # Known to a third only: it may be a tenth, but not nothing.
    assert Prediction(2.4, 0.9, 0.24).at_least(3) == pytest.approx(0.24)


def test_rounding_is_paid_by_what_is_rounded_and_is_not_learnt_away():
    rounding = {"blk.0.attn_q.weight": {"Q4_0": 0.01, "Q8_0": 0.01}}
    predictor = Predictor(COSTS, 0.005, rounding)
    raw = {**LOW, "blk.0.attn_q.weight": "BF16"}

    assert predictor.predict(LOW).kld_nats == pytest.approx(0.135)
    assert predictor.predict(raw).kld_nats == pytest.approx(0.105)
    assert predictor.corrected_costs()["blk.0.attn_q.weight"] == pytest.approx(
        {"Q4_0": 0.03, "Q8_0": 0.011}
    )
    # A file that is as predicted teaches nothing; a worse one, about the weights.
    assert predictor.after(LOW, 0.135).corrected_costs()["blk.0.attn_q.weight"][
        "Q4_0"
    ] == pytest.approx(0.03)
    assert predictor.after(LOW, 0.2).floor(LOW) == predictor.floor(LOW) == 0.015


def test_a_measured_file_is_learnt_from_and_others_like_it_too():
    predictor = predictor_of(COSTS).after(LOW, 0.18)
    other = {"blk.0.attn_q.weight": "Q4_0"}  # a sixth of that file's cost

    assert predictor.predict(LOW).kld_nats == pytest.approx(0.18, rel=0.03)
    assert predictor.predict(LOW).std_nats < predictor_of(COSTS).predict(LOW).std_nats
    # Another file is worse than thought too, but by less.
    first = predictor_of(COSTS).predict(other).kld_nats
    assert 1.1 < predictor.predict(other).kld_nats / first < 1.5


def test_learning_is_the_normal_equations_of_a_slow_reference():
    measured = [(LOW, 0.15), ({**LOW, "blk.0.attn_q.weight": "Q8_0"}, 0.12)]
    predictor = predictor_of(COSTS, measured)
    cells = [(r, y) for r in ("attn_q", "ffn_down") for y in ("Q4_0", "Q8_0")]
    prior = np.array(
        [
            [0.04 * (1 + (a == c) + (b == d) + ((a, b) == (c, d))) for c, d in cells]
            for a, b in cells
        ]
    )
    rows = np.array([[0.02, 0, 0.1, 0], [0, 0.001, 0.1, 0]])
    y = np.array([0.15, 0.12])
    noise = np.diag(1 / (0.05 * y) ** 2)
    # Information form: precision adds up.
    precision = np.linalg.inv(prior) + rows.T @ noise @ rows
    mean = 1 + np.linalg.solve(precision, rows.T @ noise @ (y - rows @ np.ones(4)))

    now = predictor.corrected_costs()

    assert now["blk.0.attn_q.weight"]["Q4_0"] == pytest.approx(0.02 * mean[0])
    assert now["blk.0.attn_q.weight"]["Q8_0"] == pytest.approx(0.001 * mean[1])
    assert now["blk.1.ffn_down.weight"]["Q4_0"] == pytest.approx(0.06 * mean[2])


def test_draws_are_of_what_is_not_known_yet_and_never_reward_an_error():
    predictor = predictor_of(COSTS)

    drawn = [
        predictor.corrected_costs(np.random.default_rng(i))["blk.0.attn_q.weight"][
            "Q4_0"
        ]
        for i in range(400)
    ]

    assert np.mean(drawn) == pytest.approx(0.02, rel=0.1)
    assert np.std(drawn) == pytest.approx(0.02 * 0.4, rel=0.2)
    assert min(drawn) > 0


@given(st.integers(0, 10**6), st.floats(0.2, 0.95))
def test_a_selection_keeps_the_limit_and_fills_it(seed, share):
    random = np.random.default_rng(seed)
    subject = subject_of(layout())
    menu = candidate_types(
        subject, OptimalPolicy(types=("Q8_0", "Q6_K", "Q5_0", "Q4_K", "Q3_K"))
    )
    costs = {
        name: dict(
            zip(types, [0.0, *np.sort(random.random(len(types) - 1))], strict=True)
        )
        for name, types in menu.items()
    }
    sizes = [
        sum(
            padded(tensor_bytes(types[i], tensor.shape))
            for tensor in quantizable(subject)
            for types in [menu[tensor.name]]
        )
        for i in (0, -1)
    ]
    limit = fixed_bytes(subject) + int(sizes[1] + share * (sizes[0] - sizes[1]))

    types = solve_allocation(subject, costs, limit)

    assert types is not None
    used = fixed_bytes(subject) + sum(
        padded(tensor_bytes(types[t.name], t.shape)) for t in quantizable(subject)
    )
    assert used <= limit
    # Nothing that is left over would pay for a better type of one tensor.
    for tensor in quantizable(subject):
        now = padded(tensor_bytes(types[tensor.name], tensor.shape))
        for ggml_type, cost in costs[tensor.name].items():
            more = padded(tensor_bytes(ggml_type, tensor.shape)) - now
            is_better = cost < costs[tensor.name][types[tensor.name]]
            assert not (is_better and used + more <= limit)


def test_less_than_the_smallest_types_is_no_selection():
    subject = subject_of(layout())
    costs = {name: {"Q8_0": 0.0} for name in candidate_types(subject, OptimalPolicy())}

    assert solve_allocation(subject, costs, fixed_bytes(subject) + 1000) is None


def test_candidate_types_keep_to_blocks_bounds_and_what_needs_a_matrix():
    subject = subject_of(layout(n_columns=96))
    policy = OptimalPolicy(
        types=("Q8_0", "Q4_K", "Q5_0", "Q4_0", "IQ2_XXS"),
        floors={"attn_q": "Q5_0", "*": "Q4_0"},
        ceilings={"token_embd": "Q5_0"},
    )

    found = candidate_types(subject, policy)

    assert found["blk.0.attn_q.weight"] == ("BF16", "Q8_0", "Q5_0")
    assert found["blk.0.ffn_down.weight"] == ("BF16", "Q8_0", "Q5_0", "Q4_0")
    assert found["token_embd.weight"] == ("Q5_0", "Q4_0")
    assert not any("norm" in name for name in found)
    raw = OptimalPolicy(types=("raw", "Q8_0"), floors={"output": "raw"})
    assert candidate_types(subject, raw)["output.weight"] == ("BF16",)
    assert candidate_types(subject, raw)["token_embd.weight"] == ("BF16", "Q8_0")
    # A bound of the user's holds, however few bits a file of this size calls for.
    low = OptimalPolicy(ceilings={"*": "Q4_0"})
    assert candidate_types(subject, low, min_bits=8.0)["output.weight"] == ("Q4_0",)
    wide = candidate_types(
        subject_of(layout()), OptimalPolicy(types=("Q4_K", "IQ2_XXS"))
    )
    # Without a matrix there is no IQ2_XXS.
    assert wide["blk.0.attn_q.weight"] == ("BF16", "Q4_K")
    assert candidate_types(subject, policy, min_bits=8.0)["output.weight"] == (
        "BF16",
        "Q8_0",
    )


def test_of_types_in_any_order_the_largest_allowed_one_is_first():
    subject = subject_of(layout())
    policy = OptimalPolicy(
        types=("IQ4_XS", "Q2_K", "Q4_K", "Q8_0"), ceilings={"ffn_down": "Q2_K"}
    )
    low = OptimalPolicy(types=("Q2_K", "Q3_K"), ceilings={"ffn_down": "Q3_K"})

    assert candidate_types(subject, policy)["blk.0.attn_q.weight"] == (
        "BF16", "Q8_0", "Q4_K", "IQ4_XS", "Q2_K",
    )  # fmt: skip
    assert candidate_types(subject, low, min_bits=4.0)["blk.0.ffn_down.weight"] == (
        "Q3_K",
    )


def test_a_file_of_others_keeps_the_users_bounds_or_is_none():
    types = {"blk.0.attn_v.weight": "Q6_K", "blk.0.ffn_up.weight": "Q4_1"}

    def keeps(**bounds) -> bool:
        return keeps_bounds(OptimalPolicy(**bounds), types, "BF16")

    assert keeps()
    assert keeps(floors={"attn_v": "Q6_K"})
    assert not keeps(floors={"attn_v": "Q8_0"})
    assert not keeps(floors={"attn_v": "raw"})
    assert not keeps(ceilings={"*": "Q5_0"})
    assert not keeps(types=("Q8_0", "Q6_K"))
    assert keeps(types=("Q6_K", "Q4_1"))
    assert keeps_bounds(
        OptimalPolicy(types=("Q8_0",)), {"output.weight": "BF16"}, "BF16"
    )
    # What odd shapes fall back to is no candidate; all types in any order exclude none.
    odd = {"output.weight": "F16"}
    assert keeps_bounds(OptimalPolicy(), odd, "BF16")
    assert keeps_bounds(OptimalPolicy(types=QUANTISED_TYPES[::-1]), odd, "BF16")
    assert not keeps_bounds(OptimalPolicy(types=QUANTISED_TYPES[1:]), odd, "BF16")


def test_types_far_too_small_for_a_size_are_left_out_unless_they_are_needed():
    subject = subject_of(layout())
    room = sum(prod(t.shape) for t in quantizable(subject))  # eight bits per weight
    large = candidate_types_within(
        subject, OptimalPolicy(), fixed_bytes(subject) + room
    )
    needy = OptimalPolicy(
        floors=dict.fromkeys(("token_embd", "output", "ffn_down"), "raw")
    )
    all_types = candidate_types(subject, needy)
    least = min_file_bytes(subject, all_types)

    # Nothing below 0.45 of them.
    assert {"Q4_K", "Q8_0"} <= set(large["blk.0.attn_q.weight"])
    assert "Q3_K" not in large["blk.0.attn_q.weight"]
    assert "Q3_K" in all_types["blk.0.attn_q.weight"]
    # What is unquantised by the user's will takes most of it: the rest has to be small.
    assert candidate_types_within(subject, needy, least) == all_types
    costs = {name: dict.fromkeys(types, 0.0) for name, types in all_types.items()}
    assert solve_allocation(subject, costs, least)
    assert solve_allocation(subject, costs, least - 1) is None


def test_tensors_that_nothing_was_seen_of_keep_the_mean_bits():
    subject = subject_of(layout())
    menu = candidate_types(subject, OptimalPolicy())
    unseen = "blk.3.ffn_down.weight"
    costs = {
        name: dict.fromkeys(types, 0.0 if name == unseen else 1.0)
        for name, types in menu.items()
    }
    n_weights = sum(prod(t.shape) for t in quantizable(subject))
    limit = fixed_bytes(subject) + n_weights * 25 // 32  # 6.25 bits

    found = floor_unmeasured(subject, menu, costs, limit)

    assert found[unseen][-1] == "Q6_K"
    assert {n: k for n, k in found.items() if n != unseen} == {
        n: k for n, k in menu.items() if n != unseen
    }
    # Where all are as small as they can be, so are these.
    least = min_file_bytes(subject, menu)
    assert floor_unmeasured(subject, menu, costs, least) == menu


def test_what_is_never_computed_with_does_not_hide_the_noise():
    errors = dict.fromkeys(("blk.0.attn_q.weight", "blk.0.nextn.eh_proj.weight"), 0.01)
    true = {
        "blk.0.attn_q.weight": {"Q4_0": 0.03, "Q8_0": 0.001},
        "blk.0.nextn.eh_proj.weight": {"Q4_0": 0.0, "Q8_0": 0.0},
    }
    prober = KnownCosts(true)

    measured_slopes(cast("TypeProber", prober), errors, deadline=0.0)

    assert prober.noise_nats == 0.001


def test_other_bytes_are_those_that_no_choice_changes():
    subject = subject_of(layout())
    norms = [t for t in subject.tensors if "norm" in t.name]

    assert fixed_bytes(subject) == sum(4 * prod(t.shape) for t in norms)


def test_times_per_weight_are_found_from_files_of_many_types():
    true = {"Q8_0": 9e-11, "Q4_K": 7e-11, "IQ3_S": 1.4e-10}
    n = 1e8
    mixes = [
        {"Q8_0": n}, {"Q4_K": n}, {"IQ3_S": n}, {"Q4_K": n / 2, "Q8_0": n / 2},
        {"IQ3_S": n / 2, "Q8_0": n / 2}, {"Q8_0": n / 3},
    ]  # fmt: skip
    files = [
        (mix, 0.002 + sum(true[ggml_type] * count for ggml_type, count in mix.items()))
        for mix in mixes
    ]

    found = fit_latency(files)

    assert found.constant_seconds == pytest.approx(0.002, rel=0.1)
    for ggml_type, seconds in true.items():
        assert found.seconds_per_weight[ggml_type] == pytest.approx(seconds, rel=0.05)
    # IQ3_S has fewer bits than Q4_K and is slower: that was measured, not assumed.
    assert found.seconds_per_weight["IQ3_S"] > found.seconds_per_weight["Q4_K"]


def test_a_type_in_one_file_is_taken_by_its_bits_where_that_file_does_not_tell():
    found = fit_latency([({"Q8_0": 1e8}, 0.01), ({"Q8_0": 1e8, "Q4_0": 1e2}, 0.01)])

    ratio = found.seconds_per_weight["Q4_0"] / found.seconds_per_weight["Q8_0"]
    assert ratio == pytest.approx(4.5 / 8.5, rel=0.3)


def test_a_token_needs_the_head_some_experts_and_no_embedding_but_a_tied_one():
    tensors = quantizable(subject_of(layout()))
    experts = LayoutTensor(
        name="blk.0.ffn_up_exps.weight", shape=(8, 32, 256), ggml_type="BF16"
    )

    heads = LayoutTensor(
        name="blk.0.attn_k_b.weight", shape=(4, 32, 64), ggml_type="BF16"
    )
    looked_up = LayoutTensor(
        name="per_layer_token_embd.weight", shape=(512, 64), ggml_type="BF16"
    )

    needed = needed_weights([*tensors, experts, heads, looked_up], expert_share=0.25)

    assert needed["token_embd.weight"] == 0
    assert needed["output.weight"] == 512 * 256
    assert needed["blk.0.ffn_up_exps.weight"] == 2 * 32 * 256
    assert needed["blk.0.attn_k_b.weight"] == 4 * 32 * 64  # every head is needed
    assert needed["per_layer_token_embd.weight"] == 0
    tied = [tensor for tensor in tensors if tensor.name != "output.weight"]
    assert needed_weights(tied)["token_embd.weight"] == 512 * 256


@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_a_latency_target_is_met_and_costs_nothing_where_it_is_met_anyway(seed, share):
    random = np.random.default_rng(seed)
    subject = subject_of(layout())
    types = ("Q8_0", "Q6_K", "Q5_0", "Q4_K", "IQ3_S")
    menu = candidate_types(subject, OptimalPolicy(types=types))
    costs = {
        name: dict(
            zip(menu[name], np.sort(random.random(len(menu[name]))), strict=True)
        )
        for name in menu
    }
    # A type of few bits may be the slowest.
    drawn = random.uniform(0.5e-10, 2e-10, len(types))
    seconds_per_weight = {"BF16": 2e-10} | dict(zip(types, drawn, strict=True))
    latency = Latency(0.001, seconds_per_weight, 1e-11)
    weights = needed_weights(quantizable(subject))
    limit = fixed_bytes(subject) + 2 * sum(
        prod(tensor.shape) for tensor in quantizable(subject)
    )
    free = solve_allocation(subject, costs, limit)
    assert free is not None
    fastest = min(seconds_per_weight.values()) * sum(weights.values()) + 0.001
    slowest = latency.seconds(free, weights)
    target = LatencyTarget(
        latency, weights, fastest * 1.0001 + share * (slowest - fastest)
    )

    found = solve_allocation(subject, costs, limit, target)

    assert found is not None
    assert latency.seconds(found, weights) <= target.max_seconds
    if slowest <= target.max_seconds:
        assert found == free
    too_fast = LatencyTarget(latency, weights, 0.5 * fastest)
    assert solve_allocation(subject, costs, limit, too_fast) is None


class KnownCosts:
    """A prober of a model whose costs are known: additive, but for what is told."""

    noise_nats = 0.0
    n_probes = 0
    settings = DEFAULT

    def __init__(self, true):
        self.true = true
        self.asked = []

    def __call__(self, wanted):
        wanted = list(wanted)
        self.asked += wanted
        self.n_probes += len(wanted)
        return {
            (names, ggml_type): sum(self.true[name][ggml_type] for name in names)
            for names, ggml_type in wanted
        }

    def without_noise(self, cost):
        return cost


def settled(true, errors, choose):
    prober = KnownCosts(true)
    found = probed_costs(cast("TypeProber", prober), errors, choose, seconds=60.0)
    return found, prober


def test_types_that_are_chosen_are_probed_and_their_role_corrected():
    names = [f"blk.{i}.attn_v.weight" for i in range(4)]
    types = {"Q4_0": 0.04, "Q5_1": 0.01, "Q8_0": 0.0001}
    errors = {name: {k: quant_error(e, e) for k, e in types.items()} for name in names}
    # Q5_1 costs a quarter of what its error says, in all layers but for the first.
    true = {
        name: {"Q4_0": 0.04 * (i + 1), "Q5_1": 0.0025 * (i + 1), "Q8_0": 0.0001}
        for i, name in enumerate(names)
    }

    found, prober = settled(
        true, errors, lambda costs: dict.fromkeys(names[1:], "Q5_1")
    )

    # The whole role, whichever layers were chosen: so the next size finds it known.
    assert (tuple(names), "Q5_1") in prober.asked
    for i, name in enumerate(names):
        assert found[name]["Q5_1"] == pytest.approx(0.0025 * (i + 1))
        assert found[name]["Q4_0"] == pytest.approx(0.04 * (i + 1))


def test_a_type_is_not_passed_over_for_a_price_that_nobody_measured():
    name = "blk.0.attn_v.weight"
    types = {"Q4_0": 0.04, "Q5_1": 0.02, "Q5_K": 0.015}
    errors = {name: {ggml_type: quant_error(e, e) for ggml_type, e in types.items()}}
    true = {name: {"Q4_0": 0.04, "Q5_1": 0.006, "Q5_K": 0.012, "Q8_0": 0.0001}}

    found, prober = settled(
        true,
        errors,
        lambda costs: {name: min(costs[name], key=costs[name].__getitem__)},
    )

    assert min(found[name], key=found[name].__getitem__) == "Q5_1"
    assert found[name]["Q5_1"] == pytest.approx(0.006)
    # What cannot be chosen, however well it does, is not probed.
    assert not any(ggml_type == "Q4_0" for _, ggml_type in prober.asked[1:])


def test_a_doubtful_type_costs_the_worse_until_its_own_probe():
    name = "blk.11.ffn_down.weight"
    errors = {
        name: {
            "Q4_0": quant_error(0.05, 0.008),
            "Q5_K": quant_error(0.00005, 0.0015),  # hits the sink's column
            "Q2_K": quant_error(0.002, 0.06),
        }
    }
    true = {name: {"Q4_0": 0.05, "Q5_K": 0.0001, "Q2_K": 0.006, "Q8_0": 0.00001}}

    found, prober = settled(true, errors, lambda costs: {name: "Q5_K"})

    assert found[name]["Q5_K"] == pytest.approx(0.0001)  # probed
    assert found[name]["Q2_K"] == pytest.approx(0.05 * 0.06 / 0.008)  # not chosen
    # What was probed itself is not corrected by its role's probe.
    assert ((name,), "Q5_K") in prober.asked
    assert [one for one in prober.asked if one[1] == "Q5_K"] == [((name,), "Q5_K")]


def test_a_stack_that_is_not_of_experts_has_a_row_for_each_matrix():
    heads = GgufTensor("blk.0.attn_k_b.weight", (4, 8, 32), "BF16", 0, 2048)

    found = by_matrix(np.arange(128, dtype=np.float32)[None], heads)

    assert found is not None
    assert found.shape == (4, 32)
    assert found[1, 0] == 32
    assert by_matrix(None, heads) is None


def test_a_type_that_was_not_timed_takes_what_its_bits_do():
    found = fit_latency([({"Q8_0": 1e8}, 0.01), ({"Q4_0": 1e8}, 0.006)])

    assert found.of_type("Q8_0") == found.seconds_per_weight["Q8_0"]
    ratio = found.of_type("Q6_K") / found.of_type("Q8_0")
    assert 0.5 < ratio < 1.0

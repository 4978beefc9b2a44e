"""Plans that no rule would make, and what a study's numbers say together."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from rich.console import Console

from ewq_gguf.bench.statistics import kld_difference
from ewq_gguf.entropy.layers import layer_scans, layer_statistics
from ewq_gguf.errors import UsageError
from ewq_gguf.experiments.controls import (
    check_probe_type,
    controls,
    correlations,
    probes,
    rank_among,
)
from ewq_gguf.plan.build import make_plan
from ewq_gguf.plan.check import check_sound
from ewq_gguf.plan.naming import plan_label
from ewq_gguf.records import ControlPolicy, EwqPolicy, Plan, UniformPolicy
from ewq_gguf.report.plan_diff_view import plan_diff_values
from ewq_gguf.report.plan_view import plan_view
from tests.scans import LAYER, decisions, make_layout, make_scan
from tests.studies import study_file

# mu 4, sigma 3.16: below 0.84 the lowest, from 4 on raw.
ENTROPIES = [4.5, 0.5, 5.5, 3.0, 6.5]
PLANNED = ["BF16", "Q4_0", "BF16", "Q8_0", "BF16"]
VARIANCES = dict(enumerate([0.1, 0.2, 0.5, 0.3, 0.4]))
POLICY = EwqPolicy(ladder=("Q4_0", "Q8_0", "raw"))


def planned(entropies=ENTROPIES, policy=POLICY, **of_scan) -> Plan:
    scan = make_scan(entropies, **of_scan)
    return make_plan(scan, policy, make_layout(scan))


def shown(plan: Plan) -> str:
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(plan_view(plan))
    return " ".join(capture.get().split())


def policy_of(control: Plan) -> ControlPolicy:
    assert isinstance(control.policy, ControlPolicy)
    return control.policy


def by_order(made: list[Plan], order: str) -> Plan:
    return next(one for one in made if policy_of(one).order == order)


def test_the_hand_made_plan_is_what_the_comments_say():
    assert decisions(planned()) == PLANNED


def test_every_control_has_as_many_layers_of_each_type_and_as_many_bytes():
    plan = planned()

    for control in controls(plan, VARIANCES, 5):
        check_sound(control)
        assert Counter(decisions(control)) == Counter(PLANNED)
        assert control.totals == plan.totals
        assert control.ftype == plan.ftype
        outside = [t for t in control.tensors if t.layer_idx is None]
        assert outside == [t for t in plan.tensors if t.layer_idx is None]


def test_layers_of_other_shapes_make_other_sizes_exact_ones():
    scan = make_scan(ENTROPIES)
    layout = make_layout(scan)
    wide = tuple(
        t.model_copy(update={"shape": (4096, 576)})
        if t.name == "blk.1.ffn_up.weight"
        else t
        for t in layout.tensors
    )
    plan = make_plan(scan, POLICY, layout.model_copy(update={"tensors": wide}))

    sizes = {c.totals.file_size_bytes for c in controls(plan, VARIANCES, 5)}

    assert len(sizes) > 1
    for control in controls(plan, VARIANCES, 5):
        check_sound(control)


def test_random_ones_differ_from_the_plan_and_from_each_other():
    made = controls(planned(), VARIANCES, 19)[:19]

    assert all(policy_of(control).seed is not None for control in made)
    # There are 5! / 3! arrangements.
    assert len({tuple(decisions(c)) for c in [planned(), *made]}) == 20


def test_a_seed_makes_its_permutation_alone_and_always_the_same():
    first, again = (controls(planned(), VARIANCES, 5) for _ in range(2))
    order = [1, 3, 0, 2, 4]  # by rising entropy
    types = [PLANNED[idx] for idx in order]

    assert first == again
    for control in first[:5]:
        drawn = np.random.default_rng(policy_of(control).seed).permutation(5)
        expected = dict(zip(order, [types[i] for i in drawn], strict=True))
        assert decisions(control) == [expected[idx] for idx in range(5)]


def test_more_permutations_begin_with_the_same_ones():
    few, many = (controls(planned(), VARIANCES, n) for n in (3, 12))

    assert few[:3] == many[:3]


def test_the_inversion_gives_the_highest_what_the_lowest_had():
    inverted = by_order(controls(planned(), VARIANCES, 1), "inverted")

    assert decisions(inverted) == ["BF16", "BF16", "Q8_0", "BF16", "Q4_0"]


def test_the_inversion_of_the_inversion_is_the_plan():
    plan = planned([2.0, 9.5, 3.0, 7.5, 1.0, 8.0])
    inverted = by_order(controls(plan, dict.fromkeys(range(6), 1.0), 1), "inverted")
    entropies = {layer.layer_idx: layer.entropy for layer in plan.layers}
    told = tuple(
        layer.model_copy(update={"entropy": entropies[layer.layer_idx]})
        for layer in inverted.layers
    )
    told_plan = inverted.model_copy(update={"layers": told})

    again = by_order(controls(told_plan, dict.fromkeys(range(6), 1.0), 1), "inverted")

    assert decisions(inverted) != decisions(plan)
    assert decisions(again) == decisions(plan)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        pytest.param("variance", "BF16 BF16 Q4_0 BF16 Q8_0", id="largest-lowest"),
        pytest.param("first", "Q4_0 Q8_0 BF16 BF16 BF16", id="first-lowest"),
        pytest.param("last", "BF16 BF16 BF16 Q8_0 Q4_0", id="last-lowest"),
    ],
)
def test_a_ranking_gives_its_first_layers_the_lowest_types(order, expected):
    control = by_order(controls(planned(), VARIANCES, 1), order)

    assert decisions(control) == expected.split()


def test_a_control_is_a_plan_like_any_other():
    plan = planned()
    control = controls(plan, VARIANCES, 1)[0]

    assert Plan.model_validate_json(control.to_json()) == control
    assert plan_label(control) == f"control-random-seed0-{plan.sha256[:8]}"
    changes = plan_diff_values(plan, control)
    gains = [one["size_bytes_difference"] for one in changes["layers"].values()]
    assert any(gains)
    assert sum(gains) == 0


@pytest.mark.parametrize(
    ("number", "said"),
    [
        pytest.param(0, "policy control:random:seed0:", id="0"),
        pytest.param(1, "policy control:inverted:", id="inverted"),
    ],
)
def test_plan_show_says_what_a_control_is(number, said):
    plan = planned()

    text = shown(controls(plan, VARIANCES, 1)[number])

    assert f"{said}{plan.sha256[:8]} " in text
    assert "layers 3 BF16 · 1 Q8_0 · 1 Q4_0" in text


def test_plan_show_says_what_a_probe_is():
    made = {probe.part: probe.plan for probe in probes(planned(), "Q5_0")}

    assert "policy probe:layer 3:Q5_0 " in shown(made["layer 3"])
    assert plan_label(made["layer 3"]) == "probe-layer3-Q5_0"


@pytest.mark.parametrize(
    ("plan", "n", "problem"),
    [
        pytest.param(planned([1.0, 1.0]), 1, "nothing to exchange", id="one-type"),
        pytest.param(planned([1.0, 2.0]), 2, "there are 1", id="few"),
        pytest.param(
            planned(policy=POLICY.model_copy(update={"granularity": "tensor"})),
            1,
            "no layer was decided as a whole",
            id="tensors",
        ),
    ],
)  # fmt: skip
def test_controls_that_cannot_be_made_are_refused(plan, n, problem):
    with pytest.raises(UsageError, match=problem):
        controls(plan, dict.fromkeys(range(5), 1.0), n)


# Probes.


def test_a_probe_quantises_its_part_and_nothing_else():
    scan = make_scan([1.0, 2.0])
    plan = make_plan(scan, UniformPolicy(ggml_type="Q4_0"), make_layout(scan))

    made = {probe.part: probe for probe in probes(plan, "Q4_0")}

    quantised = {
        part: {t.name for t in probe.plan.tensors if t.ggml_type not in ("BF16", "F32")}
        for part, probe in made.items()
    }
    linear = [role for role, shape in LAYER.items() if len(shape) > 1]
    assert quantised == {
        "nothing": set(),
        "layers": {f"blk.{i}.{role}.weight" for i in range(2) for role in linear},
        "layer 0": {f"blk.0.{role}.weight" for role in linear},
        "layer 1": {f"blk.1.{role}.weight" for role in linear},
        **{role: {f"blk.{i}.{role}.weight" for i in range(2)} for role in linear},
        "token_embd": {"token_embd.weight"},
        "output": {"output.weight"},
    }
    for part, probe in made.items():
        check_sound(probe.plan)
        assert quantised[part] == {tensor.name for tensor in probe.tensors}
        wanted = "Q8_0" if part == "layers" else "Q4_0"
        types = {t.ggml_type for t in probe.plan.tensors if t.name in quantised[part]}
        assert types <= {wanted}


def test_what_is_not_probed_keeps_32_bits_where_the_base_has_them():
    scan = make_scan([1.0, 2.0], dtype="F32")
    plan = make_plan(scan, UniformPolicy(ggml_type="Q4_0"), make_layout(scan))

    first = next(iter(probes(plan, "Q4_0")))

    assert plan.raw_type == "F16"
    assert {tensor.ggml_type for tensor in first.plan.tensors} == {"F32"}


@pytest.mark.parametrize("name", ["F16", "BF16", "F32", "raw"])
def test_a_probe_that_quantises_nothing_is_refused(name):
    with pytest.raises(UsageError, match="quantises nothing"):
        check_probe_type(name)


# Numbers.


def test_statistics_of_layers_are_aggregated_as_their_entropies_are():
    scan = make_scan([1.0, 2.0])
    update = {"std": 3.0, "softmax_entropy_nats": 1.0, "code_entropy_bits": 2.0}
    tensors = [
        t.model_copy(update=update) if t.name == "blk.0.ffn_up.weight" else t
        for t in scan.tensors
    ]

    found = layer_statistics(tensors)

    n_up, n_all = 1536 * 576, 576 * 576 + 2 * 1536 * 576
    assert found[0]["n_weights"] == n_all
    assert found[0]["std"] == pytest.approx(1 + 2 * n_up / n_all, rel=1e-15)
    assert found[0]["variance"] == pytest.approx(1 + 8 * n_up / n_all, rel=1e-15)
    assert [known["depth"] for known in found.values()] == [0.0, 1.0]
    # Only one of its tensors has it, of the others it is not known.
    assert "code_entropy_bits" not in found[0]
    for layer in layer_scans(tensors):
        known = found[layer.layer_idx]
        assert known["softmax_entropy_nats"] == layer.softmax_entropy_nats
        assert known["histogram_entropy_bits"] == layer.histogram_entropy_bits


def test_correlations_are_those_worked_out_by_hand():
    klds = [0.1, 0.4, 0.2, 0.3, 0.5]  # ranks 1 4 2 3 5
    values = [10.0, 20.0, 30.0, 40.0, 50.0]  # ranks 1 to 5: squares 0 4 1 1 0
    statistics = [
        {"one": one, "flat": 7.0, "down": -kld} | ({"some": 1.0} if i else {})
        for i, (one, kld) in enumerate(zip(values, klds, strict=True))
    ]

    found = {c.statistic: c.correlation for c in correlations(statistics, klds)}

    assert list(found) == ["down", "flat", "one"]
    assert found["one"].rho == pytest.approx(1 - 6 * 6 / (5 * 24), abs=1e-13)
    assert (found["down"].rho, found["down"].high) == (-1, -1)
    assert found["flat"].rho is None


def test_the_difference_is_of_means_over_tokens_and_paired_by_window():
    # The second is lower by 0.1 in each window, however the windows differ.
    first = study_file("a", [0.3, 1.1, 5.1])
    second = study_file("b", [0.2, 1.0, 5.0])

    found = kld_difference(first.quality, second.quality)

    assert found.n == 3
    assert found.difference == pytest.approx(0.1)
    assert found.difference_low == pytest.approx(0.1)
    assert found.difference_high == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("kld", "rank"), [(0.05, 1), (0.1, 2), (0.15, 2), (0.3, 4), (9.0, 4)]
)
def test_a_rank_counts_those_as_good_or_better(kld, rank):
    assert rank_among(kld, [0.1, 0.2, 0.3]) == rank

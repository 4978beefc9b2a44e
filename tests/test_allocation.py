"""The least cost within limits: beside trying everything, and beside scipy's milp."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, sparse

from ewq_gguf.optimal.knapsack import TOLERANCE, solve_knapsack

BITS = np.array([2.06, 2.6, 3.4, 4.25, 4.5, 5.5, 6.56, 8.5, 16.0])
SIZES = (331_776, 884_736, 110_592)


def problem(n_items, seed=0, dominant=()):
    """Tensors of a model's sizes in types whose errors fall fourfold per bit."""
    random = np.random.default_rng(seed)
    sizes = np.array([*dominant, *random.choice(SIZES, n_items - len(dominant))])
    n_bytes = (sizes[:, None] * BITS / 8).astype(np.int64)
    weight = np.exp(random.normal(0, 1, n_items)) * sizes
    spread = random.uniform(0.8, 1.2, (n_items, len(BITS)))
    return weight[:, None] * np.exp2(-2 * BITS) * spread, n_bytes


def problem_of_limits(seed, n_limits, n_items, dominant=()):
    """Costs, bytes with or without seconds, and limits that bind."""
    random = np.random.default_rng(seed)
    costs, n_bytes = problem(n_items, seed, dominant)
    limit = int(n_bytes[:, -1].sum() * random.uniform(2.7, 7) / 16)
    if n_limits == 1:
        return costs, [n_bytes], [limit]
    # A type of few bits may be slow.
    seconds = n_bytes * 1e-9 * random.uniform(0.6, 1.6, len(BITS))
    small = solve_knapsack(costs, [n_bytes], [limit])
    assert small is not None
    slow, fast = total(seconds, small.options), seconds.min(axis=1).sum()
    return (
        costs,
        [n_bytes, seconds],
        [limit, fast + random.uniform(0.3, 1.0) * (slow - fast)],
    )


def total(table, options):
    return table[np.arange(len(table)), options].sum()


def least(costs, usages, limits):
    """The least cost by trying everything; None where nothing keeps the limits."""
    n_items, n_options = costs.shape
    choices = np.array(list(product(range(n_options), repeat=n_items)))
    rows = np.arange(n_items)
    fits = np.isfinite(costs[rows, choices]).all(axis=1)
    for usage, limit in zip(usages, limits, strict=True):
        fits &= usage[rows, choices].sum(axis=1) <= limit
    found = costs[rows, choices[fits]].sum(axis=1)
    return float(found.min()) if len(found) else None


def milp(costs, usages, limits):
    """The least cost by HiGHS; None where nothing keeps the limits."""
    n_items, n_options = costs.shape
    one_each = sparse.kron(sparse.eye(n_items), np.ones((1, n_options)))
    scale = 1e4 / costs.max()  # its tolerances are absolute
    found = optimize.milp(
        costs.ravel() * scale,
        integrality=np.ones(costs.size),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            *(
                optimize.LinearConstraint(usage.reshape(1, -1), ub=limit)
                for usage, limit in zip(usages, limits, strict=True)
            ),
        ],
        options={"mip_rel_gap": 1e-4},
    )
    return None if found.x is None else found.fun / scale


@given(st.integers(1, 5), st.integers(2, 4), st.integers(1, 2), st.data())
def test_small_problems_are_solved_as_by_trying_everything(
    n_items, n_options, n_limits, data
):
    random = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    shape = (n_items, n_options)
    usages = [random.integers(0, 50, shape) for _ in range(n_limits)]
    limits = [int(random.integers(50 * n_items)) for _ in usages]
    # Few values: with ties, options that are of no use, and some that are missing.
    n_values = data.draw(st.sampled_from([3, 1000]))
    costs = random.integers(0, n_values, shape).astype(np.float64)
    costs[:, 1:][random.random((n_items, n_options - 1)) < 0.2] = np.inf

    found = solve_knapsack(costs, usages, limits)

    best = least(costs, usages, limits)
    if best is None:
        assert found is None
        return
    assert found is not None
    for usage, limit in zip(usages, limits, strict=True):
        assert total(usage, found.options) <= limit
    assert found.cost == total(costs, found.options)
    assert found.lower_bound <= best + 1e-9
    assert best <= found.cost <= best * (1 + TOLERANCE)


def test_pairs_of_moves_are_not_enough_for_this_one():
    random = np.random.default_rng(1607)
    n_bytes, costs = random.integers(1, 50, (3, 4)), random.random((3, 4))

    found = solve_knapsack(costs, [n_bytes], [60])

    assert found is not None
    assert found.cost == pytest.approx(0.394, abs=0.001)  # 0.672 by pairs of moves


@pytest.mark.parametrize("n_limits", [1, 2])
def test_where_few_tensors_dominate_the_cost_is_that_of_milp(n_limits):
    ratios = []
    for seed in range(100):
        random = np.random.default_rng(seed)
        dominant = random.choice([28_311_552, 113_246_208], random.integers(1, 3))
        costs, usages, limits = problem_of_limits(
            seed, n_limits, int(random.integers(5, 14)), dominant
        )

        found = solve_knapsack(costs, usages, limits)

        best = milp(costs, usages, limits)
        if best is None or found is None:
            assert found is best is None, seed
            continue
        for usage, limit in zip(usages, limits, strict=True):
            assert total(usage, found.options) <= limit, seed
        assert found.lower_bound <= best * (1 + 1e-9), seed
        ratios.append(found.cost / best)
    assert len(ratios) > 60
    assert max(ratios) <= 1 + TOLERANCE


@pytest.mark.parametrize("n_limits", [1, 2])
@pytest.mark.parametrize(
    ("n_items", "dominant"), [(60, 1), (212, 0), (212, 2), (2000, 2)]
)
def test_a_models_problem_is_proven_to_be_within_the_tolerance(
    n_items, dominant, n_limits
):
    costs, usages, limits = problem_of_limits(
        7, n_limits, n_items, (113_246_208,) * dominant
    )

    found = solve_knapsack(costs, usages, limits)

    assert found is not None
    assert found.cost <= found.lower_bound * (1 + TOLERANCE)
    for usage, limit in zip(usages, limits, strict=True):
        assert total(usage, found.options) <= limit


def test_equal_tensors_are_solved_although_half_of_one_would_be_better():
    """A bound of mixtures cannot tell which of them is to be large."""
    costs, n_bytes = np.tile([1.0, 0.0], (41, 1)), np.tile([0, 2], (41, 1))

    found = solve_knapsack(costs, [n_bytes], [41])

    assert found is not None
    assert found.cost == 21.0
    assert 21.0 / (1 + TOLERANCE) <= found.lower_bound <= 21.0


@pytest.mark.parametrize("n_limits", [1, 2])
def test_layers_that_are_nearly_alike_are_solved_too(n_limits):
    random = np.random.default_rng(3)
    sizes = np.array([28_311_552, *np.repeat(SIZES, 30)])
    n_bytes = (sizes[:, None] * BITS / 8).astype(np.int64)
    noise = random.uniform(0.97, 1.03, n_bytes.shape)
    costs = sizes[:, None] * np.exp2(-2 * BITS) * noise
    limits = [int(sizes.sum() * 5.5 / 8), int(sizes.sum() * 6 / 8)]
    usages = [n_bytes, (n_bytes * random.uniform(0.6, 1.6, len(BITS))).astype(np.int64)]

    found = solve_knapsack(costs, usages[:n_limits], limits[:n_limits])

    assert found is not None
    assert found.cost <= found.lower_bound * (1 + TOLERANCE)
    assert total(usages[0], found.options) <= limits[0]


def test_a_missing_option_is_never_chosen():
    costs, n_bytes = problem(30)
    costs[:, 1] = np.inf

    found = solve_knapsack(costs, [n_bytes], [int(n_bytes[:, 3].sum())])

    assert found is not None
    assert 1 not in found.options


def test_a_limit_below_the_smallest_options_has_no_answer():
    costs, n_bytes = problem(10)
    smallest = int(n_bytes[:, 0].sum())

    assert solve_knapsack(costs, [n_bytes], [smallest - 1]) is None
    found = solve_knapsack(costs, [n_bytes], [smallest])
    assert found is not None
    assert not found.options.any()


def test_each_limit_can_be_kept_but_not_both():
    costs = np.zeros((2, 2))
    n_bytes, seconds = np.array([[1, 2], [1, 2]]), np.array([[2, 1], [2, 1]])

    assert solve_knapsack(costs, [n_bytes, seconds], [3, 2]) is None
    assert solve_knapsack(costs, [n_bytes, seconds], [3, 3]) is not None


def test_limits_that_do_not_bind_give_the_least_cost_of_each():
    costs, n_bytes = problem(10)

    found = solve_knapsack(costs, [n_bytes], [int(n_bytes[:, -1].sum())])

    assert found is not None
    assert found.cost == found.lower_bound == pytest.approx(costs.min(axis=1).sum())

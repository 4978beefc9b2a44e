"""Choosing an option for each item under a limit of bytes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ewq_gguf.optimal.allocation import select

BITS = np.array([2.06, 2.6, 3.4, 4.25, 4.5, 5.5, 6.56, 8.5, 16.0])


def problem(n_items: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tensors of a model's sizes in types whose errors fall fourfold per bit."""
    random = np.random.default_rng(seed)
    sizes = random.choice([331_776, 884_736, 110_592, 28_311_552], n_items)
    n_bytes = (sizes[:, None] * BITS / 8).astype(np.int64)
    weight = np.exp(random.normal(0, 1, n_items)) * sizes
    spread = random.uniform(0.8, 1.2, (n_items, len(BITS)))
    return weight[:, None] * np.exp2(-2 * BITS) * spread, n_bytes


def least(costs: np.ndarray, n_bytes: np.ndarray, limit: int) -> float | None:
    """By trying everything."""
    n_items, n_options = costs.shape
    rows = range(n_items)
    found = [
        sum(costs[i, j] for i, j in zip(rows, chosen, strict=True))
        for chosen in product(range(n_options), repeat=n_items)
        if sum(n_bytes[i, j] for i, j in zip(rows, chosen, strict=True)) <= limit
    ]
    return min(found, default=None)


@given(st.integers(1, 5), st.integers(2, 4), st.integers(0, 10_000))
def test_small_problems_are_solved_as_by_trying_everything(n_items, n_options, seed):
    random = np.random.default_rng(seed)
    n_bytes = random.integers(1, 50, (n_items, n_options))
    costs = random.random((n_items, n_options))
    limit = int(random.integers(n_items, 50 * n_items))

    found = select(costs, n_bytes, limit)

    best = least(costs, n_bytes, limit)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert found.n_bytes <= limit
    assert found.bound <= best + 1e-9
    # Exchanges of three and more are not tried.
    assert found.cost <= 1.25 * best + 1e-9


@pytest.mark.parametrize("bits", [2.7, 4.6, 6.6])
@pytest.mark.parametrize("n_items", [212, 2000])
def test_a_models_problem_is_solved_to_half_a_percent_and_fills_the_limit(
    n_items, bits
):
    costs, n_bytes = problem(n_items)
    limit = int(n_bytes[:, -1].sum() * bits / 16)

    found = select(costs, n_bytes, limit)

    assert found is not None
    assert 0.999 * limit <= found.n_bytes <= limit
    assert found.bound <= found.cost <= 1.005 * found.bound


def test_a_missing_option_is_never_chosen():
    costs, n_bytes = problem(30)
    costs[:, 1] = np.inf

    found = select(costs, n_bytes, int(n_bytes[:, 3].sum()))

    assert found is not None
    assert 1 not in found.options


def test_a_limit_below_the_smallest_options_has_no_answer():
    costs, n_bytes = problem(10)
    smallest = int(n_bytes[:, 0].sum())

    assert select(costs, n_bytes, smallest - 1) is None
    found = select(costs, n_bytes, smallest)
    assert found is not None
    assert found.n_bytes == smallest


def test_room_for_everything_gives_the_least_cost_of_each():
    costs, n_bytes = problem(10)

    found = select(costs, n_bytes, int(n_bytes[:, -1].sum()))

    assert found is not None
    assert found.cost == pytest.approx(costs.min(axis=1).sum())

"""Intervals and tests: by hand, and beside scipy."""

from __future__ import annotations

from math import comb, isclose, log, sqrt

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from ewq_gguf import data
from ewq_gguf.bench.statistics import (
    accuracy_sentence,
    bootstrap_interval,
    composite_score,
    mcnemar,
    mean_sentence,
    paired_bootstrap,
    paired_t,
    spearman,
    wilson,
)


def test_wilson_interval():
    # 8 of 10: (0.8 + z^2/20 +- z sqrt(0.016 + z^2/400)) / (1 + z^2/10), z = 1.96.
    z2 = 1.96**2
    centre, half = 0.8 + z2 / 20, 1.96 * sqrt(0.016 + z2 / 400)

    low, high = wilson(8, 10)

    assert isclose(low, (centre - half) / (1 + z2 / 10), abs_tol=1e-4)
    assert isclose(high, (centre + half) / (1 + z2 / 10), abs_tol=1e-4)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson(10, 10)[1] == pytest.approx(1)


def test_paired_t_by_hand():
    # Differences 1, 2, 3: mean 2, sample deviation 1, t = 2 sqrt(3). The first values
    # have population variance 2/3, the second ones none.
    test = paired_t([1, 2, 3], [0, 0, 0])

    assert test
    assert (test.n, test.mean) == (3, 2)
    assert test.t == pytest.approx(2 * sqrt(3))
    assert test.cohens_d == pytest.approx(2 / sqrt(1 / 3))


@pytest.mark.parametrize(
    ("first", "second"),
    [([], []), ([1.0], [2.0]), ([0.1, 0.2], [0.1, 0.2]), ([0.3, 0.4], [0.1, 0.2])],
)
def test_without_varying_differences_there_is_no_test(first, second):
    assert paired_t(first, second) is None


def test_the_composite_score_gives_table_13():
    assert composite_score(2.0, 0.5) == log(2) - 0.5
    assert composite_score(2.0, 0.5, 0.0, 2.0) == -1
    scores: dict[str, list[float]] = {}
    for row in data.table("paper_table7"):
        score = composite_score(
            float(row["mmlu_perplexity"]), float(row["mmlu_accuracy"])
        )
        scores.setdefault(row["variant"], []).append(score)

    for printed in data.table("paper_table13"):
        test = paired_t(
            *(
                [score for name in printed[side].split(" + ") for score in scores[name]]
                for side in ("fast", "fast_train")
            )
        )
        assert test
        for key, value in (("t", test.t), ("p", test.p), ("d", test.cohens_d)):
            digits = len(printed[key].partition(".")[2])
            assert round(value, digits) == float(printed[key])


def outcomes(both: int, only_first: int, only_second: int, neither: int):
    """Two models' outcomes with these four counts."""
    counts = (both, only_first, only_second, neither)
    pairs = [(True, True), (True, False), (False, True), (False, False)]
    flat = [
        pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)
    ]
    return [a for a, _ in flat], [b for _, b in flat]


def test_mcnemar_by_hand():
    # 5 against 1: p = 2 (1 + 6) / 2^6.
    test = mcnemar(*outcomes(10, 5, 1, 4))

    assert (test.n, test.n_only_first, test.n_only_second) == (20, 5, 1)
    assert test.p == 14 / 64
    assert test.difference == 0.2
    # Agresti and Min: 5.5 and 1.5 of 22; sqrt(7 - 16 / 22) = 2.5045.
    assert test.difference_low == pytest.approx(
        (4 - 1.959964 * 2.504541) / 22, abs=1e-6
    )
    assert test.difference_high == pytest.approx(
        (4 + 1.959964 * 2.504541) / 22, abs=1e-6
    )


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_symmetric(first, second):
    test = mcnemar(*outcomes(1, first, second, 1))
    swapped = mcnemar(*outcomes(1, second, first, 1))

    n_fewer = min(first, second)
    n_split = first + second
    tail = sum(comb(n_split, k) for k in range(n_fewer + 1))
    assert test.p == pytest.approx(min(2 * tail / 2**n_split, 1.0), rel=1e-9)
    assert test.p == swapped.p
    assert test.difference == -swapped.difference
    assert test.difference_low <= test.difference <= test.difference_high


def test_mcnemar_of_all_of_mmlu_is_exact():
    # 2^-7000 is far below the smallest float, and the sum far above the largest.
    test = mcnemar(*outcomes(0, 7021, 7021, 0))
    assert test.p == 1
    assert mcnemar(*outcomes(14_042, 0, 0, 0)).p == 1
    assert mcnemar(*outcomes(0, 14_042, 0, 0)).p == 0


def test_the_bootstrap_of_a_difference_agrees_with_the_normal_one():
    rng = np.random.default_rng(1)
    base = rng.normal(1, 1, 400)
    test = paired_bootstrap(base + rng.normal(0.1, 0.05, 400), base)

    # The chunks' own spread, 20 times that of the differences, cancels.
    assert test.difference == pytest.approx(0.1, abs=0.01)
    half = 1.96 * 0.05 / sqrt(400)
    assert test.difference_low == pytest.approx(test.difference - half, abs=5e-4)
    assert test.difference_high == pytest.approx(test.difference + half, abs=5e-4)


def test_the_bootstrap_is_scipys_and_the_same_each_time():
    values = np.random.default_rng(2).exponential(size=50)

    test = paired_bootstrap(values, np.zeros(50))

    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=0
    ).confidence_interval
    assert test.difference_low == pytest.approx(theirs.low, abs=0.01)
    assert test.difference_high == pytest.approx(theirs.high, abs=0.01)
    assert test == paired_bootstrap(values, np.zeros(50))


def test_weights_are_pieces_of_text():
    # 3 tokens of 1 nat and 1 token of 5 nats: a mean of 2.
    test = paired_bootstrap([1.0, 5.0], [0.0, 0.0], [3, 1])

    assert test.difference == 2
    assert (test.difference_low, test.difference_high) == (1, 5)


def test_resamples_in_blocks_are_as_wide(monkeypatch):
    items = np.random.default_rng(3).normal(size=(30, 2))

    whole = bootstrap_interval(items, lambda sums: sums[:, 0])
    monkeypatch.setattr("ewq_gguf.bench.statistics._MAX_DRAWS", 1000)
    parts = bootstrap_interval(items, lambda sums: sums[:, 0])

    assert parts == pytest.approx(whole, abs=0.4)


def test_one_piece_says_nothing():
    test = paired_bootstrap([1.0], [2.0])

    assert (test.difference, test.difference_low, test.difference_high) == (
        -1,
        None,
        None,
    )
    assert "cannot be compared" in mean_sentence("KLD", "A", "B", test)


def test_equal_files_are_exactly_equal():
    test = paired_bootstrap([0.5, 0.25, 0.75], [0.5, 0.25, 0.75])

    assert (test.difference, test.difference_low, test.difference_high) == (0, 0, 0)
    assert "cannot be told apart by KLD" in mean_sentence("KLD", "A", "B", test)


def test_spearman_by_hand():
    # Ranks 1 2 3 4 and 1 2 4 3: 1 - 6 * 2 / (4 * 15) = 0.8.
    found = spearman([1, 2, 3, 4], [10, 20, 40, 30])

    assert found.rho == pytest.approx(0.8)
    half = 1.959964 * sqrt(1.32)
    assert found.low == pytest.approx(np.tanh(np.arctanh(0.8) - half), abs=1e-6)
    assert found.high == pytest.approx(np.tanh(np.arctanh(0.8) + half), abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3))
def test_spearman_is_scipys_with_ties(pairs):
    first, second = zip(*pairs, strict=True)
    found = spearman(first, second)

    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found.rho is None
        return
    theirs = scipy.stats.spearmanr(first, second)
    assert found.rho == pytest.approx(theirs.statistic, abs=1e-9)
    assert found.p == pytest.approx(theirs.pvalue, abs=1e-6)
    if found.low is not None:
        assert found.rho is not None
        assert found.high is not None
        assert found.low <= found.rho <= found.high


def test_a_perfect_order_and_no_order():
    assert spearman([1, 2, 3, 4], [1, 4, 9, 16]).rho == 1
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]).low == -1
    assert spearman([1, 1], [1, 2]).rho is None
    assert spearman([1], [1]).rho is None


def test_thirty_layers_leave_0_36_of_doubt():
    rng = np.random.default_rng(4)
    found = spearman(rng.normal(size=30), rng.normal(size=30))

    assert found.low is not None
    assert found.high is not None
    assert (found.high - found.low) / 2 == pytest.approx(0.36, abs=0.02)


def test_sentences_say_what_is_distinguishable():
    even, uneven = (
        mcnemar(*outcomes(300, 7, 5, 258)),
        mcnemar(*outcomes(300, 5, 30, 235)),
    )

    assert accuracy_sentence("EWQ", "Q4_K_M", even) == (
        "EWQ and Q4_K_M cannot be told apart by accuracy: of 570 questions EWQ alone "
        "answers 7 right and Q4_K_M alone 5 (difference +0.4, 95 % -0.9 to +1.6 "
        "points, p = 0.77)."
    )
    assert accuracy_sentence("EWQ", "Q4_K_M", uneven).startswith(
        "Q4_K_M is more accurate than EWQ: of 570 questions EWQ alone answers 5 right"
    )
    lower = paired_bootstrap([0.1, 0.2, 0.1, 0.2], [0.3, 0.4, 0.3, 0.4])
    assert mean_sentence("KLD", "A", "B", lower) == (
        "A has a lower KLD than B (difference -0.2, 95 % -0.2 to -0.2, 4 pieces)."
    )

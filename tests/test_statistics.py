"""Intervals and tests: by hand, and beside scipy."""

from __future__ import annotations

from math import isclose, log, sqrt

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from ewq_gguf import data
from ewq_gguf.significance import composite_score, paired_t, t_test_p, wilson


def test_wilson_interval():
    # 8 of 10: (0.8 + z^2/20 +- z sqrt(0.016 + z^2/400)) / (1 + z^2/10), z = 1.96.
    z2 = 1.96**2
    centre, half = 0.8 + z2 / 20, 1.96 * sqrt(0.016 + z2 / 400)

    low, high = wilson(8, 10)

    assert isclose(low, (centre - half) / (1 + z2 / 10), abs_tol=1e-4)
    assert isclose(high, (centre + half) / (1 + z2 / 10), abs_tol=1e-4)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson(10, 10)[1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("t", "n_free", "p"),
    [
        (1.0, 1, 0.5),
        (0.0, 3, 1.0),
        # Tables of Student's distribution: two-sided 5 %.
        (12.7062, 1, 0.05),
        (3.18245, 3, 0.05),
        (-2.36462, 7, 0.05),
        (4.30265, 2, 0.05),
        (2.44691, 6, 0.05),
        (2.0, 2, 1 - 2 / sqrt(6)),
    ],
)
def test_p_values_are_those_of_the_tables(t, n_free, p):
    assert isclose(t_test_p(t, n_free), p, abs_tol=1e-5)


@given(st.floats(-60, 60), st.integers(1, 200))
def test_p_values_are_scipys(t, n_free):
    ours = t_test_p(t, n_free)

    assert isclose(ours, 2 * scipy.stats.t.sf(abs(t), n_free), abs_tol=1e-12)


def test_wilson_is_scipys():
    for n in (1, 10, 570, 14_042):
        for n_right in {0, 1, n // 3, n}:
            theirs = scipy.stats.binomtest(n_right, n).proportion_ci(method="wilson")
            assert wilson(n_right, n) == pytest.approx((theirs.low, theirs.high))


def test_paired_t_by_hand():
    # Differences 1, 2, 3: mean 2, sample deviation 1, t = 2 sqrt(3). The first values
    # have population variance 2/3, the second ones none.
    test = paired_t([1, 2, 3], [0, 0, 0])

    assert test
    assert (test.n, test.mean) == (3, 2)
    assert test.t == pytest.approx(2 * sqrt(3))
    assert test.cohens_d == pytest.approx(2 / sqrt(1 / 3))


def test_paired_t_is_scipys():
    first, second = np.random.default_rng(0).normal(size=(2, 12))

    ours, theirs = paired_t(first, second), scipy.stats.ttest_rel(first, second)

    assert ours
    assert (ours.t, ours.p) == pytest.approx((theirs.statistic, theirs.pvalue))


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

"""The readers meet a few hundred of the fuzzer's inputs in every run of the tests."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from tests.fuzz_readers import TARGETS, fast_folder, inputs


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_input_is_read_or_refused_but_nothing_else(name):
    target = TARGETS[name]
    with fast_folder() as folder:
        outcomes = [
            target.outcome(folder, data)
            for data in islice(inputs(target, random.Random(7)), 600)
        ]
    # Both ends are met: seeds and some changes are sound, most are not.
    assert all(outcomes[: len(target.seeds)])
    assert len(target.seeds) < sum(outcomes) < 300

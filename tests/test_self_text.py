"""Text that a model writes itself."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

from ewq_gguf.bench.runner import CPU_SETUP
from ewq_gguf.bench.texts.self_text import MIN_P, TEMPERATURES, _draw, self_text
from ewq_gguf.bench.writing import written_text
from ewq_gguf.errors import InputError, VerificationError
from tests.bench_models import BOS, Table
from tests.gguf_files import write_gguf


def test_the_same_seed_writes_the_same_and_another_one_another_text():
    first = self_text(Table(), 6, 12, seed=1)

    assert first == self_text(Table(), 6, 12, seed=1)
    assert first != self_text(Table(), 6, 12, seed=2)
    assert len(set(first)) == len(first)


def test_a_document_does_not_depend_on_how_many_there_are():
    many = self_text(Table(), 40, 8, seed=0)

    assert self_text(Table(), 3, 8, seed=0) == many[:3]


def test_a_document_ends_where_the_model_ends_it_or_at_the_limit():
    texts = self_text(Table(), 64, 10, seed=0)

    # The token that ends a text also begins it, and is no part of what is written.
    assert all(chr(BOS) not in text for text in texts)
    assert max(len(text) for text in texts) == 9
    assert min(len(text) for text in texts) < 9


def test_a_terse_model_writes_more_documents_and_at_last_may_not_end_them():
    model = Table()
    model.logits[:] = -20.0
    model.logits[:, BOS] = 0.0  # the first token is drawn, the second ends it

    texts = self_text(model, 40, 50, seed=0)

    # 40 x 50 / 4 tokens of one each are more than eight times as many documents have.
    assert len(texts) == 9 * 40
    *terse, last = (texts[40 * i :][:40] for i in range(9))
    # What stands for a control is left out.
    assert max(len(text) for texts in terse for text in texts) == 1
    assert min(map(len, last)) > 20
    assert sum(map(len, texts)) >= 40 * 50 / 4
    assert all(chr(BOS) not in text for text in texts)
    assert (model.logits[:, BOS] == 0.0).all()  # the scorer's rows are its own


def test_what_writes_no_text_is_refused(tmp_path):
    layers = {"enc.blk.0.attn_q.weight": (256, 256), "token_embd.weight": (8, 256)}
    base = write_gguf(tmp_path / "base.gguf", layers)

    with pytest.raises(InputError, match="does not write one token after another"):
        written_text(base, CPU_SETUP, lambda: nullcontext(print), n_documents=1, seed=0)


def test_what_is_far_less_likely_than_the_likeliest_is_left_out():
    model = Table()
    model.logits[:] = -20.0
    after = np.log([1.0, MIN_P / 4])
    model.logits[:, [ord("a"), ord("b")]] = after  # below the share when careful

    texts = self_text(model, len(TEMPERATURES) * 20, 10, seed=0)

    careful = texts[:: len(TEMPERATURES)]
    assert not any("b" in text[1:] for text in careful)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_token_is_drawn_as_from_the_whole_vocabulary(temperature):
    rows = np.random.default_rng(0).normal(0, 5, (200, 5000)).astype(np.float32)

    for i, row in enumerate(rows):
        weights = np.exp((row.astype(np.float64) - row.max()) / temperature)
        weights[weights < MIN_P] = 0
        below = np.cumsum(weights) / weights.sum()
        wanted = np.count_nonzero(below <= np.random.default_rng(i).random())
        assert _draw(row, temperature, np.random.default_rng(i)) == wanted


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(broken):
    model = Table()
    model.logits[:, ord("a")] = broken

    with pytest.raises(VerificationError, match="not finite"):
        self_text(model, 2, 4, seed=0)

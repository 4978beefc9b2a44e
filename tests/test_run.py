"""One run: what is looked for once, and what other options leave as it is."""

from __future__ import annotations

import pytest

from ewq_gguf import api
from ewq_gguf.errors import InputError, ToolError
from ewq_gguf.records import EwqPolicy
from tests.checkpoints import write_llama


@pytest.fixture(autouse=True)
def no_llama_cpp(tmp_path, monkeypatch):
    """A cache without llama.cpp: nothing here needs one."""
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EWQ_LLAMA_CPP", raising=False)


def test_a_model_is_opened_once_whatever_is_done_with_it(tmp_path):
    run = api.open_model(str(write_llama(tmp_path / "m")))

    assert run.checkpoint is run.checkpoint
    assert run.with_options(force=True, imatrix=None).checkpoint is run.checkpoint
    assert run.with_options(mtp="drop").checkpoint is not run.checkpoint
    assert run.with_options(mtp="drop").checkpoint == run.checkpoint


def test_another_matrix_is_read_and_the_first_run_keeps_its_own(tmp_path):
    run = api.Run(str(write_llama(tmp_path / "m")))
    (tmp_path / "i.gguf").write_bytes(b"no matrix")

    assert run.importance is None
    with pytest.raises(InputError, match="starts with b'no m', not GGUF"):
        _ = run.with_options(imatrix=tmp_path / "i.gguf").importance
    assert run.importance is None


def test_a_llama_cpp_that_cannot_be_used_lays_nothing_out_and_is_said(tmp_path):
    folder = write_llama(tmp_path / "m")
    scan = api.scan(api.Run(str(folder)))
    run = api.Run(scan, api.Options(llama_cpp=tmp_path / "none"))

    assert run.known_layout is None
    with pytest.raises(ToolError, match="holds no llama-quantize"):
        _ = run.toolchain_key
    assert api.plan(run, EwqPolicy()).totals.is_estimate

"""The real toolchain, a cache of the tests' own, and two small models.

A test module takes them with `pytest_plugins = ["tests.toolchain_fixtures"]`, and the
plain functions from tests.gguf_files: pytest wants to be the first to import a plugin.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ewq_gguf.llamacpp.toolchain import Toolchain, find_toolchain
from tests.gguf_files import Tiny, make_cache, make_tiny


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    """The llama.cpp that `make setup` built."""
    return find_toolchain()


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory, toolchain) -> Path:
    """A cache of this run: the real toolchain and built-in model, else empty."""
    return make_cache(tmp_path_factory.mktemp("cache"), toolchain)


@pytest.fixture
def own_cache(session_cache, monkeypatch) -> Path:
    """The run's own cache, in the environment."""
    monkeypatch.setenv("EWQ_CACHE", str(session_cache))
    monkeypatch.delenv("EWQ_LLAMA_CPP", raising=False)
    return Path(session_cache)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, session_cache, toolchain) -> Tiny:
    """Two BF16 layers; rows of 64 and 96: every 256-wide type falls back."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-BF16"
    return make_tiny(folder, session_cache, toolchain)


@pytest.fixture(scope="session")
def deep(tmp_path_factory, session_cache, toolchain) -> Tiny:
    """24 layers with rows of 256, so that no type falls back."""
    folder = tmp_path_factory.mktemp("deep") / "deep-24"
    return make_tiny(
        folder, session_cache, toolchain, n_layers=24, hidden=256, ffn=256, seed=3
    )

"""What holds for every test."""

import os
from importlib.metadata import version

import pytest
from hypothesis import settings

# Tests run side by side: threads that spin while they wait would hold each other up.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# No test fails because the machine is slow today.
settings.register_profile("ewq", deadline=None)
settings.load_profile("ewq")

_SHOWN = ("click", "huggingface_hub", "numba", "numpy", "pydantic", "safetensors")


def pytest_report_header() -> str:
    return "with " + ", ".join(f"{name} {version(name)}" for name in _SHOWN)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Without the user's settings that change what is printed."""
    for name in ("EWQ_DEBUG", "NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)

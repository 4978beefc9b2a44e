"""What a budget of this machine means: devices, RAM, a container's limit."""

from __future__ import annotations

import psutil
import pytest

from ewq_gguf import process
from ewq_gguf.errors import ToolError, UsageError
from ewq_gguf.llamacpp import devices
from ewq_gguf.llamacpp.devices import Device, free_memory, list_devices, parse_devices
from ewq_gguf.pipeline import planning
from ewq_gguf.process import available_memory

pytest_plugins = ["tests.toolchain_fixtures"]

LISTED = """\
ggml_cuda_init: found 2 CUDA devices:
Available devices:
  CUDA0: NVIDIA H100 80GB HBM3 (81079 MiB, 80555 MiB free)
  CUDA1: NVIDIA GeForce RTX 4090 (Laptop: yes) (16384 MiB, 100 MiB free)
"""


def test_devices_are_read_as_llama_cpp_prints_them():
    assert parse_devices(LISTED) == (
        Device("CUDA0", "NVIDIA H100 80GB HBM3", 81079 << 20, 80555 << 20),
        Device("CUDA1", "NVIDIA GeForce RTX 4090 (Laptop: yes)", 16 << 30, 100 << 20),
    )
    assert parse_devices("Available devices:\n  (none)\n") == ()


@pytest.mark.llamacpp
def test_the_real_llama_bench_lists_its_devices(toolchain, own_cache):
    for device in list_devices(toolchain):
        assert 0 < device.free_bytes <= device.total_bytes


@pytest.mark.llamacpp
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("auto", (80655 << 20, ("CUDA0", "CUDA1"))),
        ("cuda1", (100 << 20, ("CUDA1",))),
        ("CUDA1, CUDA0", (80655 << 20, ("CUDA1", "CUDA0"))),
    ],
)
def test_free_memory_is_that_of_the_devices_chosen(
    asked, expected, toolchain, monkeypatch
):
    monkeypatch.setattr(devices, "list_devices", lambda _: parse_devices(LISTED))

    assert free_memory(asked) == expected
    with pytest.raises(UsageError, match="CUDA0, CUDA1"):
        free_memory("CUDA7")
    with pytest.raises(UsageError, match="'CUDA0,cuda0' names one twice"):
        free_memory("CUDA0,cuda0")


@pytest.mark.llamacpp
def test_without_a_device_auto_is_ram_and_a_name_is_an_error(toolchain, monkeypatch):
    monkeypatch.setattr(devices, "list_devices", lambda _: ())

    for asked in ("auto", "cpu"):
        n_bytes, what = free_memory(asked)
        assert what == ("RAM",)
        assert 0 < n_bytes <= psutil.virtual_memory().total
    with pytest.raises(ToolError):
        free_memory("CUDA0")


def test_a_budget_counts_the_devices(monkeypatch):
    found = (9 << 20, ("CUDA0", "CUDA1"))
    monkeypatch.setattr(planning, "free_memory", lambda *_: found)

    ask = planning.machine_budget(256)

    assert ask.text == "auto (CUDA0, CUDA1)"
    assert (ask.memory_bytes, ask.n_devices) == (9 << 20, 2)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        pytest.param("3000000\n", 1_500_000, id="limit-less-used-plus-cache"),
        pytest.param("1000000\n", 500_000, id="used-up-but-for-cache"),
        pytest.param("max\n", None, id="no-limit"),
    ],
)
def test_a_containers_limit_counts(limit, expected, tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text("2000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500000\nx 2\n")
    monkeypatch.setattr(process, "_CGROUP", tmp_path)

    found = available_memory()

    assert found > 10_000_000 if expected is None else found == expected

"""What NVIDIA's driver counts for a process; the driver itself is a stand-in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ewq_gguf.bench.engines.nvml import used_bytes
from ewq_gguf.bench.job import MemoryUse, progress_line, read_progress
from ewq_gguf.cli.progress import memory_text

MIB = 1 << 20


class Driver:
    """pynvml's functions over GPUs that are lists of (pid, bytes)."""

    class NVMLError(Exception):
        pass

    def __init__(self, *gpus: list[tuple[int, int | None]], fails: bool = False):
        self.gpus = gpus
        self.fails = fails

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int):
        return self.gpus[index]

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        if self.fails:
            raise self.NVMLError
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in gpu]


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        pytest.param(Driver([(7, 3 * MIB), (8, MIB)]), 3 * MIB, id="others-left-out"),
        pytest.param(Driver([(7, MIB)], [(7, 2 * MIB)]), 3 * MIB, id="all-gpus"),
        pytest.param(Driver([(8, MIB)]), None, id="not-named"),
        pytest.param(Driver([(7, None)]), None, id="not-told"),
        pytest.param(Driver([(7, None)], [(7, MIB)]), MIB, id="told-by-one"),
        pytest.param(Driver(), None, id="no-gpu"),
        pytest.param(Driver([(7, MIB)], fails=True), None, id="refused"),
    ],
)
def test_a_process_counts_what_the_driver_names_it_for(driver, expected):
    assert used_bytes(driver, 7) == expected


@pytest.mark.parametrize(
    ("gpu_bytes", "text"), [(None, "5.00 MB"), (7_000_000, "5.00 MB + 7.00 MB on GPU")]
)
def test_the_memory_of_gpus_arrives_in_the_progress_line(gpu_bytes, text):
    told = read_progress(progress_line(0.5, 5_000_000, gpu_bytes).strip())

    assert told == (0.5, MemoryUse(5_000_000, gpu_bytes))
    assert memory_text(told[1]) == text

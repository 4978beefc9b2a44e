"""The CPU, the GPUs and their drivers that a build's self-test holds for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ewq_gguf.libraries import cpu_name, machine_key


def hardware_key(backend: str) -> str:
    """The CPU, and for builds with GPUs also those and their driver, as one line."""
    parts = [machine_key(), cpu_name()]
    if backend != "cpu":
        parts += _gpu_facts()
    return "; ".join(part for part in parts if part)


@cache
def _gpu_facts() -> list[str]:
    """GPUs and drivers, from files that the system has of them."""
    return [fact for path in _gpu_files() if (fact := _first_line(path))]


def _gpu_files() -> Iterator[Path]:
    yield Path("/proc/driver/nvidia/version")
    yield from sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    for card in sorted(Path("/sys/class/drm").glob("card[0-9]")):
        yield from (card / "device/vendor", card / "device/device")
    # macOS has its GPUs' driver in the system.
    yield Path("/System/Library/CoreServices/SystemVersion.plist")


def _first_line(path: Path) -> str:
    try:
        return path.read_text(errors="replace").split("\n", 1)[0].strip()
    except OSError:
        return ""

"""The memory that a model can be loaded into: llama.cpp's devices, or RAM."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ewq_gguf.errors import ToolError, UsageError
from ewq_gguf.llamacpp.logs import child_log
from ewq_gguf.llamacpp.toolchain import Toolchain, find_toolchain
from ewq_gguf.process import available_memory, run

STAGE = "plan"
_PROBE_SECONDS = 60.0
_DEVICE = re.compile(r"^  ([^:\s]+): (.*) \((\d+) MiB, (\d+) MiB free\)$", re.MULTILINE)


@dataclass(frozen=True)
class Device:
    """A GPU, as llama.cpp lists it.

    Attributes:
        name: such as `CUDA0`.
        description: the product's name.
        total_bytes: Its memory.
        free_bytes: The part of its memory that is free.
    """

    name: str
    description: str
    total_bytes: int
    free_bytes: int


def list_devices(toolchain: Toolchain) -> tuple[Device, ...]:
    """The devices that this build of llama.cpp can use; none for a CPU build.

    Raises:
        ToolError, ChildError: llama-bench is missing or failed.
    """
    tool = toolchain.tool("llama-bench")
    with child_log("devices", tool) as log_path:
        text = run(
            [tool, "--list-devices"],
            stage=STAGE,
            log_path=log_path,
            timeout_seconds=_PROBE_SECONDS,
        )
    return parse_devices(text)


def parse_devices(text: str) -> tuple[Device, ...]:
    """Parse the output of `--list-devices` (common_print_available_devices)."""
    return tuple(
        Device(name, description, int(total) << 20, int(free) << 20)
        for name, description, total, free in _DEVICE.findall(text)
    )


def free_memory(
    device: str, llama_cpp: Path | None = None
) -> tuple[int, tuple[str, ...]]:
    """Free bytes for a model, and the names of the devices that have them.

    Args:
        device: `cpu`, names of devices with commas between them, or `auto`: all
            devices there are, else the CPU's memory.
        llama_cpp: the user's own llama.cpp, or None.

    Raises:
        ToolError: devices are named and this llama.cpp has none.
        UsageError: there is no device of that name, or one is named twice.
    """
    if device == "cpu":
        return available_memory(), ("RAM",)
    try:
        devices = list_devices(find_toolchain(llama_cpp))
    except ToolError:
        if device != "auto":
            raise
        devices = ()
    if not devices:
        if device == "auto":
            return available_memory(), ("RAM",)
        raise ToolError(
            STAGE,
            "--device",
            f"{device} is asked for, and this llama.cpp has no device but the CPU",
            "run `ewq toolchain build --backend cuda` (or vulkan), or use --device cpu",
        )
    chosen = devices if device == "auto" else _named(devices, device)
    return sum(d.free_bytes for d in chosen), tuple(d.name for d in chosen)


def _named(devices: Sequence[Device], names: str) -> list[Device]:
    known = {device.name.lower(): device for device in devices}
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name.lower() not in known:
            raise UsageError(
                STAGE,
                "--device",
                f"there is no {name!r}",
                f"use cpu, auto or one of {', '.join(d.name for d in devices)}",
            )
    chosen = [known[name.lower()] for name in wanted]
    if len(set(chosen)) < len(chosen):
        raise UsageError(
            STAGE, "--device", f"{names!r} names one twice", "name each device once"
        )
    return chosen

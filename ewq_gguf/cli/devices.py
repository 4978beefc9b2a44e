"""The options of devices: where a measured model is loaded, and how."""

from __future__ import annotations

from typing import Any

import click

from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.runner import CACHE_TYPES
from ewq_gguf.cli.common import threads_option
from ewq_gguf.cli.sections import collected, option
from ewq_gguf.errors import UsageError
from ewq_gguf.process import N_CPUS
from ewq_gguf.records import BenchSetup
from ewq_gguf.rpc.commands import server_address

_DEVICES = "Devices"

device_option = option(
    "--device",
    section=_DEVICES,
    default="auto",
    metavar="auto|cpu|NAMES",
    help="Devices to load the model on, named as llama.cpp lists them.",
)


def _setup(values: dict[str, Any]) -> dict[str, Any]:
    """The options of devices as BenchSetup.

    Raises:
        UsageError: a share or a worker's address is none.
    """
    allow_public = values.pop("allow_public")
    setup = BenchSetup(
        device=values.pop("device"),
        n_gpu_layers=values.pop("gpu_layers"),
        tensor_split=tuple(map(_share, comma_list(values.pop("tensor_split")))),
        rpc=tuple(
            server_address(server, allow_public=allow_public)
            for server in comma_list(values.pop("rpc"))
        ),
        n_threads=values.pop("n_threads") or N_CPUS,
        cache_type_k=values.pop("cache_type_k"),
        cache_type_v=values.pop("cache_type_v"),
    )
    return {**values, "setup": setup}


#: The options of devices: the command takes `setup`, BenchSetup.
setup_options = collected(
    (
        device_option,
        option(
            "-ngl",
            "--gpu-layers",
            section=_DEVICES,
            type=click.IntRange(0),
            metavar="N",
            help="Layers to put on the devices.  [default: all]",
        ),
        option(
            "--tensor-split",
            section=_DEVICES,
            metavar="LIST",
            help="Shares of the model on each device, such as 3,1.",
        ),
        option(
            "--rpc",
            section=_DEVICES,
            metavar="LIST",
            help="RPC workers of llama.cpp, as host:port,host:port.",
        ),
        option(
            "--allow-public",
            section=_DEVICES,
            is_flag=True,
            help="Allow RPC workers with public addresses; they are not encrypted.",
        ),
        *(
            option(
                f"--cache-type-{letter}",
                section=_DEVICES,
                type=click.Choice(CACHE_TYPES),
                metavar="TYPE",
                default="f16",
                help=f"ggml type of the KV cache's {what}: f32, f16, q8_0 or another.",
            )
            for letter, what in (("k", "keys"), ("v", "values"))
        ),
        threads_option,
    ),
    _setup,
)


def comma_list(text: str | None) -> list[str]:
    """The parts of an option's text, without blanks and empty ones."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise UsageError(
            STAGE, "--tensor-split", f"{text!r} is no share", "use numbers, as in 3,1"
        )
    return share

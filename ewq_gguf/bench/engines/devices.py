"""The devices of the libraries that are loaded, and RPC workers among them.

`llama_supports_gpu_offload` says yes whenever RPC is compiled in, so that ggml's own
list of devices is asked (ggml/include/ggml-backend.h).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp

from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.errors import ToolError, UsageError
from ewq_gguf.records import BenchSetup

#: ggml_backend_dev_type: a GPU with its own memory, one that shares the host's.
_GPU, _IGPU = 1, 2

Devices = ctypes.Array[ctypes.c_void_p]


def _function(name: str, result: type | None, *arguments: type) -> Any:
    # The handle of libllama finds the symbols of the libggml that it is linked to.
    function = getattr(llama_cpp.llama_cpp._lib, name)
    function.restype = result
    function.argtypes = arguments
    return function


_load_all = _function("ggml_backend_load_all", None)
_count = _function("ggml_backend_dev_count", ctypes.c_size_t)
_get = _function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
_type = _function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
_name = _function("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
_description = _function(
    "ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p
)
_registry = _function("ggml_backend_reg_by_name", ctypes.c_void_p, ctypes.c_char_p)
_address = _function(
    "ggml_backend_reg_get_proc_address",
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_char_p,
)
_register = _function("ggml_backend_register", None, ctypes.c_void_p)


def devices_for(setup: BenchSetup) -> Devices:
    """The chosen devices, then NULL, for `llama_model_params.devices`.

    With `auto` these are the RPC workers, then the GPUs; GPUs that share the host's
    memory only where there are no others, as llama.cpp itself chooses. Without any,
    the model stays on the CPU.

    Raises:
        ToolError: a device is asked for by name, or layers for devices, and there is
            none; or this build has no RPC.
        UsageError: there is no device of that name.
    """
    own = _gpus()
    workers = _workers(setup.rpc)
    by_name = {_text(_name, device): device for device in [*workers, *own]}
    if setup.device == "cpu":
        if setup.rpc or setup.n_gpu_layers:
            raise UsageError(
                STAGE, "--device", "cpu leaves -ngl and --rpc nothing to do", "drop one"
            )
        chosen = []
    elif setup.device == "auto":
        # Not the integrated ones where there are others.
        apart = [device for device in own if _type(device) == _GPU]
        chosen = workers + (apart or ([] if workers else own))
        if not chosen and setup.n_gpu_layers:
            raise _no_device(f"-ngl {setup.n_gpu_layers}")
    else:
        if not by_name:
            raise _no_device(setup.device)
        names = [_own_name(name.strip()) for name in setup.device.split(",")]
        chosen = [_named(by_name, name) for name in names]
        chosen = [worker for worker in workers if worker not in chosen] + chosen
    return (ctypes.c_void_p * (len(chosen) + 1))(*chosen, None)


def _own_name(name: str) -> str:
    """llama.cpp says CUDA1 where torch says cuda:1."""
    kind, _, number = name.partition(":")
    return f"CUDA{number or 0}" if kind == "cuda" else name


def gpu_names(devices: Devices) -> dict[str, str]:
    """Descriptions of chosen devices, by their names."""
    return {
        _text(_name, device): _text(_description, device)
        for device in devices
        if device is not None
    }


def check_offloaded(path: Path, setup: BenchSetup, n_offloaded: int) -> None:
    """Refuse a model that stayed on the CPU though a device was asked for.

    Raises:
        ToolError: it did.
    """
    needs_device = (
        setup.device not in {"auto", "cpu"} or setup.rpc or setup.n_gpu_layers
    )
    if needs_device and not n_offloaded and setup.n_gpu_layers != 0:
        raise ToolError(
            STAGE,
            path,
            "llama.cpp put no layer on the devices asked for",
            "look at its log, or use --device cpu",
        )


def _gpus() -> list[int]:
    _load_all()
    devices = [_get(i) for i in range(_count())]
    return [device for device in devices if _type(device) in {_GPU, _IGPU}]


def _workers(servers: tuple[str, ...]) -> list[int]:
    """Devices of RPC workers, registered in the order given."""
    if not servers:
        return []
    registry = _registry(b"RPC")
    address = _address(registry, b"ggml_backend_rpc_add_server") if registry else None
    if address is None:
        raise ToolError(
            STAGE, "--rpc", "this llama.cpp has no RPC", "run `ewq toolchain build`"
        )
    before = _count()
    add = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)
    for server in servers:
        worker = add(server.encode())
        if not worker:
            raise ToolError(
                STAGE, server, "is no RPC worker of this build", "start the worker"
            )
        _register(worker)
    return [_get(i) for i in range(before, _count())]


def _named(by_name: dict[str, int], wished: str) -> int:
    by_lower = {name.lower(): device for name, device in by_name.items()}
    if wished.lower() not in by_lower:
        raise UsageError(
            STAGE,
            "--device",
            f"there is no {wished!r}",
            f"use cpu, auto or one of {', '.join(by_name)}",
        )
    return by_lower[wished.lower()]


def _no_device(option: str) -> ToolError:
    return ToolError(
        STAGE,
        "--device",
        f"{option} is asked for, and this llama.cpp has no device but the CPU",
        "run `ewq toolchain build --backend cuda` (or vulkan), or use --device cpu",
    )


def _text(function: Any, device: int) -> str:
    return str(function(device).decode(errors="replace"))

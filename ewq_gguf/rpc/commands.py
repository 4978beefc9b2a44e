"""A placement as command lines: llama.cpp's RPC workers and the program that uses them.

llama.cpp gives the last `-ngl` of its n_layer + 1 layers (the output head is the last
one) to its devices in the order of `--rpc`. Layer i of them goes to the first device
whose share of `--tensor-split`, summed up to it, is more than i / ngl
(src/llama-model.cpp, get_layer_buft_list); with the numbers of layers as shares both
sides are the same quotients, so that every layer lies exactly where it was planned.
The layers before them and the input embedding stay on the main machine's CPU.
"""

from __future__ import annotations

import shlex
from ipaddress import IPv4Address

from ewq_gguf.errors import UsageError
from ewq_gguf.records.placement import Placement, Stage
from ewq_gguf.rpc.machines import endpoints

_WORKERS_FIRST = (
    "# The workers first. All machines need the same build of llama.cpp, and each",
    "# worker one device: name it with -d where there are several.",
)


def rpc_flags(placement: Placement) -> tuple[str, ...]:
    """The arguments that make a llama.cpp tool place the layers as planned.

    For all of its tools but llama-bench, whose `-ts` takes `/` for commas and which has
    neither `-c` nor `-fit`. llama-perplexity multiplies `-c` unless `-b` is the same.

    Raises:
        UsageError: a worker's name is no address, or two have the same.
    """
    # Fitting, which is on by default, may change what is not given here.
    flags = ["-c", str(placement.n_ctx), "-fit", "off"]
    shares = _shares(placement)
    flags += ["-ngl", str(sum(shares))]
    if shares:
        flags += ["--rpc", _servers(placement)]
        flags += ["--tensor-split", ",".join(map(str, shares))]
    return tuple(flags)


def rpc_commands(gguf: str, placement: Placement, *, allow_public: bool = False) -> str:
    """Shell lines, with comments, that say what to run on which machine.

    Args:
        gguf: the file's name on the main machine.
        placement: placement of its tensors.
        allow_public: whether workers may have addresses that the internet reaches.

    Raises:
        UsageError: as of `rpc_flags`, or an address is public and that is not allowed.
    """
    main, *workers = placement.stages
    lines = [*_WORKERS_FIRST] if workers else []
    for stage in workers:
        lines += _worker_lines(stage, allow_public=allow_public)
    shares = _shares(placement)
    lines += [f"# The main machine: {_held(main)}, and the input embedding."]
    lines += [shlex.join(["llama-server", "-m", gguf, *rpc_flags(placement)])]
    bench = ["llama-bench", "-m", gguf, "-ngl", str(sum(shares))]
    if shares:
        bench += ["--rpc", _servers(placement), "-ts", "/".join(map(str, shares))]
    return "\n".join([*lines, "# Or, to measure its speed:", shlex.join(bench), ""])


def server_address(name: str, *, allow_public: bool = False) -> str:
    """A worker's `host:port`, the port filled in.

    Raises:
        UsageError: it is no address, or a public one that is not allowed.
    """
    ((host, port),) = endpoints([name])
    try:
        is_public = IPv4Address(host).is_global
    except ValueError:  # a name
        is_public = False
    if is_public:
        _check_allowed(host, allow_public=allow_public)
    return f"{host}:{port}"


def _worker_lines(stage: Stage, *, allow_public: bool) -> list[str]:
    ((host, port),) = endpoints([stage.machine])
    lines = [f"# {host}: {_held(stage)}."]
    try:
        address = IPv4Address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        bind = "ADDRESS"
        lines += [
            f"# ADDRESS is {host}'s private IPv4 address: the server takes no names.",
            "# It asks nobody who they are: never use one that the internet reaches.",
        ]
    else:
        bind = str(address)
        if address.is_global:
            _check_allowed(host, allow_public=allow_public)
            lines += [
                f"# WARNING: {host} is a public address. Whoever reaches the server "
                "uses it:",
                "# nobody is asked who they are, and nothing is encrypted.",
            ]
    server = ["ggml-rpc-server", "-H", bind, "-p", str(port), "-c"]
    return [*lines, shlex.join(server)]


def _check_allowed(host: str, *, allow_public: bool) -> None:
    if not allow_public:
        raise UsageError(
            "plan",
            host,
            "is a public address, and llama.cpp's RPC server lets everybody in",
            "use a private network, a VPN or an ssh tunnel, or allow it explicitly",
        )


def _shares(placement: Placement) -> list[int]:
    """Layers of each worker; the output head counts as one."""
    return [stage.n_layers + stage.has_output for stage in placement.stages[1:]]


def _servers(placement: Placement) -> str:
    """The list for `--rpc`."""
    workers = endpoints(stage.machine for stage in placement.stages[1:])
    return ",".join(f"{host}:{port}" for host, port in workers)


def _held(stage: Stage) -> str:
    if stage.first_layer is None:
        layers = "no layers"
    elif stage.n_layers == 1:
        layers = f"layer {stage.first_layer}"
    else:
        layers = f"layers {stage.first_layer} to {stage.last_layer}"
    head = " and the output head" if stage.has_output else ""
    return f"{layers}{head}, {stage.weight_bytes:,} bytes of weights"

"""Machines of a cluster as people type them: `NAME=MEMORY[,DISK][,SPEED]`.

The first is the main one, and its name is free; the others are named by their address.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address
from typing import NoReturn

from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.records.placement import Machine
from ewq_gguf.size_text import parse_size

DEFAULT_PORT = 50052

_FORM = "write NAME=MEMORY[,DISK][,SPEED], such as 10.0.0.2=64GiB,200GB,50GB/s"
_KEYS = ("name", "memory", "disk", "speed")
_ENDPOINT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?)(?::([0-9]{1,5}))?")
# inet_addr also reads `8.8.2056` and `0x8080808` as addresses.
_NUMERIC_HOST = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9A-Fa-f]*)")


def parse_machine(text: str) -> Machine:
    """A machine from the command line.

    A value that ends in `/s` is the speed; of the others the first is the memory and
    the second, if there is one, the disk.

    Raises:
        UsageError: it does not have that form, or a size is none.
    """
    name, equals, values = text.partition("=")
    parts = [part.strip() for part in values.split(",")]
    speeds = [part for part in parts if part.endswith("/s")]
    sizes = [part for part in parts if not part.endswith("/s")]
    if not (equals and name.strip() and 1 <= len(sizes) <= 2 and len(speeds) <= 1):
        raise UsageError("plan", text, "is not a machine", _FORM)
    disk = sizes[1] if len(sizes) == 2 else None
    return _machine(name.strip(), sizes[0], disk, speeds[0] if speeds else None)


def machines_of_tables(tables: Mapping[str, object]) -> tuple[Machine, ...]:
    """Machines from a TOML document of `[[machine]]` tables.

    Their keys are name, memory, disk and speed, with values as on the command line.

    Raises:
        InputError: a key is unknown or missing, or a value is no text.
        UsageError: a size is none.
    """
    entries = tables.get("machine")
    if set(tables) != {"machine"} or not isinstance(entries, list) or not entries:
        _refuse("machines", "is not a list of [[machine]] tables")
    return tuple(_machine_of(entry, i) for i, entry in enumerate(entries, start=1))


def check_machines(machines: Sequence[Machine]) -> None:
    """Refuse two machines of one name, and workers that could not be reached.

    Raises:
        UsageError: naming it.
    """
    names = [machine.name for machine in machines]
    for name in names:
        if names.count(name) > 1:
            raise UsageError("plan", name, "is given twice", "name each machine once")
    endpoints(names[1:])


def endpoints(workers: Iterable[str]) -> list[tuple[str, int]]:
    """Hosts and ports of workers, by their names; llama.cpp knows no IPv6.

    Raises:
        UsageError: one is no address, or two are the same: llama.cpp would use it
            twice.
    """
    addresses: list[tuple[str, int]] = []
    for name in workers:
        host, port = _endpoint(name)
        if (host, port) in addresses:
            raise UsageError(
                "plan",
                f"{host}:{port}",
                "is two workers' address",
                "name each worker once",
            )
        addresses.append((host, port))
    return addresses


def _endpoint(name: str) -> tuple[str, int]:
    match = _ENDPOINT.fullmatch(name)
    port = int(match[2] or DEFAULT_PORT) if match else 0
    if match is None or not 1 <= port <= 65535 or not _is_host(match[1]):
        raise UsageError(
            "plan",
            name,
            "is not the address of a worker",
            "name workers by host or host:port, such as 10.0.0.2:50052",
        )
    return match[1].lower(), port


def _is_host(host: str) -> bool:
    """Whether it is a host name, or one machine's IPv4 address in its usual form."""
    if not _NUMERIC_HOST.fullmatch(host):
        return True
    try:
        first = IPv4Address(host).packed[0]
    except ValueError:
        return False
    return 0 < first < 224  # 0: any or none; from 224: multicast, reserved, broadcast


def _machine_of(entry: object, number: int) -> Machine:
    if not isinstance(entry, dict):
        _refuse(f"machine {number}", "is not a [[machine]] table")
    for key, value in entry.items():
        if key not in _KEYS:
            _refuse(f"machine {number}", f"has an unknown key {key!r}")
        if not isinstance(value, str) or not value.strip():
            _refuse(f"machine {number}", f"has a {key} that is no text")
    for key in ("name", "memory"):
        if key not in entry:
            _refuse(f"machine {number}", f"has no {key}")
    return _machine(
        entry["name"].strip(), entry["memory"], entry.get("disk"), entry.get("speed")
    )


def _refuse(subject: str, problem: str) -> NoReturn:
    raise InputError(
        "plan", subject, problem, f"give [[machine]] tables with {', '.join(_KEYS)}"
    )


def _machine(name: str, memory: str, disk: str | None, speed: str | None) -> Machine:
    return Machine(
        name=name,
        memory_bytes=parse_size(memory, "--machine"),
        disk_bytes=None if disk is None else parse_size(disk, "--machine"),
        bytes_per_second=None if speed is None else _parse_speed(speed),
    )


def _parse_speed(speed: str) -> int:
    """Bytes per second of `50GB/s`."""
    if not speed.endswith("/s"):
        raise UsageError("plan", speed, "is not a speed", "write it such as 50GB/s")
    return parse_size(speed.removesuffix("/s"), "--machine")

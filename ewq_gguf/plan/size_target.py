"""Budgets: the size, share of the unquantised file or bits that a file may take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.records import LayoutTensor, Machine
from ewq_gguf.rpc.context_memory import context_bytes, kv_bytes
from ewq_gguf.size_text import parse_size

_NUMBER = re.compile(r"[0-9]{1,30}(\.[0-9]{1,30})?")


@dataclass(frozen=True)
class SizeLimit:
    """The bytes that a file may take.

    Attributes:
        asked: Budget as the user gave it.
        n_bytes: Bytes of the whole file.
        may_exceed: whether it may be more than the unquantised file takes: what a
            machine has often is, what a user asks for is a mistake.
        n_ctx: Tokens of context that memory was left for, or None.
        context_bytes: Memory of that context.
    """

    asked: str
    n_bytes: int
    may_exceed: bool = False
    n_ctx: int | None = None
    context_bytes: int | None = None

    def check_reached(self, least: int, most: int, reach: str, other: str) -> None:
        """Refuse a size that no file has.

        Args:
            least: bytes of the smallest file.
            most: Bytes of the unquantised one.
            reach: whose files these are, and the verb: `these types reach`.
            other: Another thing to ask for, for the message.

        Raises:
            InputError: it is smaller, or larger where that is a mistake.
        """
        if self.n_bytes < least or (self.n_bytes > most and not self.may_exceed):
            raise InputError(
                "plan",
                "--budget",
                f"{self.asked} is {self.n_bytes:,} bytes; {reach} {least:,} to "
                f"{most:,}",
                f"choose a size between them, or {other}",
            )


@dataclass(frozen=True)
class SizeTarget:
    """A budget as it was asked for; exactly one of the numbers is given.

    Attributes:
        text: as it was typed.
        n_bytes: Bytes of the file.
        share: Share of the unquantised file.
        bpw: bits per weight of the whole file.
        memory_bytes: Memory of a machine that holds the file and its context.
        n_devices: Number of devices that this memory belongs to.
        machines: Machines of a cluster that hold it; the file is also placed on them.
        n_ctx: Tokens of that context.
        may_exceed: as of SizeLimit.
    """

    text: str
    n_bytes: int | None = None
    share: float | None = None
    bpw: float | None = None
    memory_bytes: int | None = None
    n_devices: int = 1
    machines: tuple[Machine, ...] = ()
    n_ctx: int = 4096
    may_exceed: bool = False

    def limit(self, raw_bytes: int, tensors: Sequence[LayoutTensor]) -> SizeLimit:
        """The bytes, for a model of these tensors that takes `raw_bytes` unquantised.

        Raises:
            InputError: the memory does not even hold the context.
        """
        if self.memory_bytes is not None:
            context = context_bytes(tensors, self.n_ctx, n_devices=self.n_devices)
            return self._beside(context, self.memory_bytes, self.memory_bytes)
        if self.machines:
            context = sum(kv_bytes(tensors, self.n_ctx).values())
            memory = sum(machine.memory_bytes for machine in self.machines)
            return self._beside(context, memory, weight_capacity(self.machines))
        if self.n_bytes is not None:
            n_bytes = self.n_bytes
        elif self.share is not None:
            n_bytes = int(self.share * raw_bytes)
        else:
            assert self.bpw is not None
            n_bytes = int(self.bpw * sum(prod(t.shape) for t in tensors) / 8)
        return SizeLimit(self.text, n_bytes, self.may_exceed)

    def _beside(self, context: int, memory: int, weights: int) -> SizeLimit:
        """The memory that a context leaves, but no more than the machines can hold."""
        if memory <= context:
            raise InputError(
                "plan",
                "--machine" if self.machines else "--budget",
                f"{memory:,} bytes of memory do not hold more than the {context:,} "
                f"that {self.n_ctx} tokens of context take",
                "choose a smaller --ctx",
            )
        return SizeLimit(
            self.text, min(memory - context, weights), True, self.n_ctx, context
        )


def weight_capacity(machines: Sequence[Machine]) -> int:
    """Bytes of weights that machines could hold together: sum of min(memory, disk)."""
    return sum(min(m.memory_bytes, m.disk_bytes or m.memory_bytes) for m in machines)


def parse_budget(text: str) -> SizeTarget:
    """`6GiB`, `5.5GB`, `80%` of the unquantised file, or `4.5bpw`.

    Raises:
        UsageError: it is none of these, or not above 0.
    """
    stripped = text.strip()
    if stripped.endswith("%"):
        share = _positive(stripped[:-1], "--budget", "80%") / 100
        return SizeTarget(stripped, share=share)
    if stripped.lower().endswith("bpw"):
        return parse_bpw(stripped[:-3])
    return SizeTarget(stripped, n_bytes=parse_size(stripped, "--budget"))


def parse_bpw(text: str) -> SizeTarget:
    """`4.5` bits per weight of the whole file.

    Raises:
        UsageError: it is no number above 0.
    """
    bpw = _positive(text, "--bpw", "4.5")
    return SizeTarget(f"{bpw:g} bpw", bpw=bpw)


def _positive(text: str, option: str, example: str) -> float:
    value = float(text) if _NUMBER.fullmatch(text.strip()) else 0.0
    if not value:
        raise UsageError(
            "plan", option, f"{text.strip()!r} is no number above 0", f"use {example}"
        )
    return value

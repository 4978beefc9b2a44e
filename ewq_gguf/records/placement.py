"""Placement: the layers that each machine of a cluster holds."""

from __future__ import annotations

from ewq_gguf.records.base import Part


class Machine(Part):
    """One machine, as the user describes it.

    Attributes:
        name: a worker's address, `host` or `host:port`; any name for the main machine.
        memory_bytes: memory for the weights, KV cache and compute buffer.
        disk_bytes: disk space for the weights; None for no limit.
        bytes_per_second: speed at which it reads weights from memory, or None.
    """

    name: str
    memory_bytes: int
    disk_bytes: int | None = None
    bytes_per_second: int | None = None


class Stage(Part):
    """The run of layers that one machine holds.

    Attributes:
        machine: its name.
        first_layer: its first layer; None where it holds no layer.
        last_layer: its last layer; None where it holds no layer.
        weight_bytes: bytes of its tensors.
        kv_bytes: bytes of its layers' KV cache.
        compute_bytes: bytes allowed for its compute buffer.
        has_output: whether the output head is here: on the last stage.
    """

    machine: str
    first_layer: int | None
    last_layer: int | None
    weight_bytes: int
    kv_bytes: int
    compute_bytes: int
    has_output: bool

    @property
    def n_layers(self) -> int:
        """How many layers it holds."""
        if self.first_layer is None or self.last_layer is None:
            return 0
        return self.last_layer - self.first_layer + 1


class Placement(Part):
    """A model on a cluster.

    Attributes:
        machines: all that were given; the first is the main one.
        n_ctx: tokens of context that fit beside the weights.
        hops: how often a token's activations change machines on their way through the
            layers.
        seconds_per_token: time to read all weights once, but only a row of the input
            embedding; None where a speed is missing.
        stages: runs of layers in order; the first is the main machine's.
    """

    machines: tuple[Machine, ...]
    n_ctx: int
    hops: int
    seconds_per_token: float | None
    stages: tuple[Stage, ...]

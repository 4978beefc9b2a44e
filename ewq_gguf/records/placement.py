"""Placement: which machine of a cluster holds which layers."""

from __future__ import annotations

from ewq_gguf.records.base import Part


class Machine(Part):
    """One machine, as the user describes it.

    Attributes:
        name: of a worker its address, `host` or `host:port`; the first one's is free.
        memory_bytes: for the model: weights, KV cache and compute buffer.
        disk_bytes: for the weights; None is no limit.
        bytes_per_second: weights it reads from memory; None where it is not known.
    """

    name: str
    memory_bytes: int
    disk_bytes: int | None = None
    bytes_per_second: int | None = None


class Stage(Part):
    """What one machine holds: a run of layers.

    Attributes:
        machine: its name.
        first_layer: None where it holds no layer.
        last_layer: inclusive; None where it holds no layer.
        weight_bytes: of its tensors.
        kv_bytes: of its layers' KV cache.
        compute_bytes: allowed for its compute buffer.
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
        n_ctx: tokens of context that there is room for.
        hops: how often a token's activations change machines on their way through the
            layers.
        seconds_per_token: of reading the weights once, of the input embedding only a
            row; None where a speed is missing.
        stages: in the order of the layers; the first is the main machine's.
    """

    machines: tuple[Machine, ...]
    n_ctx: int
    hops: int
    seconds_per_token: float | None
    stages: tuple[Stage, ...]

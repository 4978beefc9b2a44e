"""A model's bytes as runs of layers that machines of a cluster hold.

Finer than arXiv:2503.04704 section 3.4, where a machine holds R = min(memory, disk)
bytes of weights: the KV cache and the compute buffer count against the memory and not
against the disk, and tied embeddings count twice where llama.cpp stores them twice
(src/llama-model.cpp, TENSOR_DUPLICATED).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.errors import InputError
from ewq_gguf.records.placement import Machine, Stage
from ewq_gguf.records.plan import PlanTensor
from ewq_gguf.rpc.context_memory import compute_bytes, kv_bytes

# Where llama.cpp puts the tensors outside the layers (src/llama-arch.cpp,
# LLM_TENSOR_INFOS): with the input, with the first layer, on every device; all others
# with the output.
_INPUT = ("token_embd", "position_embd", "token_types", "per_layer_token_embd")
_FIRST_LAYER = ("token_embd_norm", "per_layer_model_proj", "per_layer_proj_norm")
_EVERYWHERE = ("rope_freqs", "rope_factors_long", "rope_factors_short")

Positions = NDArray[np.intp]


@dataclass(frozen=True)
class LayerBytes:
    """A model as a row of parts: its layers, then its output head.

    Attributes:
        weights: Bytes of the parts before each position, (n_layers + 2,); a tied
            embedding counts as output.
        kv: Bytes of their KV caches before each position.
        input_bytes: Bytes of the tensors that only the main machine holds.
        tied_bytes: Bytes of an embedding that is the output too; one machine stores it
            once.
        copied_bytes: Bytes of the tensors that every machine has a copy of.
        body_compute: Bytes of a compute buffer without logits.
        head_compute: Bytes of a compute buffer with logits.
    """

    weights: NDArray[np.int64]
    kv: NDArray[np.int64]
    input_bytes: int
    tied_bytes: int
    copied_bytes: int
    body_compute: int
    head_compute: int

    @classmethod
    def of(cls, tensors: Sequence[PlanTensor], n_ctx: int) -> LayerBytes:
        """Add every tensor's bytes to the part that llama.cpp puts it in.

        Raises:
            InputError: There are no layers.
        """
        caches = kv_bytes(tensors, n_ctx)
        if not caches:
            raise InputError(
                "plan", None, "the model has no layers", "llama.cpp cannot split it"
            )
        n_layers = max(caches) + 1
        parts = np.zeros(n_layers + 1, np.int64)
        input_bytes = copied_bytes = 0
        for tensor in tensors:
            prefix = tensor.name.split(".")[0]
            if tensor.layer_idx is not None:
                parts[tensor.layer_idx] += tensor.size_bytes
            elif prefix in _INPUT:
                input_bytes += tensor.size_bytes
            elif prefix in _FIRST_LAYER:
                parts[0] += tensor.size_bytes
            elif prefix in _EVERYWHERE:
                copied_bytes += tensor.size_bytes
            else:
                parts[-1] += tensor.size_bytes
        sizes = {tensor.name: tensor.size_bytes for tensor in tensors}
        tied = 0 if "output.weight" in sizes else sizes.get("token_embd.weight", 0)
        parts[-1] += tied
        kv = [caches.get(layer, 0) for layer in range(n_layers)]
        return cls(
            weights=np.concatenate([[0], np.cumsum(parts)]),
            kv=np.concatenate([[0], np.cumsum([*kv, 0])]),
            input_bytes=input_bytes,
            tied_bytes=tied,
            copied_bytes=copied_bytes,
            body_compute=compute_bytes(tensors, n_ctx, has_output=False),
            head_compute=compute_bytes(tensors, n_ctx),
        )

    def weights_between(self, start: int, stop: int) -> int:
        """Bytes of the weights of the parts from `start` up to `stop`."""
        return int(self.weights[stop] - self.weights[start])

    def extra_bytes(self, stop: int, *, is_main: bool) -> int:
        """Bytes of weights that a stage holds beside its parts."""
        if not is_main:
            return self.copied_bytes
        is_whole = stop == len(self.weights) - 1
        return (
            self.copied_bytes + self.input_bytes - (self.tied_bytes if is_whole else 0)
        )

    def compute(self, stop: int) -> int:
        """Bytes of the compute buffer of a stage that ends at `stop`."""
        is_last = stop == len(self.weights) - 1
        return self.head_compute if is_last else self.body_compute

    def stage(self, machine: str, start: int, stop: int, is_main: bool) -> Stage:
        """The stage of the parts from `start` up to `stop`."""
        n_layers = len(self.weights) - 2
        end = min(stop, n_layers)
        extra = self.extra_bytes(stop, is_main=is_main)
        return Stage(
            machine=machine,
            first_layer=start if start < end else None,
            last_layer=end - 1 if start < end else None,
            weight_bytes=self.weights_between(start, stop) + extra,
            kv_bytes=int(self.kv[stop] - self.kv[start]),
            compute_bytes=self.compute(stop),
            has_output=stop > n_layers,
        )


def first_starts(load: LayerBytes, machine: Machine, *, is_main: bool) -> Positions:
    """For every stop the first part at which a stage of this machine may start.

    Where no stage can end at a stop, its start is behind the stop.
    """
    n_positions = len(load.weights)
    stops = (0, n_positions - 1)  # of a body, and with the head
    extras = [load.extra_bytes(stop, is_main=is_main) for stop in stops]
    limits = [
        machine.memory_bytes - extra - load.compute(stop)
        for stop, extra in zip(stops, extras, strict=True)
    ]
    starts = _first_that_fit(load.weights + load.kv, *limits)
    if machine.disk_bytes is not None:
        limits = [machine.disk_bytes - extra for extra in extras]
        starts = np.maximum(starts, _first_that_fit(load.weights, *limits))
    return starts


def _first_that_fit(sums: NDArray[np.int64], body: int, last: int) -> Positions:
    """For every stop the first part from which all parts up to it fit."""
    most = int(sums[-1])  # a machine's memory may be beyond 64 bits
    limits = np.full(len(sums), min(body, most))
    limits[-1] = min(last, most)
    firsts: Positions = np.searchsorted(sums, np.maximum(sums - limits, 0))
    return firsts

"""A transformers model with a context for some sequences: their keys and values.

Only child processes import this.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ewq_gguf.bench.engines.scorer import STAGE, Batch, Buffers, FloatArray
from ewq_gguf.errors import ResourceError

#: Keys and values of each layer, (1, heads, tokens, width); None of one without any.
_Layers = list[tuple[torch.Tensor, torch.Tensor] | None]


@dataclass
class _Sequence:
    """Tokens of a sequence, and their cache.

    Attributes:
        cells: (n,) a number for each token that was computed; copies share it.
        layers: never written into, so that copies share them too; empty with no token.
    """

    cells: NDArray[np.int64]
    layers: _Layers

    def __len__(self) -> int:
        return len(self.cells)


_EMPTY = _Sequence(np.empty(0, np.int64), [])


class TransformersScorer:
    """A model and the sequences that are open.

    Sequences that hold equally many tokens go through the model together, filled up at
    their ends to one length; what is filled up comes after all that is asked for, and
    no token sees what comes after it.

    Args:
        model: a model of transformers.
        weights_bytes: size of its weights.
        n_ctx: tokens of all sequences, a shared one counted once.
        n_sequences: sequences that can be open at once.
        n_batch: tokens of a forward pass.
    """

    def __init__(
        self,
        model: Any,
        weights_bytes: int,
        *,
        n_ctx: int,
        n_sequences: int,
        n_batch: int,
    ) -> None:
        """Open no sequence yet."""
        self._model = model
        self._device = model.device
        self._weights_bytes = weights_bytes
        self._keeps_logits = (
            "logits_to_keep" in inspect.signature(model.forward).parameters
        )
        self._sequences: dict[int, _Sequence] = {}
        self._n_computed = 0
        self.n_ctx = n_ctx
        self.n_sequences = n_sequences
        self.n_batch = min(n_batch, n_ctx)
        self.n_vocab = int(model.get_output_embeddings().out_features)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def evaluate(self, batch: Batch) -> FloatArray:
        """Run the model over a batch, whose tokens its sequences then hold.

        Returns:
            (n_outputs, n_vocab), in the batch's order; the caller's own.

        Raises:
            ResourceError: the context is full, or memory ran out.
        """
        rows = np.empty((int(batch.is_output.sum()), self.n_vocab), np.float32)
        row_of = np.cumsum(batch.is_output) - 1
        for begin in range(0, len(batch), self.n_batch):
            piece = np.arange(begin, min(begin + self.n_batch, len(batch)))
            self._check_room(len(piece))
            parts = [
                piece[batch.sequences[piece] == sequence]
                for sequence in np.unique(batch.sequences[piece])
            ]
            for group in self._groups(batch, parts):
                self._forward(batch, group, rows, row_of)
        return rows

    def copy(self, source: int, target: int) -> None:
        """Let a sequence begin as another is now; shared, not computed again."""
        self._sequences[target] = self._held(source)

    def remove(self, sequence: int, begin: int = 0) -> None:
        """Forget a sequence from a position on."""
        held = self._held(sequence)
        if begin < len(held):
            self._sequences[sequence] = _Sequence(
                held.cells[:begin], _cut(held.layers, 0, begin) if begin else []
            )

    def clear(self) -> None:
        """Forget all sequences."""
        self._sequences.clear()

    def buffers(self) -> Buffers:
        """The memory of the model and of this context, as it is now.

        Intermediate results are those of the largest forward pass on a CUDA device;
        on the CPU torch does not count them.
        """
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for held in self._sequences.values()
            for pair in held.layers
            for tensor in pair or ()
        }
        kv_bytes = sum(storages.values())
        is_cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if is_cuda else 0
        return Buffers(
            weights_bytes=self._weights_bytes,
            kv_bytes=kv_bytes,
            compute_bytes=max(peak - self._weights_bytes - kv_bytes, 0),
            device_bytes=peak,
        )

    def _held(self, sequence: int) -> _Sequence:
        return self._sequences.get(sequence, _EMPTY)

    def _check_room(self, n_new: int) -> None:
        held = [sequence.cells for sequence in self._sequences.values()]
        n_held = len(np.unique(np.concatenate(held))) if held else 0
        if n_held + n_new > self.n_ctx:
            problem = (
                f"{n_new} tokens do not fit into what is left of the context of "
                f"{self.n_ctx}"
            )
            raise ResourceError(STAGE, None, problem, "use another --ctx")

    def _groups(
        self, batch: Batch, parts: Sequence[NDArray[np.intp]]
    ) -> Iterator[list[NDArray[np.intp]]]:
        """Tokens by sequence, those together whose sequences hold equally many.

        Filled up to the longest, the tokens of a group are no more than a pass takes.
        """

        def n_held(part: NDArray[np.intp]) -> int:
            return len(self._held(int(batch.sequences[part[0]])))

        waiting = sorted(parts, key=lambda part: (n_held(part), -len(part)))
        while waiting:
            first = waiting[0]
            n_most = max(self.n_batch // len(first), 1)
            group = [p for p in waiting[:n_most] if n_held(p) == n_held(first)]
            waiting = waiting[len(group) :]
            yield group

    def _forward(
        self,
        batch: Batch,
        group: Sequence[NDArray[np.intp]],
        rows: FloatArray,
        row_of: NDArray[np.intp],
    ) -> None:
        """One pass: a group's tokens in, their logits into `rows`."""
        sequences = [int(batch.sequences[part[0]]) for part in group]
        held = [self._held(sequence) for sequence in sequences]
        n_held, length = len(held[0]), len(group[0])
        for part in group:
            begin = int(batch.positions[part[0]])
            assert begin == n_held, f"position {begin} follows {n_held} tokens"
        tokens = np.zeros((len(group), length), np.int64)
        for i, part in enumerate(group):
            tokens[i, : len(part)] = batch.tokens[part]
        places = [np.flatnonzero(batch.is_output[part]) for part in group]
        # At least one column: none would mean all.
        columns = np.unique(np.concatenate([*places, [length - 1]]))
        if not self._keeps_logits:
            columns = np.arange(length)
        logits, layers = self._run(tokens, n_held, columns, held)
        for i, (part, is_output) in enumerate(zip(group, places, strict=True)):
            # The memory of padded sequences stays taken as long as the others'.
            end = n_held + len(part)
            self._sequences[sequences[i]] = _Sequence(
                np.concatenate([held[i].cells, self._new_cells(len(part))]),
                _cut(layers, i, end),
            )
            if len(is_output):
                kept = np.searchsorted(columns, is_output)
                found = logits[i, torch.from_numpy(kept).to(self._device)]
                rows[row_of[part[is_output]]] = found.float().cpu().numpy()

    def _run(
        self,
        tokens: NDArray[np.int64],
        n_held: int,
        columns: NDArray[np.intp],
        held: Sequence[_Sequence],
    ) -> tuple[torch.Tensor, _Layers]:
        """(k, n) tokens after `n_held` others -> (k, columns, n_vocab), all layers."""
        cache = _joined([sequence.layers for sequence in held])
        positions = torch.arange(n_held, n_held + tokens.shape[1], device=self._device)
        options = {}
        if self._keeps_logits:
            options["logits_to_keep"] = torch.from_numpy(columns).to(self._device)
        with torch.inference_mode():
            found = self._model(
                input_ids=torch.from_numpy(tokens).to(self._device),
                position_ids=positions[None].expand(len(tokens), -1),
                past_key_values=cache,
                use_cache=True,
                **options,
            )
        layers: _Layers = [
            (layer.keys, layer.values) if layer.is_initialized else None
            for layer in cache.layers
        ]
        return found.logits, layers

    def _new_cells(self, count: int) -> NDArray[np.int64]:
        begin = self._n_computed
        self._n_computed += count
        return np.arange(begin, begin + count)


def _cut(layers: _Layers, index: int, end: int) -> _Layers:
    """One sequence's share of a group's layers, up to a position."""
    return [
        None
        if pair is None
        else (pair[0][index : index + 1, :, :end], pair[1][index : index + 1, :, :end])
        for pair in layers
    ]


def _joined(held: Sequence[_Layers]) -> Any:
    """A cache of several sequences with equally many tokens."""
    cache = DynamicCache()
    for pairs in zip(*held, strict=True):
        layer = DynamicLayer()
        if pairs[0] is not None:
            layer.lazy_initialization(*pairs[0])
            layer.keys, layer.values = (
                _stacked([pair[side] for pair in pairs]) for side in (0, 1)
            )
        cache.layers.append(layer)
    return cache


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(1, ...) each -> (k, ...); copies of one are not copied again."""
    first = tensors[0]
    if all(tensor is first for tensor in tensors):
        return first.expand(len(tensors), -1, -1, -1)
    return torch.cat(list(tensors))

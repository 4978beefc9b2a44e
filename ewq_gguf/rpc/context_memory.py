"""Memory that a context takes beside the weights: KV cache and compute buffers.

llama.cpp allocates two things when it loads a model for a context of n tokens: the KV
cache (llama-kv-cache.cpp) and compute buffers for the activations of one micro-batch
(llama-context.cpp, sched_reserve). Both follow from the tensors' shapes. The first is
counted exactly, the second estimated from above: small models of 58 families and wide
synthetic ones took between a third and all of it. Assumed are llama.cpp's defaults: a
cache of F16, flash attention, one sequence, micro-batches of 512 tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import prod
from typing import Protocol

from ewq_gguf.tensor_names import layer_idx, role

#: llama.cpp rounds contexts up to it (llama-context.cpp, GGML_PAD).
_CONTEXT_STEP = 256
#: Tokens of a micro-batch: --ubatch-size.
_N_UBATCH = 512
_F16_BYTES = 2
_F32_BYTES = 4
#: Experts whose results for one token are counted. Most models send a token to 2 to 10;
#: the shapes do not tell.
_MOST_EXPERTS = 16
#: How often what a layer's other matrices put out is counted: results, and what is made
#: of them (rotated, concatenated, gated).
_N_ALIVE = 2
#: Attention masks: one for full attention, one for a sliding window.
_N_MASKS = 2

_Shape = tuple[int, ...]


class Tensor(Protocol):
    """A PlanTensor or LayoutTensor; shape is slowest dimension first."""

    @property
    def name(self) -> str:
        """In the GGUF."""

    @property
    def shape(self) -> _Shape:
        """Slowest dimension first."""


def padded_context(n_ctx: int) -> int:
    """Tokens of context that llama.cpp allocates when asked for `n_ctx`."""
    return -(-n_ctx // _CONTEXT_STEP) * _CONTEXT_STEP


def kv_bytes(tensors: Iterable[Tensor], n_ctx: int) -> dict[int, int]:
    """Bytes of each layer's KV cache, by layer_idx, for a context of `n_ctx` tokens.

    Layers with a sliding window, and those that use another layer's cache, are counted
    whole: an upper bound. The state of recurrent layers (Mamba, RWKV) does not grow
    with the context and is left out.
    """
    per_token = padded_context(n_ctx) * _F16_BYTES
    return {
        idx: per_token * _cached_width(shapes)
        for idx, shapes in _layer_shapes(tensors).items()
    }


def compute_bytes(
    tensors: Iterable[Tensor], n_ctx: int, *, has_output: bool = True
) -> int:
    """Bytes of one device's compute buffer, estimated from above.

    Args:
        tensors: tensors of the whole model.
        n_ctx: tokens of context.
        has_output: whether the device computes logits.
    """
    tensors = tuple(tensors)
    n_cells = padded_context(n_ctx)
    n_tokens = min(_N_UBATCH, n_cells)
    n_vocab, n_embd = _embedding_shape(tensors)
    widest = max(map(_output_width, _layer_shapes(tensors).values()), default=0)
    # Logits come last, when the layers' results are gone.
    n_values = 2 * n_embd + max(widest, n_vocab if has_output else 0)
    masks = _N_MASKS * n_cells * _F16_BYTES
    return n_tokens * (n_values * _F32_BYTES + masks)


def context_bytes(tensors: Iterable[Tensor], n_ctx: int, *, n_devices: int = 1) -> int:
    """Bytes that one machine needs beside the weights.

    The KV cache, and each device's compute buffer: an upper bound, for only one of them
    computes logits.
    """
    tensors = tuple(tensors)
    buffers = n_devices * compute_bytes(tensors, n_ctx)
    return sum(kv_bytes(tensors, n_ctx).values()) + buffers


def _layer_shapes(tensors: Iterable[Tensor]) -> dict[int, dict[str, _Shape]]:
    """Shapes of each layer's weights, by role."""
    shapes: dict[int, dict[str, _Shape]] = defaultdict(dict)
    for tensor in tensors:
        idx = layer_idx(tensor.name)
        if idx is not None:
            shapes[idx][role(tensor.name)] = tensor.shape
    return shapes


def _cached_width(shapes: Mapping[str, _Shape]) -> int:
    """Values that one layer caches per token: rows of K and V.

    Source: llama.cpp src/llama-kv-cache.cpp, n_embd_k_gqa and n_embd_v_gqa, and the
    tensors' shapes in src/models/*.cpp.
    """

    def rows(name: str) -> int:
        return shapes[name][0] if name in shapes else 0

    if "attn_kv_a_mqa" in shapes:  # multi-head latent attention (DeepSeek)
        if "attn_k_b" in shapes:  # only the latent vector and the rotated key
            return rows("attn_kv_a_mqa") + rows("indexer.attn_k")
        # Not absorbed: K is as wide as the queries, V as what attn_output reads.
        queries = rows("attn_q_b") or rows("attn_q")
        return queries + shapes["attn_output"][-1]
    if "attn_k" in shapes:  # without attn_v, V is K (Gemma 4)
        return rows("attn_k") + (rows("attn_v") or rows("attn_k"))
    if "attn_kv" in shapes:  # K is V (DeepSeek 4)
        return 2 * rows("attn_kv")
    if "attn_qkv" in shapes and "attn_output" in shapes:
        return rows("attn_qkv") - shapes["attn_output"][-1]
    return 0


def _output_width(shapes: Mapping[str, _Shape]) -> int:
    """Values per token that are alive at once in a layer, estimated from above."""
    return sum(
        min(shape[0], _MOST_EXPERTS) * prod(shape[1:-1])
        if name.endswith("_exps")
        else _N_ALIVE * prod(shape[:-1])
        for name, shape in shapes.items()
        if not name.startswith("nextn.")  # of drafts, which are off
    )


def _embedding_shape(tensors: Iterable[Tensor]) -> _Shape:
    """Tokens and values per token, of the input embedding; 0 where there is none."""
    return next((t.shape for t in tensors if t.name == "token_embd.weight"), (0, 0))

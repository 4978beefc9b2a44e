"""Tiny Llama models as GGUF files, and their logits in float64, for the self-test.

Each model's matrices are of one ggml type, so that a wrong or crashing kernel is known
by name. The blocks are random bytes with sensible scales: no quantiser of the build
under test is needed, and every code of a type occurs. What they stand for is computed
by gguf-py, and the forward pass by numpy: neither shares code with llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.ggml_types import FLOAT_TYPES

Float64Array = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Tensors = dict[str, tuple[Bytes | NDArray[np.float32], str]]

N_VOCAB = 64
_N_HEADS, _N_KV_HEADS = 4, 2
_RMS_EPSILON = 1e-5
_ROPE_BASE = 10000.0

#: Where a block has its half-precision scale, and, for types with an offset, that and
#: the offset as a multiple of the scale which centres random codes (ggml-common.h).
_SCALES: dict[str, tuple[int, tuple[int, float] | None]] = {
    "Q8_0": (0, None),
    "Q4_0": (0, None),
    "Q4_1": (0, (2, -7.5)),
    "Q5_0": (0, None),
    "Q5_1": (0, (2, -15.5)),
    "IQ4_NL": (0, None),
    "IQ4_XS": (0, None),
    "IQ3_S": (0, None),
    "Q2_K": (80, (82, 1.5)),
    "Q3_K": (108, None),
    "Q4_K": (0, (2, 7.5)),
    "Q5_K": (0, (2, 15.5)),
    "Q6_K": (208, None),
}
# An exponent for all blocks: codes of -6 to 6, halves of them are meant.
_MXFP4_EXPONENT = 122


@dataclass(frozen=True)
class TinyModel:
    """A Llama of one layer, or a mixture of experts, with matrices of one type.

    Attributes:
        ggml_type: The type of every matrix.
        n_embd: columns of the matrices that read the hidden state; a multiple of 32.
        n_ff: columns of the down projection.
        n_experts: 0 for a plain feed-forward network.
    """

    ggml_type: str
    n_embd: int = 256
    n_ff: int = 256
    n_experts: int = 0

    @property
    def name(self) -> str:
        """The kernels that it exercises, such as `Q4_K, rows of 256, experts`."""
        experts = ", experts" if self.n_experts else ""
        return f"{self.ggml_type}, rows of {self.n_embd}{experts}"

    @property
    def file_name(self) -> str:
        """A name for its file."""
        return self.name.replace(", ", "-").replace(" ", "-") + ".gguf"

    @property
    def _head_size(self) -> int:
        return self.n_embd // _N_HEADS

    @cached_property
    def _tensors(self) -> Tensors:
        """Tensors as they are stored, with their types, in the order of the file."""
        rng = np.random.default_rng([20260, self.n_embd, self.n_experts])
        embd, ff, kv = self.n_embd, self.n_ff, _N_KV_HEADS * self._head_size
        experts = (self.n_experts,) if self.n_experts else ()
        suffix = "_exps" if experts else ""
        matrices = {
            "blk.0.attn_q": (embd, embd),
            "blk.0.attn_k": (kv, embd),
            "blk.0.attn_v": (kv, embd),
            "blk.0.attn_output": (embd, embd),
            f"blk.0.ffn_gate{suffix}": (*experts, ff, embd),
            f"blk.0.ffn_up{suffix}": (*experts, ff, embd),
            f"blk.0.ffn_down{suffix}": (*experts, embd, ff),
            "output": (N_VOCAB, embd),
        }
        floats = {"token_embd": rng.standard_normal((N_VOCAB, embd))}
        for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
            floats[norm] = 1 + 0.1 * rng.standard_normal(embd)
        if self.n_experts:
            # Far apart: rounding must not decide which experts a token goes to.
            floats["blk.0.ffn_gate_inp"] = rng.standard_normal((self.n_experts, embd))
        stored: Tensors = {
            f"{name}.weight": (values.astype(np.float32), "F32")
            for name, values in floats.items()
        }
        for name, shape in matrices.items():
            blocks = random_blocks(self.ggml_type, shape, shape[-1] ** -0.5, rng)
            stored[f"{name}.weight"] = (blocks, self.ggml_type)
        return stored

    def write(self, path: Path) -> None:
        """Write it as a GGUF file without a vocabulary: it is given token ids."""
        from gguf import GGMLQuantizationType, GGUFWriter

        writer = GGUFWriter(path, "llama")
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(N_VOCAB)
        writer.add_context_length(128)
        writer.add_embedding_length(self.n_embd)
        writer.add_block_count(1)
        writer.add_feed_forward_length(self.n_ff)
        writer.add_head_count(_N_HEADS)
        writer.add_head_count_kv(_N_KV_HEADS)
        writer.add_rope_dimension_count(self._head_size)
        writer.add_rope_freq_base(_ROPE_BASE)
        writer.add_layer_norm_rms_eps(_RMS_EPSILON)
        if self.n_experts:
            writer.add_expert_count(self.n_experts)
            writer.add_expert_used_count(self.n_experts // 2)
        for name, (data, ggml_type) in self._tensors.items():
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[ggml_type])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def logits(self, tokens: NDArray[np.int32]) -> Float64Array:
        """The logits at every position of a text: (T,) token ids -> (T, N_VOCAB)."""
        weights = {
            name: _values(data, ggml_type)
            for name, (data, ggml_type) in self._tensors.items()
        }
        x = weights["token_embd.weight"][tokens]
        hidden = _rms_norm(x) * weights["blk.0.attn_norm.weight"]
        x = x + self._attention(hidden, weights)
        hidden = _rms_norm(x) * weights["blk.0.ffn_norm.weight"]
        x = x + self._feed_forward(hidden, weights)
        hidden = _rms_norm(x) * weights["output_norm.weight"]
        return np.asarray(hidden @ weights["output.weight"].T)

    def _attention(
        self, hidden: Float64Array, weights: dict[str, Float64Array]
    ) -> Float64Array:
        n_tokens, size = len(hidden), self._head_size

        def heads(role: str, count: int) -> Float64Array:
            flat = hidden @ weights[f"blk.0.attn_{role}.weight"].T
            return flat.reshape(n_tokens, count, size)

        q = _rotate(heads("q", _N_HEADS))
        # Each key and value serves the same number of neighbouring heads.
        shared = _N_HEADS // _N_KV_HEADS
        k = _rotate(heads("k", _N_KV_HEADS)).repeat(shared, axis=1)
        v = heads("v", _N_KV_HEADS).repeat(shared, axis=1)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(size)
        scores[:, np.triu(np.ones((n_tokens, n_tokens), bool), 1)] = -np.inf
        mixed = np.einsum("hts,shd->thd", _softmax(scores), v)
        flat = mixed.reshape(n_tokens, -1)
        return np.asarray(flat @ weights["blk.0.attn_output.weight"].T)

    def _feed_forward(
        self, hidden: Float64Array, weights: dict[str, Float64Array]
    ) -> Float64Array:
        if not self.n_experts:
            return _swiglu(
                hidden,
                *(weights[f"blk.0.ffn_{r}.weight"] for r in ("gate", "up", "down")),
            )
        shares = _softmax(hidden @ weights["blk.0.ffn_gate_inp.weight"].T)
        used = np.argsort(-shares, axis=1)[:, : self.n_experts // 2]
        kept = np.zeros_like(shares)
        np.put_along_axis(kept, used, np.take_along_axis(shares, used, 1), 1)
        kept /= kept.sum(axis=1, keepdims=True)
        mixed = np.sum(
            [
                kept[:, [i]]
                * _swiglu(
                    hidden,
                    *(
                        weights[f"blk.0.ffn_{r}_exps.weight"][i]
                        for r in ("gate", "up", "down")
                    ),
                )
                for i in range(self.n_experts)
            ],
            axis=0,
        )
        return np.asarray(mixed)


#: One model per class of kernels; rows of 96 are no multiple of 256 and 160 of no 64.
TINY_MODELS = (
    *(TinyModel(t) for t in ("F32", "BF16", "F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K")),
    *(TinyModel(t) for t in ("Q3_K", "Q2_K", "IQ4_XS", "IQ3_S", "Q4_0", "IQ4_NL")),
    *(
        TinyModel(t, n_embd=96, n_ff=160)
        for t in ("BF16", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")
    ),
    TinyModel("MXFP4", n_embd=96, n_ff=160),
    *(TinyModel(t, n_ff=256, n_experts=4) for t in ("BF16", "Q8_0", "Q4_K", "Q4_0")),
)


def random_blocks(
    ggml_type: str,
    shape: tuple[int, ...],
    standard_deviation: float,
    rng: np.random.Generator,
) -> Bytes | NDArray[np.float32]:
    """Random rows of a type, whose values have about the standard deviation asked for.

    Args:
        ggml_type: a float type, or one that `_SCALES` or MXFP4 describes.
        shape: The tensor's; its last dimension is a multiple of the type's block.
        standard_deviation: The values'.
        rng: where the bytes come from.

    Returns:
        float32 of the shape for F32, else uint8 with the bytes of a row in the last
        dimension.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quantize

    number = GGMLQuantizationType[ggml_type]
    if ggml_type in FLOAT_TYPES:
        values = (standard_deviation * rng.standard_normal(shape)).astype(np.float32)
        if ggml_type == "F32":
            return values
        return np.ascontiguousarray(quantize(values, number)).view(np.uint8)
    block, size = GGML_QUANT_SIZES[number]
    stored = (*shape[:-1], shape[-1] // block, size)
    blocks = rng.integers(0, 256, stored, dtype=np.uint8)
    if ggml_type == "MXFP4":
        blocks[..., 0] = _MXFP4_EXPONENT
    else:
        _set_scales(blocks, ggml_type, 1.0)
        spread = float(_values(_rows(blocks), ggml_type).std())
        _set_scales(blocks, ggml_type, standard_deviation / spread)
    return _rows(blocks)


def _rows(blocks: Bytes) -> Bytes:
    return blocks.reshape(*blocks.shape[:-2], -1)


def _set_scales(blocks: Bytes, ggml_type: str, scale: float) -> None:
    """Give every block one scale, and the offset that centres its values."""
    at, offset = _SCALES[ggml_type]
    blocks[..., at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    if offset is not None:
        at, factor = offset
        # gguf's layout: K-types subtract the offset, Q4_1 and Q5_1 add it.
        blocks[..., at : at + 2] = np.array([factor * scale], np.float16).view("u1")


def _values(data: Bytes | NDArray[np.float32], ggml_type: str) -> Float64Array:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    return dequantize(data, GGMLQuantizationType[ggml_type]).astype(np.float64)


def _rms_norm(x: Float64Array) -> Float64Array:
    return np.asarray(x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + _RMS_EPSILON))


def _softmax(x: Float64Array) -> Float64Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def _swiglu(
    x: Float64Array, gate: Float64Array, up: Float64Array, down: Float64Array
) -> Float64Array:
    g = x @ gate.T
    return np.asarray((g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T)


def _rotate(x: Float64Array) -> Float64Array:
    """Rotary embedding of neighbouring pairs: (T, heads, size), positions 0 to T-1."""
    n_tokens, _, size = x.shape
    frequencies = _ROPE_BASE ** (-np.arange(0, size, 2) / size)
    angles = np.arange(n_tokens)[:, None, None] * frequencies
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = np.cos(angles), np.sin(angles)
    turned = np.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.reshape(x.shape)

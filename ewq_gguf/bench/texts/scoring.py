"""Logits to numbers per token: log-likelihood and divergence, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.bench.engines.scorer import BoolArray, FloatArray, IntArray

#: Logits that are worked on at once: a block in float64 stays in the CPU's cache.
_BLOCK_LOGITS = 1 << 18

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class Divergence:
    """Tokens of a model against its base; all arrays are (n,).

    Attributes:
        nll_nats: -ln p(token) of the model.
        base_nll_nats: -ln p(token) of the base.
        kld_nats: KL(base || model) of the next token's distributions.
        is_same_top: whether both find the same token likeliest.
    """

    nll_nats: Float64Array
    base_nll_nats: Float64Array
    kld_nats: Float64Array
    is_same_top: BoolArray


def token_nll(logits: FloatArray, targets: IntArray) -> Float64Array:
    """-ln softmax(logits)[target] per row, nats; (n, V), (n,) -> (n,).

    NaN where a row has no distribution: a logit of NaN or +inf.
    """
    return np.concatenate(
        [-_log_softmax(logits[rows])[_index(targets[rows])] for rows in _blocks(logits)]
    )


def divergence(
    logits: FloatArray, base_logits: FloatArray, targets: IntArray
) -> Divergence:
    """Both models' rows compared; (n, V), (n, V), (n,).

    KL = sum_v p_base(v) (ln p_base(v) - ln p(v)): no floor and no cut, so that equal
    logits give exactly 0.
    """
    parts = []
    for rows in _blocks(logits):
        own = _log_softmax(logits[rows])
        base = _log_softmax(base_logits[rows])
        index = _index(targets[rows])
        nll, base_nll = -own[index], -base[index]
        np.subtract(base, own, out=own)
        np.exp(base, out=base)
        parts.append((nll, base_nll, np.einsum("nv,nv->n", base, own)))
    nll, base_nll, kld = (np.concatenate(part) for part in zip(*parts, strict=True))
    is_same_top = logits.argmax(axis=1) == base_logits.argmax(axis=1)
    return Divergence(nll, base_nll, kld, is_same_top)


def largest_error(logits: FloatArray, base_logits: FloatArray) -> float:
    """The most by which log-probabilities differ, nats; (n, V), (n, V).

    NaN where a row has no distribution. Half its square bounds the divergence.
    """
    errors = [
        np.abs(_log_softmax(logits[rows]) - _log_softmax(base_logits[rows])).max()
        for rows in _blocks(logits)
    ]
    return float(np.max(errors))


def _log_softmax(logits: FloatArray) -> Float64Array:
    """Natural logarithms of the probabilities; (n, V) -> (n, V) float64."""
    shifted = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # +inf becomes NaN, which is said later
        shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _index(targets: IntArray) -> tuple[NDArray[np.intp], IntArray]:
    return np.arange(len(targets)), targets


def _blocks(logits: FloatArray) -> list[slice]:
    step = max(1, _BLOCK_LOGITS // logits.shape[1])
    return [slice(begin, begin + step) for begin in range(0, len(logits), step)]

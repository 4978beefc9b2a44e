"""Tokens to numbers with standard errors.

Perplexity's error is llama-perplexity's: tokens as if they were independent. Those of
the divergence resample whole windows or documents, because the tokens of one are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, sqrt

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.bench.engines.scorer import BoolArray
from ewq_gguf.bench.texts.scoring import Float64Array
from ewq_gguf.records import Chunk, ChunkPart, Kld, TextResult

_N_RESAMPLES = 1000
_SEED = 0
_QUANTILES = {
    "kld_median_nats": 0.5,
    "kld_p90_nats": 0.9,
    "kld_p95_nats": 0.95,
    "kld_p99_nats": 0.99,
    "kld_p999_nats": 0.999,
    "kld_max_nats": 1.0,
}


@dataclass(frozen=True)
class Tokens:
    """Scored tokens, (n,) each, and which window or document each is in.

    Attributes:
        chunk: index, rising.
        nll_nats: -ln p of each token.
        base_nll_nats: the base's; (0,) without one.
        kld_nats: likewise.
        is_same_top: likewise.
    """

    chunk: NDArray[np.intp]
    nll_nats: Float64Array
    base_nll_nats: Float64Array
    kld_nats: Float64Array
    is_same_top: BoolArray

    @classmethod
    def of(cls, parts: Sequence[ChunkPart]) -> Tokens:
        """The parts of one text, or of several, as one row of tokens."""
        lengths = [length for part in parts for length in part.lengths]
        return cls(
            chunk=np.repeat(np.arange(len(lengths)), lengths),
            nll_nats=_flat([part.nll_nats for part in parts]),
            base_nll_nats=_flat([part.base_nll_nats for part in parts]),
            kld_nats=_flat([part.kld_nats for part in parts]),
            is_same_top=_flat([part.is_same_top for part in parts]).astype(bool),
        )

    @property
    def n_chunks(self) -> int:
        """Windows or documents."""
        return int(self.chunk[-1]) + 1

    def per_chunk(self, values: Float64Array | BoolArray) -> Float64Array:
        """Sums; (n,) -> (n_chunks,)."""
        sums = np.bincount(self.chunk, values.astype(np.float64), self.n_chunks)
        return sums.astype(np.float64)


def text_result(name: str, parts: Sequence[ChunkPart], n_skipped: int) -> TextResult:
    """One text's numbers."""
    tokens = Tokens.of(parts)
    ppl, ppl_stderr = perplexity(tokens.nll_nats)
    return TextResult(
        name=name,
        n_tokens=len(tokens.nll_nats),
        n_skipped=n_skipped,
        ppl=ppl,
        ppl_stderr=ppl_stderr,
        kld=kld(tokens) if len(tokens.kld_nats) else None,
        chunks=_chunks(tokens),
    )


def perplexity(nll_nats: Float64Array) -> tuple[float, float]:
    """The mean's exp, and its standard error by the delta method; (n,) nats."""
    ppl = exp(nll_nats.mean())
    n_tokens = len(nll_nats)
    return ppl, ppl * sqrt(nll_nats.var() / (n_tokens - 1)) if n_tokens > 1 else 0.0


def kld(tokens: Tokens) -> Kld:
    """The divergence's numbers; errors are deviations over resampled chunks."""
    order = np.argsort(tokens.kld_nats)
    delta_p = np.exp(-tokens.nll_nats) - np.exp(-tokens.base_nll_nats)
    sample = _Sample(
        n_tokens=tokens.per_chunk(np.ones(len(tokens.chunk))),
        kld=tokens.per_chunk(tokens.kld_nats),
        same_top=tokens.per_chunk(tokens.is_same_top),
        delta_p_squared=tokens.per_chunk(delta_p**2),
        base_nll=tokens.per_chunk(tokens.base_nll_nats),
        sorted_kld=tokens.kld_nats[order],
        sorted_chunk=tokens.chunk[order],
    )
    n_chunks = tokens.n_chunks
    numbers = sample.numbers(np.ones(n_chunks))
    stderr = {}
    if n_chunks > 1:
        random = np.random.default_rng(_SEED)
        even = np.full(n_chunks, 1 / n_chunks)
        resampled = [
            sample.numbers(random.multinomial(n_chunks, even).astype(float))
            for _ in range(_N_RESAMPLES)
        ]
        stderr = {
            name: float(np.std([numbers[name] for numbers in resampled], ddof=1))
            for name in numbers
        }
    return Kld(**numbers, stderr=stderr)


@dataclass(frozen=True)
class _Sample:
    """Sums per chunk, (n_chunks,) each, and all tokens by rising divergence, (n,)."""

    n_tokens: Float64Array
    kld: Float64Array
    same_top: Float64Array
    delta_p_squared: Float64Array
    base_nll: Float64Array
    sorted_kld: Float64Array
    sorted_chunk: NDArray[np.intp]

    def numbers(self, weights: Float64Array) -> dict[str, float]:
        """Each number, the chunks taken as often as `weights` says; (n_chunks,)."""
        count = self.n_tokens @ weights
        cumulated = np.cumsum(weights[self.sorted_chunk])
        return {
            "kld_mean_nats": float(self.kld @ weights / count),
            "top1_agreement": float(self.same_top @ weights / count),
            "delta_p_rms": sqrt(self.delta_p_squared @ weights / count),
            "base_ppl": exp(self.base_nll @ weights / count),
            **{
                name: self._quantile(cumulated, share)
                for name, share in _QUANTILES.items()
            },
        }

    def _quantile(self, cumulated: Float64Array, share: float) -> float:
        """Linear between order statistics, as numpy's and llama-perplexity's."""
        place = share * (cumulated[-1] - 1)
        low, high = np.searchsorted(
            cumulated, [np.floor(place), np.ceil(place)], side="right"
        )
        part = place - np.floor(place)
        return float((1 - part) * self.sorted_kld[low] + part * self.sorted_kld[high])


def _chunks(tokens: Tokens) -> tuple[Chunk, ...]:
    counts = np.bincount(tokens.chunk)
    nll = tokens.per_chunk(tokens.nll_nats)
    if not len(tokens.kld_nats):
        return tuple(
            Chunk(n_tokens=int(count), nll_nats=float(total))
            for count, total in zip(counts, nll, strict=True)
        )
    columns = zip(
        counts,
        nll,
        tokens.per_chunk(tokens.base_nll_nats),
        tokens.per_chunk(tokens.kld_nats),
        tokens.per_chunk(tokens.is_same_top),
        strict=True,
    )
    return tuple(
        Chunk(
            n_tokens=int(count),
            nll_nats=float(own),
            base_nll_nats=float(base),
            kld_nats=float(divergence),
            n_same_top=int(same),
        )
        for count, own, base, divergence, same in columns
    )


def _flat(parts: Sequence[Sequence[float]]) -> Float64Array:
    return np.array([value for part in parts for value in part], np.float64)

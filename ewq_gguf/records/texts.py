"""Perplexity of texts and their divergence from a base, with the error of each."""

from __future__ import annotations

from ewq_gguf.records.base import Part


class Chunk(Part):
    """One window or document: the unit that paired statistics resample.

    Attributes:
        n_tokens: scored.
        nll_nats: their negative log-likelihood, summed.
        base_nll_nats: the base model's; None without one.
        kld_nats: divergence of the base's distributions from the file's, summed; None
            likewise.
        n_same_top: tokens where both find the same one likeliest; None likewise.
    """

    n_tokens: int
    nll_nats: float
    base_nll_nats: float | None = None
    kld_nats: float | None = None
    n_same_top: int | None = None


class Kld(Part):
    """KL(base || file) per token, nats; standard errors resample whole chunks.

    Attributes:
        kld_mean_nats: the mean.
        kld_median_nats: its distribution's quantiles, interpolated linearly.
        kld_p90_nats: 90 %.
        kld_p95_nats: 95 %.
        kld_p99_nats: 99 %.
        kld_p999_nats: 99.9 %.
        kld_max_nats: the largest; the larger the sample, the larger it is.
        top1_agreement: share of tokens where both find the same one likeliest.
        delta_p_rms: root mean square of the true token's change of probability.
        base_ppl: the base's perplexity on the same tokens.
        stderr: the standard error of each by its name; empty with one chunk.
    """

    kld_mean_nats: float
    kld_median_nats: float
    kld_p90_nats: float
    kld_p95_nats: float
    kld_p99_nats: float
    kld_p999_nats: float
    kld_max_nats: float
    top1_agreement: float
    delta_p_rms: float
    base_ppl: float
    stderr: dict[str, float]


class TextResult(Part):
    """One text's numbers.

    Attributes:
        name: the text's.
        n_tokens: scored.
        n_skipped: documents longer than the context, left out.
        ppl: perplexity.
        ppl_stderr: as llama-perplexity's: tokens taken as independent.
        kld: against the base; None without one.
        chunks: in the text's order.
    """

    name: str
    n_tokens: int
    n_skipped: int
    ppl: float
    ppl_stderr: float
    kld: Kld | None
    chunks: tuple[Chunk, ...]

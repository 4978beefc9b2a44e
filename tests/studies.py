"""Measured files of a study, made by hand."""

from __future__ import annotations

from ewq_gguf.experiments.study_record import StudyFile
from ewq_gguf.records import Chunk, Kld, TextResult


def study_file(label, klds, *, types=("BF16", "Q8_0", "Q4_K"), size=1000, n_tokens=10):
    """A file with these mean divergences of its windows, of `n_tokens` each."""
    mean = sum(klds) / len(klds)
    kld = Kld(
        kld_mean_nats=mean,
        kld_median_nats=mean,
        kld_p90_nats=mean,
        kld_p95_nats=mean,
        kld_p99_nats=mean,
        kld_p999_nats=mean,
        kld_max_nats=mean,
        top1_agreement=1.0,
        delta_p_rms=0.0,
        base_ppl=20.0,
        stderr={"kld_mean_nats": 0.00012},
    )
    chunks = tuple(
        Chunk(
            n_tokens=n_tokens,
            nll_nats=30.0,
            base_nll_nats=30.0,
            kld_nats=n_tokens * x,
            n_same_top=n_tokens,
        )
        for x in klds
    )
    return StudyFile(
        label=label,
        plan_sha256="a" * 64,
        layer_types=tuple(types),
        size_bytes=size,
        bpw=8.0,
        quality=TextResult(
            name="wikitext",
            n_tokens=n_tokens * len(klds),
            n_skipped=0,
            ppl=20.085,
            ppl_stderr=0.3,
            kld=kld,
            chunks=chunks,
        ),
    )

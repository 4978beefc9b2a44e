"""Probes: the divergence that quantising some tensors of a base costs."""

from __future__ import annotations

from ewq_gguf.records.base import Part

#: What a probe costs whose logits are no numbers: as much as no model that computes.
BROKEN_NATS = 20.0


class Probe(Part):
    """Tensors moved to where a type would put them, all others as the base has them.

    Attributes:
        name: the only one of this name among others.
        tensors: names of those that are moved.
        ggml_type: whose values they get.
    """

    name: str
    tensors: tuple[str, ...]
    ggml_type: str


class ProbePart(Part):
    """A probe that was measured.

    Attributes:
        name: the probe's.
        n_tokens: scored, of each window; none where the logits are no numbers.
        kld_nats: divergence of the base's distributions from the moved ones, summed,
            of each window.
    """

    name: str
    n_tokens: tuple[int, ...]
    kld_nats: tuple[float, ...]

    @property
    def kld_mean_nats(self) -> float:
        """Over all tokens."""
        if not self.n_tokens:
            return BROKEN_NATS
        return sum(self.kld_nats) / sum(self.n_tokens)

"""Measured cost of giving some tensors of a base the values that a type holds."""

from __future__ import annotations

from ewq_gguf.records.base import Part

#: Cost of a probe whose logits are no numbers: more than that of any model that works.
BROKEN_NATS = 20.0


class TypeProbe(Part):
    """Tensors with the values that a type holds, all others as the base has them.

    Attributes:
        name: identifies the probe among others.
        tensors: names of the tensors.
        ggml_type: type whose values they get.
    """

    name: str
    tensors: tuple[str, ...]
    ggml_type: str


class TypeProbePart(Part):
    """A probe that was measured.

    Attributes:
        name: name of the probe.
        n_tokens: scored tokens of each window; empty where the logits are no numbers.
        kld_nats: KL divergence from the base, summed over each window.
    """

    name: str
    n_tokens: tuple[int, ...]
    kld_nats: tuple[float, ...]

    @property
    def kld_mean_nats(self) -> float:
        """Mean over all tokens."""
        if not self.n_tokens:
            return BROKEN_NATS
        return sum(self.kld_nats) / sum(self.n_tokens)

"""How far candidate types move tensors, measured on sampled rows."""

from __future__ import annotations

from ewq_gguf.records.base import Part


class QuantError(Part):
    """One tensor in one type.

    Attributes:
        name: tensor and type: `blk.0.attn_q.weight Q4_K`.
        error: share of the weights' energy that the type loses, columns weighed by the
            importance matrix: sum I (w - w')^2 / sum I w^2.
        error_stderr: its standard error, for the rows that were not sampled.
        plain_error: the same share with all columns weighed alike.
        n_rows: sampled.
    """

    name: str
    error: float
    error_stderr: float
    plain_error: float
    n_rows: int

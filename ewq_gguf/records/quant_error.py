"""Errors of tensors in quantised types, measured on sampled rows."""

from __future__ import annotations

from ewq_gguf.records.base import Part


class QuantError(Part):
    """The error of one tensor in one type.

    Attributes:
        name: tensor and type, such as `blk.0.attn_q.weight Q4_K`.
        error: share of the weights' energy that the type loses, columns weighted by the
            importance matrix: sum I (w - w')^2 / sum I w^2.
        error_stderr: standard error of it, as not all rows were sampled.
        plain_error: the same share with equal weights of all columns.
        n_rows: number of sampled rows.
    """

    name: str
    error: float
    error_stderr: float
    plain_error: float
    n_rows: int

"""A plan as a table for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
from math import prod

from ewq_gguf.records import Plan

_COLUMNS = (
    "name", "role", "layer", "shape", "base_type", "ggml_type", "written_type",
    "size_bytes", "bpw",
)  # fmt: skip


def plan_csv(plan: Plan) -> str:
    """One row per tensor, in the file's order.

    `layer` is empty outside the layers; `shape` is slowest dimension first, `64x96`;
    `size_bytes` is without padding, and `bpw` the bits per weight of it.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for t in plan.tensors:
        writer.writerow(
            (
                t.name,
                t.role,
                "" if t.layer_idx is None else t.layer_idx,
                "x".join(map(str, t.shape)),
                t.base_type,
                t.ggml_type,
                t.written_type,
                t.size_bytes,
                f"{8 * t.size_bytes / prod(t.shape):.4f}",
            )
        )
    return text.getvalue()

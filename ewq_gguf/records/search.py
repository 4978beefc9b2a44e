"""What a search for the best file of a size tried, measured and chose."""

from __future__ import annotations

from typing import Literal

from ewq_gguf.records.base import Part
from ewq_gguf.records.scores import PairedMean


class SearchedFile(Part):
    """A file that came into question.

    Attributes:
        name: of it: `optimal 3`, `Q4_K_M`, `ewq`.
        kind: who chose its types.
        has_imatrix: whether it is made with the importance matrix.
        size_bytes: of the file.
        predicted_nats: its mean KL divergence before it was measured, with what earlier
            files had taught; that of a file without the matrix as if it had it.
        predicted_std_nats: standard deviation of the prediction's error.
        few_nats: measured on the first windows; None where it was not worth it.
        many_nats: measured on many windows; None where it did not come so far.
        tps: tokens per second that it generates, measured; None where none were asked
            for, or it did not come so far.
        difference: its divergence minus the chosen file's, over these windows; None for
            the chosen one itself, and where it did not come so far.
    """

    name: str
    kind: Literal["optimal", "preset", "plan"]
    has_imatrix: bool
    size_bytes: int
    predicted_nats: float
    predicted_std_nats: float
    few_nats: float | None = None
    many_nats: float | None = None
    tps: float | None = None
    difference: PairedMean | None = None


class Search(Part):
    """How the types of a plan were chosen: everything was measured, nothing believed.

    Attributes:
        text_sha256: of what the best were compared on; it calibrated nothing, and
            nothing was searched on it.
        n_few: windows that every file was measured on.
        n_many: windows that the best were.
        probe_type: that groups of tensors were moved to first, to see what they cost.
        n_probes: of them.
        floor_nats: what the rounding of activations costs the chosen file.
        prediction_error: median of |measured / predicted - 1| over the files that were
            measured; None where there was none.
        n_left_out: files no larger that the prediction ruled out, at three standard
            deviations.
        files: all that came into question, best first.
        chosen: name of the best.
    """

    text_sha256: str
    n_few: int
    n_many: int
    probe_type: str
    n_probes: int
    floor_nats: float
    prediction_error: float | None
    n_left_out: int
    files: tuple[SearchedFile, ...]
    chosen: str

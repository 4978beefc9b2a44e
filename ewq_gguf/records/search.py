"""The record of a search for the best file of a size: files tried and measured."""

from __future__ import annotations

from typing import Literal

from ewq_gguf.records.base import Part
from ewq_gguf.records.scores import PairedMean


class SearchedFile(Part):
    """A file that was a candidate.

    Attributes:
        name: label, such as `optimal 3`, `Q4_K_M` or `ewq`.
        kind: source of its types: proposed by the search, a preset, another plan.
        has_imatrix: whether it is made with the importance matrix.
        size_bytes: size of the file.
        predicted_nats: its mean KL divergence before it was measured, with what earlier
            files had taught; that of a file without the matrix as if it had it.
        predicted_std_nats: standard deviation of the prediction's error.
        few_nats: measured on few windows; None where the prediction ruled it out.
        many_nats: measured on many windows of another text; None for all but the best.
        tps: tokens per second that it generates, measured; None where none were asked
            for, and for all but the best.
        difference: its divergence minus the chosen file's, over many windows; None for
            the chosen one itself, and for all but the best.
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
    """The search that a plan's types come from.

    Attributes:
        text_sha256: SHA-256 of the text that the best were compared on; it was used
            neither for calibration nor for the search.
        n_few: number of windows that every file was measured on.
        n_many: number of windows that the best were measured on.
        probe_type: type that groups of tensors were probed in first.
        n_probes: number of probes.
        floor_nats: cost of rounding activations in the chosen file.
        prediction_error: median of |measured / predicted - 1| over the files that were
            measured; None where there was none.
        n_left_out: files no larger that the prediction ruled out, at three standard
            deviations.
        files: all candidates, best first.
        chosen: name of the best file.
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

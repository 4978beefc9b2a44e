"""A file in question: its plan, the prediction, and the measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ewq_gguf.bench.statistics import kld_difference
from ewq_gguf.optimal.predictor import Prediction
from ewq_gguf.records import Plan, SearchedFile, TextResult


@dataclass
class Candidate:
    """A file in question.

    Attributes:
        name: label, such as `optimal 3` or `Q4_K_M`.
        source: where its types come from.
        plan: plan of the file.
        prediction: divergence as predicted before it was measured.
        on_search_text: result of a few windows; None before, or where it failed.
        on_final_text: result of many windows of the final text, likewise.
        tps: tokens per second that it generates; None where that was not measured.
        is_slow: whether it is slower than the user asks for.
    """

    name: str
    source: Literal["optimal", "preset", "plan"]
    plan: Plan
    prediction: Prediction
    on_search_text: TextResult | None = None
    on_final_text: TextResult | None = None
    tps: float | None = None
    is_slow: bool = False

    @property
    def search_kld(self) -> float:
        """Mean divergence on the search text, nats; infinite where it is unknown."""
        return kld_nats(self.on_search_text)

    @property
    def rank(self) -> tuple[bool, float, float, float]:
        """Sorts the better file first: by the final text, the other, the prediction."""
        final = kld_nats(self.on_final_text)
        return self.is_slow, final, self.search_kld, self.prediction.kld_nats

    def record(self, best: Candidate) -> SearchedFile:
        """The candidate as the plan keeps it, beside the best one."""
        assert best.on_final_text is not None
        search, final = self.on_search_text, self.on_final_text
        return SearchedFile(
            name=self.name,
            kind=self.source,
            has_imatrix=self.plan.imatrix is not None,
            size_bytes=self.plan.totals.file_size_bytes,
            predicted_nats=self.prediction.kld_nats,
            predicted_std_nats=self.prediction.std_nats,
            few_nats=kld_nats(search) if search else None,
            many_nats=kld_nats(final) if final else None,
            tps=self.tps,
            difference=kld_difference(final, best.on_final_text)
            if final is not None and self is not best
            else None,
        )


def kld_nats(result: TextResult | None) -> float:
    """Mean divergence of a result, nats; infinite without one."""
    if result is None:
        return float("inf")
    assert result.kld is not None
    return result.kld.kld_mean_nats

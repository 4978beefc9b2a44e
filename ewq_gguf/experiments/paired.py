"""What the files of a study say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ewq_gguf.bench.statistics import spearman
from ewq_gguf.experiments.study_record import StatisticCorrelation, StudyFile


def kld_mean(file: StudyFile) -> float:
    """Nats per token, of the base's distributions from the file's."""
    assert file.quality.kld is not None
    return file.quality.kld.kld_mean_nats


def correlations(
    statistics: Sequence[Mapping[str, float]], klds: Sequence[float]
) -> tuple[StatisticCorrelation, ...]:
    """Of each statistic that every layer has with the layers' divergence.

    Args:
        statistics: of each layer, by name.
        klds: of each layer; nats.
    """
    names = [
        name for name in statistics[0] if all(name in known for known in statistics)
    ]
    return tuple(
        StatisticCorrelation(
            statistic=name,
            correlation=spearman([known[name] for known in statistics], klds),
        )
        for name in sorted(names)
    )


def rank_among(kld: float, others: Sequence[float]) -> int:
    """1 where none of the others is as low or lower."""
    return 1 + sum(other <= kld for other in others)

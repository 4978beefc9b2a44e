"""Comparisons of several models: paired tests of every two versions over the models.

Source: arXiv:2503.04704v2 section 6.3, table 13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from math import log

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.statistics import paired_t
from ewq_gguf.errors import UsageError, printable
from ewq_gguf.experiments.comparison_record import (
    ComparedFile,
    Comparison,
    Estimate,
    PairAcrossModels,
)

_NONE = "·"
_MAX_NAME = 24
#: Numbers that are tested over models; None where a file was not measured.
_MEASURES: dict[str, Callable[[ComparedFile], float | None]] = {
    "composite score": lambda row: _value(row.composite_score),
    "accuracy": lambda row: _value(row.accuracy),
    "ln perplexity": lambda row: log(row.ppl.value) if row.ppl else None,
    "KLD": lambda row: row.result.kld_mean_nats,  # the base has none from itself
}


def across_models(comparisons: Sequence[Comparison]) -> tuple[PairAcrossModels, ...]:
    """Every two versions that a model has both of, over the models.

    Args:
        comparisons: comparisons of different models.

    Raises:
        UsageError: two are of one model, which would count twice.
    """
    names = [comparison.model.name for comparison in comparisons]
    if len({c.model.fingerprint for c in comparisons}) < len(names):
        raise UsageError(
            STAGE,
            "compare show",
            f"two comparisons are of one model, among {', '.join(names)}",
            "give one comparison for each model",
        )
    if len({_conditions(comparison) for comparison in comparisons}) > 1:
        raise UsageError(
            STAGE,
            "compare show",
            "the comparisons were not measured alike: their texts, windows or "
            "questions differ",
            "measure all models with the same options",
        )
    versions = list(dict.fromkeys(row.name for c in comparisons for row in c.rows))
    measures = _MEASURES | {
        name: partial(_score, name)
        for comparison in comparisons
        for row in comparison.rows
        for name in row.scores
    }
    rows = {
        (i, row.name): row
        for i, comparison in enumerate(comparisons)
        for row in comparison.rows
    }
    return tuple(
        pair
        for measure, value_of in measures.items()
        for first, second in combinations(versions, 2)
        if (pair := _across(measure, value_of, first, second, names, rows))
    )


def _conditions(comparison: Comparison) -> tuple[object, ...]:
    """Texts, windows and questions; all models have to be measured on the same."""
    first = comparison.rows[0].result
    given = first.parameters
    texts = tuple(text.sha256 for text in given.texts)
    scores = tuple((name, s.data_sha256) for name, s in first.scores.items())
    cut = given.n_ctx, given.n_chunks, given.is_lines
    return texts, cut, given.mmlu_sha256, scores


def _across(
    measure: str,
    value_of: Callable[[ComparedFile], float | None],
    first: str,
    second: str,
    names: Sequence[str],
    rows: dict[tuple[int, str], ComparedFile],
) -> PairAcrossModels | None:
    models, ours, theirs = [], [], []
    for i, name in enumerate(names):
        if (i, first) in rows and (i, second) in rows:
            a, b = value_of(rows[i, first]), value_of(rows[i, second])
            if a is not None and b is not None:
                models.append(name)
                ours.append(a)
                theirs.append(b)
    if not models:
        return None
    return PairAcrossModels.model_validate(
        {
            "measure": measure,
            "first": first,
            "second": second,
            "models": tuple(models),
            "test": paired_t(ours, theirs),
        }
    )


def _score(name: str, row: ComparedFile) -> float | None:
    return _value(row.scores.get(name))


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def across_view(pairs: Sequence[PairAcrossModels]) -> RenderableType:
    """Versions over several models, a line per pair, for a rich console."""
    if not pairs:
        return Text("No version was measured on two models.")
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for heading in ("measure", "first", "second"):
        table.add_column(heading, overflow="fold", max_width=_MAX_NAME)
    for heading in ("models", "difference", "t", "p", "d"):
        table.add_column(heading, justify="right")
    for pair in pairs:
        test = pair.test
        cells = [_NONE] * 4
        if test is not None:
            cells = [f"{test.mean:+.4g}", f"{test.t:.3g}", f"{test.p:.2g}"]
            cells.append(f"{test.cohens_d:.2g}")
        names = (Text(printable(name)) for name in (pair.first, pair.second))
        table.add_row(pair.measure, *names, str(len(pair.models)), *cells)
    return Group(
        table,
        Text(),
        Text(
            "Differences are first minus second, over models; paired t-test, and "
            "Cohen's d with pooled population deviations, as in the paper's table 13. "
            "Lower is better, but of accuracy. Each p stands alone: of twenty such "
            "tests one is below 0.05 by chance."
        ),
    )

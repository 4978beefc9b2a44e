"""How well FastEWQ's classifiers answer for layers and models they have not seen.

Three questions, from easy to hard: rows the classifier learned (circular), 30 % of the
rows of the same models (their neighbours were learned), and whole models it has never
met, which is what `--policy fastewq` asks. Two baselines stand beside every figure: the
majority label, and the labels of the neighbouring layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from ewq_gguf.fastewq.classifier import (
    CLASSIFIERS,
    FEATURES,
    FOREST,
    SEED,
    Row,
    feature_importance,
    fit_and_score,
    split,
)
from ewq_gguf.fastewq.records import (
    ClassScores,
    Evaluation,
    FeatureWorth,
    LeftOutModel,
    Repeated,
    Scores,
    Training,
)
from ewq_gguf.significance import wilson

MAJORITY = "majority"
NEIGHBOURS = "neighbours"
NAMES = (*CLASSIFIERS, MAJORITY, NEIGHBOURS)
N_SPLITS = 20


def evaluate(rows: Sequence[Row], rows_sha256: str) -> Evaluation:
    """Every classifier and baseline, in and out of sample; takes about half a minute.

    Args:
        rows: labelled layers.
        rows_sha256: of them as CSV.

    Raises:
        ToolError: a library is missing.
    """
    splits = [split(rows, SEED + n) for n in range(N_SPLITS)]
    asked = [{name: score(name, *parts) for name in NAMES} for parts in splits]
    unseen = {name: score_left_out(name, rows) for name in NAMES}
    pairs = _adjacent_pairs(rows)
    importance = feature_importance(rows)
    return Evaluation(
        rows_sha256=rows_sha256,
        n_rows=len(rows),
        n_quantised=sum(row.quantized for row in rows),
        n_models=len({row.model_name for row in rows}),
        n_pairs=len(pairs),
        n_equal_pairs=sum(a.quantized == b.quantized for a, b in pairs),
        n_train=len(splits[0][0]),
        n_splits=N_SPLITS,
        split=tuple(scores_of(name, splits[0][1], asked[0][name]) for name in NAMES),
        repeated=tuple(
            _repeated(
                name,
                [
                    accuracy(parts[1], scores[name])
                    for parts, scores in zip(splits, asked, strict=True)
                ],
            )
            for name in NAMES
        ),
        left_out=tuple(scores_of(name, rows, unseen[name]) for name in NAMES),
        left_out_models=_whole_models(rows, unseen),
        in_sample=tuple(
            scores_of(name, rows, score(name, rows, rows)) for name in NAMES
        ),
        features=tuple(
            FeatureWorth(
                feature=feature,
                importance=importance[n],
                accuracy_without=_accuracy_without(n, splits),
            )
            for n, feature in enumerate(FEATURES)
        ),
    )


def training(rows: Sequence[Row], rows_sha256: str) -> Training:
    """What a forest learns from rows, in and out of sample.

    Args:
        rows: of the paper and of scans.
        rows_sha256: of them as CSV.

    Raises:
        ToolError: scikit-learn is missing.
    """
    own = [row for row in rows if row.source == "scan"]
    return Training(
        rows_sha256=rows_sha256,
        n_models=len({row.model_name for row in rows}),
        n_paper=len(rows) - len(own),
        n_own=len(own),
        own_models=tuple(sorted({row.model_name for row in own})),
        in_sample=scores_of(FOREST, rows, score(FOREST, rows, rows)),
        left_out=tuple(
            scores_of(name, rows, score_left_out(name, rows))
            for name in (FOREST, MAJORITY)
        ),
    )


def score(name: str, known: Sequence[Row], asked: Sequence[Row]) -> list[float]:
    """Fit a classifier or baseline on some rows and ask it about others.

    `majority` answers the more frequent label among `known`. `neighbours` answers the
    mean label of those layers exec_index - 1 and + 1 of the same model that are among
    `known`, and the majority where there are none or they disagree. It reads labels of
    the model asked about, which no classifier can for a new model.

    Returns:
        Per row of `asked`; above 0.5 means quantised.
    """
    if name in CLASSIFIERS:
        return fit_and_score(name, known, [row.features for row in asked])
    majority = float(2 * sum(row.quantized for row in known) > len(known))
    if name == MAJORITY:
        return [majority] * len(asked)
    labels = {row.key: row.quantized for row in known}
    answers = []
    for row in asked:
        beside = [
            labels[row.model_name, index]
            for index in (row.exec_index - 1, row.exec_index + 1)
            if (row.model_name, index) in labels
        ]
        answers.append(fmean(beside) if len(set(beside)) == 1 else majority)
    return answers


def score_left_out(name: str, rows: Sequence[Row]) -> list[float]:
    """Ask about each model with its rows left out, and all that have equal features.

    Only the baseline `neighbours` keeps them: it is nothing without the model's labels.
    """
    if name == NEIGHBOURS:
        return score(name, rows, rows)
    answers: dict[tuple[str, int], float] = {}
    for model in sorted({row.model_name for row in rows}):
        asked = [row for row in rows if row.model_name == model]
        same = {row.features for row in asked}
        known = [
            row for row in rows if row.model_name != model and row.features not in same
        ]
        answers |= zip(
            (row.key for row in asked), score(name, known, asked), strict=True
        )
    return [answers[row.key] for row in rows]


def accuracy(asked: Sequence[Row], scores: Sequence[float]) -> float:
    """Share of rows whose score is on the label's side of one half."""
    return fmean(
        (s > 0.5) == row.quantized for row, s in zip(asked, scores, strict=True)
    )


def scores_of(name: str, asked: Sequence[Row], scores: Sequence[float]) -> Scores:
    """The confusion matrix and all that follows from it."""
    counts = [[0, 0], [0, 0]]  # [label][answer]
    for row, s in zip(asked, scores, strict=True):
        counts[row.quantized][s > 0.5] += 1
    (tn, fp), (fn, tp) = counts
    # Neighbouring layers are not independent: in truth it is wider.
    low, high = wilson(tn + tp, len(asked))
    return Scores(
        name=name,
        tn=tn,
        fp=fp,
        fn=fn,
        tp=tp,
        accuracy=(tn + tp) / len(asked),
        accuracy_low=low,
        accuracy_high=high,
        raw=class_scores(tn, fn, fp),
        quantised=class_scores(tp, fp, fn),
        roc_auc=roc_auc([row.quantized for row in asked], scores),
    )


def class_scores(hit: int, wrongly_called: int, missed: int) -> ClassScores:
    """Precision, recall and F1 of one label; 0 where a share has no rows."""
    return ClassScores(
        precision=hit / (hit + wrongly_called) if hit else 0.0,
        recall=hit / (hit + missed) if hit else 0.0,
        f1=2 * hit / (2 * hit + wrongly_called + missed) if hit else 0.0,
        support=hit + missed,
    )


def roc_auc(labels: Sequence[int], scores: Sequence[float]) -> float | None:
    """Share of (quantised, raw) pairs that the scores order rightly; ties are half."""
    ones = np.array([s for s, label in zip(scores, labels, strict=True) if label])
    zeros = np.array([s for s, label in zip(scores, labels, strict=True) if not label])
    if not len(ones) or not len(zeros):
        return None
    higher = (ones[:, None] > zeros).sum() + 0.5 * (ones[:, None] == zeros).sum()
    return float(higher / (len(ones) * len(zeros)))


def _adjacent_pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    by_key = {row.key: row for row in rows}
    return [
        (row, by_key[row.model_name, row.exec_index + 1])
        for row in rows
        if (row.model_name, row.exec_index + 1) in by_key
    ]


def _whole_models(
    rows: Sequence[Row], unseen: dict[str, list[float]]
) -> tuple[LeftOutModel, ...]:
    """Models with every layer labelled; a single row says nothing about a model."""
    found = []
    for model in sorted({row.model_name for row in rows}):
        places = [n for n, row in enumerate(rows) if row.model_name == model]
        asked = [rows[n] for n in places]
        if len(asked) == asked[0].num_blocks:
            by_name = {
                name: accuracy(asked, [scores[n] for n in places])
                for name, scores in unseen.items()
            }
            found.append(
                LeftOutModel(model_name=model, n_rows=len(asked), accuracy=by_name)
            )
    return tuple(found)


def _repeated(name: str, accuracies: Sequence[float]) -> Repeated:
    low, high = np.quantile(accuracies, (0.025, 0.975))
    return Repeated(name=name, mean=fmean(accuracies), low=float(low), high=float(high))


def _accuracy_without(
    dropped: int, splits: Sequence[tuple[Sequence[Row], Sequence[Row]]]
) -> float:
    columns = [n for n in range(len(FEATURES)) if n != dropped]
    return fmean(
        accuracy(
            asked,
            fit_and_score(FOREST, known, [row.features for row in asked], columns),
        )
        for known, asked in splits
    )

"""How well FastEWQ's classifiers answer for layers and models they have not seen.

Three questions, from easy to hard: rows the classifier learned (circular), 30 % of the
rows of the same models (their neighbours were learned), and whole models it has never
met, which is what `--policy fastewq` asks. Two baselines stand beside every figure: the
majority label, and the labels of the neighbouring layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from ewq_gguf.bench.statistics import wilson
from ewq_gguf.fastewq.classifier import (
    CLASSIFIERS,
    FEATURES,
    FOREST,
    N_TREES,
    SEED,
    feature_importance,
    fit_and_score,
    split,
)
from ewq_gguf.fastewq.records import (
    ClassScores,
    Evaluation,
    FeatureImportance,
    LeftOutModel,
    Repeated,
    Scores,
    Training,
)
from ewq_gguf.fastewq.rows import Row, rows_sha256

MAJORITY = "majority"
NEIGHBOURS = "neighbours"
NAMES = (*CLASSIFIERS, MAJORITY, NEIGHBOURS)


@dataclass(frozen=True)
class Settings:
    """How much is fitted.

    Attributes:
        n_splits: random splits; the first is the one that is shown whole.
        n_trees: trees of the random forest.
    """

    n_splits: int = 20
    n_trees: int = N_TREES


DEFAULT = Settings()


def evaluate(rows: Sequence[Row], settings: Settings = DEFAULT) -> Evaluation:
    """Every classifier and baseline, in and out of sample; takes about half a minute.

    Raises:
        ToolError: a library is missing.
    """
    splits = [split(rows, SEED + n) for n in range(settings.n_splits)]
    held_out = [
        {name: score(name, *parts, settings) for name in NAMES} for parts in splits
    ]
    left_out = {name: score_left_out(name, rows, settings) for name in NAMES}
    pairs = _adjacent_pairs(rows)
    importance = feature_importance(rows, settings.n_trees)
    return Evaluation(
        rows_sha256=rows_sha256(rows),
        n_rows=len(rows),
        n_quantised=sum(row.quantized for row in rows),
        n_models=len({row.model_name for row in rows}),
        n_pairs=len(pairs),
        n_equal_pairs=sum(a.quantized == b.quantized for a, b in pairs),
        n_train=len(splits[0][0]),
        n_splits=settings.n_splits,
        split=tuple(scores_of(name, splits[0][1], held_out[0][name]) for name in NAMES),
        repeated=tuple(
            _repeated(
                name,
                [
                    accuracy(test, scores[name])
                    for (_, test), scores in zip(splits, held_out, strict=True)
                ],
            )
            for name in NAMES
        ),
        left_out=tuple(scores_of(name, rows, left_out[name]) for name in NAMES),
        left_out_models=_whole_models(rows, left_out),
        in_sample=tuple(
            scores_of(name, rows, score(name, rows, rows, settings)) for name in NAMES
        ),
        features=tuple(
            FeatureImportance(
                feature=feature,
                importance=importance[n],
                accuracy_without=_accuracy_without(n, splits, settings),
            )
            for n, feature in enumerate(FEATURES)
        ),
    )


def training(rows: Sequence[Row], settings: Settings = DEFAULT) -> Training:
    """How right the forest is that learns from rows, in and out of sample.

    Raises:
        ToolError: scikit-learn is missing.
    """
    own = [row for row in rows if row.source == "scan"]
    return Training(
        rows_sha256=rows_sha256(rows),
        n_models=len({row.model_name for row in rows}),
        n_paper=len(rows) - len(own),
        n_own=len(own),
        own_models=tuple(sorted({row.model_name for row in own})),
        in_sample=scores_of(FOREST, rows, score(FOREST, rows, rows, settings)),
        left_out=tuple(
            scores_of(name, rows, score_left_out(name, rows, settings))
            for name in (FOREST, MAJORITY)
        ),
    )


def score(
    name: str, train: Sequence[Row], test: Sequence[Row], settings: Settings = DEFAULT
) -> list[float]:
    """Fit a classifier or baseline on some rows and ask it about others.

    `majority` answers the more frequent label of `train`. `neighbours` answers the mean
    label of those layers exec_index - 1 and + 1 of the same model that are in `train`,
    and the majority where there are none or they disagree. It reads labels of the model
    asked about, which no classifier can for a new model.

    Returns:
        One number per row of `test`; above 0.5 means quantised.
    """
    if name in CLASSIFIERS:
        features = [row.features for row in test]
        return fit_and_score(name, train, features, n_trees=settings.n_trees)
    majority = float(2 * sum(row.quantized for row in train) > len(train))
    if name == MAJORITY:
        return [majority] * len(test)
    labels = {row.key: row.quantized for row in train}
    answers = []
    for row in test:
        beside = [
            labels[row.model_name, index]
            for index in (row.exec_index - 1, row.exec_index + 1)
            if (row.model_name, index) in labels
        ]
        answers.append(fmean(beside) if len(set(beside)) == 1 else majority)
    return answers


def leave_models_out(
    rows: Sequence[Row],
) -> Iterator[tuple[list[Row], list[Row]]]:
    """For each model the rows to train with, and the model's own to test.

    Rows of other models with features that the model has are left out too.
    """
    for model in sorted({row.model_name for row in rows}):
        test = [row for row in rows if row.model_name == model]
        twins = {row.features for row in test}
        others = (row for row in rows if row.model_name != model)
        yield [row for row in others if row.features not in twins], test


def score_left_out(
    name: str, rows: Sequence[Row], settings: Settings = DEFAULT
) -> list[float]:
    """Ask about each model with its rows left out.

    Only the baseline `neighbours` keeps them: it is nothing without the model's labels.
    """
    if name == NEIGHBOURS:
        return score(name, rows, rows)
    answers: dict[tuple[str, int], float] = {}
    for train, test in leave_models_out(rows):
        scores = score(name, train, test, settings)
        answers |= zip((row.key for row in test), scores, strict=True)
    return [answers[row.key] for row in rows]


def accuracy(rows: Sequence[Row], scores: Sequence[float]) -> float:
    """Share of rows whose score is on the label's side of one half."""
    return fmean(
        (s > 0.5) == row.quantized for row, s in zip(rows, scores, strict=True)
    )


def scores_of(name: str, rows: Sequence[Row], scores: Sequence[float]) -> Scores:
    """The confusion matrix, and the figures that follow from it."""
    from sklearn.metrics import classification_report, confusion_matrix, roc_auc_score

    labels = [row.quantized for row in rows]
    answers = [int(s > 0.5) for s in scores]
    (tn, fp), (fn, tp) = confusion_matrix(labels, answers, labels=[0, 1]).tolist()
    report = classification_report(
        labels, answers, labels=[0, 1], output_dict=True, zero_division=0
    )
    # Neighbouring layers are not independent: in truth it is wider.
    low, high = wilson(tn + tp, len(rows))
    return Scores(
        name=name,
        tn=tn,
        fp=fp,
        fn=fn,
        tp=tp,
        accuracy=(tn + tp) / len(rows),
        accuracy_low=low,
        accuracy_high=high,
        raw=_class_scores(report["0"]),
        quantised=_class_scores(report["1"]),
        roc_auc=float(roc_auc_score(labels, scores)) if len(set(labels)) > 1 else None,
    )


def _class_scores(report: Mapping[str, float]) -> ClassScores:
    return ClassScores(
        precision=report["precision"],
        recall=report["recall"],
        f1=report["f1-score"],
        support=int(report["support"]),
    )


def _adjacent_pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    by_key = {row.key: row for row in rows}
    return [
        (row, by_key[row.model_name, row.exec_index + 1])
        for row in rows
        if (row.model_name, row.exec_index + 1) in by_key
    ]


def _whole_models(
    rows: Sequence[Row], left_out: dict[str, list[float]]
) -> tuple[LeftOutModel, ...]:
    """Models with every layer labelled; a single row says nothing about a model."""
    models = []
    for model in sorted({row.model_name for row in rows}):
        places = [n for n, row in enumerate(rows) if row.model_name == model]
        layers = [rows[n] for n in places]
        if len(layers) == layers[0].num_blocks:
            by_name = {
                name: accuracy(layers, [scores[n] for n in places])
                for name, scores in left_out.items()
            }
            models.append(
                LeftOutModel(model_name=model, n_rows=len(layers), accuracy=by_name)
            )
    return tuple(models)


def _repeated(name: str, accuracies: Sequence[float]) -> Repeated:
    low, high = np.quantile(accuracies, (0.025, 0.975))
    return Repeated(name=name, mean=fmean(accuracies), low=float(low), high=float(high))


def _accuracy_without(
    dropped: int,
    splits: Sequence[tuple[Sequence[Row], Sequence[Row]]],
    settings: Settings,
) -> float:
    columns = [n for n in range(len(FEATURES)) if n != dropped]
    return fmean(
        accuracy(
            test,
            fit_and_score(
                FOREST,
                train,
                [row.features for row in test],
                columns=columns,
                n_trees=settings.n_trees,
            ),
        )
        for train, test in splits
    )

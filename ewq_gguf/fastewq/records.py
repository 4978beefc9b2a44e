"""Records of `ewq fastewq`: how well classifiers answer for rows they have not seen."""

from __future__ import annotations

from typing import Literal

from ewq_gguf.records.base import Part, Record


class ClassScores(Part):
    """How well one label is found.

    Attributes:
        precision: share of those called so that are; 0 where none is.
        recall: share of those that are so that are called so; 0 where none is.
        f1: their harmonic mean.
        support: rows that are so.
    """

    precision: float
    recall: float
    f1: float
    support: int


class Scores(Part):
    """One classifier or baseline on some rows; positive means quantised.

    Attributes:
        name: a classifier's, `majority` or `neighbours`.
        tn: raw layers called raw.
        fp: raw layers called quantised.
        fn: quantised layers called raw.
        tp: quantised layers called quantised.
        accuracy: share of rows.
        accuracy_low: lower end of Wilson's 95 % interval.
        accuracy_high: upper end of it.
        raw: the label 0.
        quantised: the label 1.
        roc_auc: None where only one label occurs.
    """

    name: str
    tn: int
    fp: int
    fn: int
    tp: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    raw: ClassScores
    quantised: ClassScores
    roc_auc: float | None


class Repeated(Part):
    """Accuracy over many splits.

    Attributes:
        name: a classifier's or baseline's.
        mean: mean accuracy.
        low: 2.5th percentile.
        high: 97.5th percentile.
    """

    name: str
    mean: float
    low: float
    high: float


class LeftOutModel(Part):
    """One model, asked of classifiers that have not seen it.

    Attributes:
        model_name: Hub id, or a folder's name.
        n_rows: its labelled layers.
        accuracy: by classifier and baseline.
    """

    model_name: str
    n_rows: int
    accuracy: dict[str, float]


class FeatureImportance(Part):
    """One feature's part in the random forest.

    Attributes:
        feature: its name.
        importance: mean decrease in impurity, fitted on all rows; a share of 1.
        accuracy_without: mean over the same splits, with the feature dropped.
    """

    feature: str
    importance: float
    accuracy_without: float


class Evaluation(Record):
    """Six classifiers and two baselines on the same rows.

    Attributes:
        rows_sha256: SHA-256 of the rows as CSV.
        n_rows: labelled layers.
        n_quantised: those with label 1.
        n_models: they are from.
        n_pairs: adjacent layers of one model that both have labels.
        n_equal_pairs: those with the same label.
        n_train: rows of the one split.
        n_splits: splits of `repeated`.
        split: held-out 30 % of the one split.
        repeated: accuracies over all splits, the one among them.
        left_out: every row asked of classifiers without its model, together.
        left_out_models: the same for each model with all its layers.
        in_sample: fitted on all rows and asked about them: circular.
        features: importance of each in the random forest.
    """

    schema_name: Literal["ewq.fastewq_evaluation"] = "ewq.fastewq_evaluation"
    schema_version: Literal[1] = 1

    rows_sha256: str
    n_rows: int
    n_quantised: int
    n_models: int
    n_pairs: int
    n_equal_pairs: int
    n_train: int
    n_splits: int
    split: tuple[Scores, ...]
    repeated: tuple[Repeated, ...]
    left_out: tuple[Scores, ...]
    left_out_models: tuple[LeftOutModel, ...]
    in_sample: tuple[Scores, ...]
    features: tuple[FeatureImportance, ...]


class Training(Record):
    """The rows that policy `fastewq` learns from.

    Attributes:
        rows_sha256: SHA-256 of the rows as CSV.
        n_models: all rows are from.
        n_paper: rows of the paper.
        n_own: rows of the user's scans.
        own_models: these are from.
        in_sample: fitted on all rows and asked about them: circular.
        left_out: the forest and the majority, without the model asked about.
    """

    schema_name: Literal["ewq.fastewq_training"] = "ewq.fastewq_training"
    schema_version: Literal[1] = 1

    rows_sha256: str
    n_models: int
    n_paper: int
    n_own: int
    own_models: tuple[str, ...]
    in_sample: Scores
    left_out: tuple[Scores, ...]


class Added(Record):
    """Rows of scans, as they were added to the user's own.

    Attributes:
        path: the file of the user's rows, below the cache.
        n_rows: now in it.
        models: labelled layers and quantised ones of each model added.
    """

    schema_name: Literal["ewq.fastewq_added"] = "ewq.fastewq_added"
    schema_version: Literal[1] = 1

    path: str
    n_rows: int
    models: dict[str, tuple[int, int]]

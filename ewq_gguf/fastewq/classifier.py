"""FastEWQ's classifiers: which layers to quantise, from the model's shape alone.

A classifier sees three numbers of a layer and answers whether EWQ would quantise it.
The paper names no hyperparameters, so these are the libraries' own.

Source: arXiv:2503.04704 section 4.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ewq_gguf.errors import ToolError
from ewq_gguf.fastewq.rows import STAGE, Features, Row

#: Seed of variant `train`'s split, and of every classifier.
SEED = 0
TRAIN_SHARE = 0.7
FEATURES = ("num_blocks", "exec_index", "num_parameters")
CLASSIFIERS = (
    "logistic regression", "SVM", "random forest", "XGB", "kNN",
    "Gaussian naive Bayes",
)  # fmt: skip
FOREST = "random forest"
#: Double the library's: another seed then moves fewer layers across one half.
N_TREES = 200
Variant = Literal["full", "train"]


@dataclass(frozen=True)
class Selection:
    """The forest's answer about one layer.

    Attributes:
        quantise: whether to.
        probability: the share of the forest's votes for it.
    """

    quantise: bool
    probability: float


def split(rows: Sequence[Row], seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """70 % to train with and 30 % to test, with the same share of quantised layers.

    Layers with equal features stay together: two models of one shape would otherwise
    put the same question on both sides.
    """
    groups: dict[Features, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.features].append(row)
    by_label: dict[int, list[list[Row]]] = defaultdict(list)
    for group in groups.values():
        by_label[int(2 * sum(r.quantized for r in group) > len(group))].append(group)
    rng = np.random.default_rng(seed)
    train: list[Row] = []
    test: list[Row] = []
    for label in sorted(by_label):
        members = by_label[label]
        n_train = round(TRAIN_SHARE * len(members))
        for rank, i in enumerate(rng.permutation(len(members))):
            (train if rank < n_train else test).extend(members[i])
    return tuple(train), tuple(test)


def select_layers(
    rows: Sequence[Row], features: Sequence[Features], variant: Variant = "full"
) -> tuple[Selection, ...]:
    """The layers that the random forest would quantise.

    Args:
        rows: to learn from, of both labels.
        features: (num_blocks, exec_index, num_parameters) of each layer asked about.
        variant: `full` learns from all rows, `train` from 70 % of them.

    Returns:
        One answer per layer, the same on every call.

    Raises:
        ToolError: scikit-learn is missing.
    """
    if not features:
        return ()
    train = split(rows, SEED)[0] if variant == "train" else rows
    scores = fit_and_score(FOREST, train, features)
    return tuple(Selection(quantise=s > 0.5, probability=s) for s in scores)


def fit_and_score(
    name: str,
    rows: Sequence[Row],
    features: Sequence[Features],
    *,
    columns: Sequence[int] = (0, 1, 2),
    n_trees: int = N_TREES,
) -> list[float]:
    """Fit a classifier and ask it: above 0.5 means quantise.

    Probabilities in [0, 1], but for the SVM, whose margins are shifted by 0.5.

    Args:
        name: one of CLASSIFIERS.
        rows: to learn from, of both labels.
        features: to answer for.
        columns: the features used, as indices of FEATURES.
        n_trees: trees of the random forest.

    Raises:
        ToolError: a library is missing.
    """
    model = _fitted(name, rows, columns, n_trees)
    test = np.array(features, dtype=np.float64)[:, columns]
    if name == "SVM":
        return [float(margin) + 0.5 for margin in model.decision_function(test)]
    return [float(p) for p in model.predict_proba(test)[:, 1]]


def feature_importance(rows: Sequence[Row], n_trees: int = N_TREES) -> list[float]:
    """The forest's mean decrease in impurity by feature; sums to 1.

    Raises:
        ToolError: scikit-learn is missing.
    """
    forest = _fitted(FOREST, rows, range(len(FEATURES)), n_trees)[-1]
    return [float(share) for share in forest.feature_importances_]


def _fitted(
    name: str, rows: Sequence[Row], columns: Sequence[int], n_trees: int
) -> Any:
    """StandardScaler and a classifier, fitted: seeded, on one thread."""
    try:
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = make_pipeline(StandardScaler(), _classifier(name, n_trees))
    except ImportError as error:
        raise ToolError(
            STAGE,
            error.name,
            "is not installed",
            "pip install 'ewq-gguf[fastewq]'",
        ) from error
    features = np.array([row.features for row in rows], dtype=np.float64)
    model.fit(features[:, columns], np.array([row.quantized for row in rows]))
    return model


def _classifier(name: str, n_trees: int) -> Any:
    if name == "XGB":
        from xgboost import XGBClassifier

        return XGBClassifier(random_state=SEED, n_jobs=1)
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    classifiers: dict[str, Any] = {
        "logistic regression": LogisticRegression(random_state=SEED),
        "SVM": SVC(kernel="rbf", random_state=SEED),
        FOREST: RandomForestClassifier(n_trees, random_state=SEED, n_jobs=1),
        "kNN": KNeighborsClassifier(n_jobs=1),
        "Gaussian naive Bayes": GaussianNB(),
    }
    return classifiers[name]

"""FastEWQ: which layers to quantise, from the model's shape alone.

A classifier sees three numbers of a layer and answers whether EWQ would quantise it.
The paper's 700 labelled rows were never published; 147 of them can be derived from its
tables (docs/ewq-and-fastewq.md). It names no hyperparameters, so these are the
libraries' own.

Source: arXiv:2503.04704 section 4.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np

from ewq_gguf.errors import InputError, ToolError
from ewq_gguf.plan.ewq import decide, thresholds
from ewq_gguf.plan.model_tensors import check_whole
from ewq_gguf.records import LayoutTensor, Scan, TensorScan
from ewq_gguf.tensor_names import layer_idx

STAGE = "fastewq"
#: Of the split of variant `train`, and of every classifier.
SEED = 0
TRAIN_SHARE = 0.7
FEATURES = ("num_blocks", "exec_index", "num_parameters")
CLASSIFIERS = (
    "logistic regression", "SVM", "random forest", "XGB", "kNN",
    "Gaussian naive Bayes",
)  # fmt: skip
FOREST = "random forest"
Variant = Literal["full", "train"]
Features = tuple[int, int, int]

#: Double the library's: another seed then moves fewer layers across one half.
_N_TREES = 200
_LABELS = ("4-bit", "8-bit", "raw")
#: Of one layer; a classifier's numbers stay finite.
_MOST_PARAMETERS = 10**15


@dataclass(frozen=True)
class Row:
    """One labelled layer.

    Attributes:
        model_name: Hub id, or a folder's name.
        num_blocks: transformer layers of the model.
        exec_index: layer_idx + 2; the token embedding is 1.
        num_parameters: of the layer, norms and biases included.
        quantization_type: EWQ's decision: `raw`, `8-bit` or `4-bit`.
        source: `table 2` or `table 8` of the paper, or `scan`.
        original_num_parameters: as printed, where the paper's own number is wrong.
    """

    model_name: str
    num_blocks: int
    exec_index: int
    num_parameters: int
    quantization_type: str
    source: str
    original_num_parameters: int | None = None

    @property
    def quantized(self) -> int:
        """The label: 1 for a quantised layer, 0 for a raw one."""
        return int(self.quantization_type != "raw")

    @property
    def features(self) -> Features:
        """What a classifier sees, in the order of FEATURES."""
        return self.num_blocks, self.exec_index, self.num_parameters

    @property
    def key(self) -> tuple[str, int]:
        """Which layer of which model."""
        return self.model_name, self.exec_index


@dataclass(frozen=True)
class Selection:
    """A layer's answer.

    Attributes:
        quantise: whether to.
        probability: the share of the forest's votes for it.
    """

    quantise: bool
    probability: float


def parse_rows(table: Iterable[Mapping[str, str]], name: str) -> tuple[Row, ...]:
    """Rows from a CSV file's, checked.

    Args:
        table: as csv.DictReader gives them.
        name: of the file, for errors.

    Raises:
        InputError: a column is missing, a number is none, or the label contradicts
            the type.
    """
    return tuple(_parse_row(values, f"{name}:{n}") for n, values in enumerate(table, 2))


def _parse_row(values: Mapping[str, str], where: str) -> Row:
    try:
        row = Row(
            model_name=values["model_name"],
            num_blocks=int(values["num_blocks"]),
            exec_index=int(values["exec_index"]),
            num_parameters=int(values["num_parameters"]),
            quantization_type=values["quantization_type"],
            source=values["source"],
            original_num_parameters=int(values["original_num_parameters"] or 0) or None,
        )
        is_sound = (
            row.quantization_type in _LABELS
            and int(values["quantized"]) == row.quantized
            and 2 <= row.exec_index <= row.num_blocks + 1
            and 0 < row.num_parameters < _MOST_PARAMETERS
        )
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound:
        raise InputError(
            STAGE,
            where,
            "is not a labelled layer",
            "delete the file, and run `ewq fastewq add`, then `train`, again",
        )
    return row


def rows_of_scan(scan: Scan) -> tuple[Row, ...]:
    """A scanned model's layers, labelled by EWQ with the paper's defaults.

    Raises:
        InputError: the scan is a part, has no layers, or another epsilon.
    """
    model = scan.model
    check_whole(scan)
    if not scan.layers:
        raise InputError(
            STAGE, model.name, "the model has no layers", "scan another one"
        )
    if scan.measures.epsilon != 0.01:
        raise InputError(
            STAGE,
            model.name,
            f"was scanned with epsilon {scan.measures.epsilon:g}, the labels need 0.01",
            "scan again without --epsilon",
        )
    features = layer_features(scan.tensors, model.n_layers)
    labels = _ewq_labels([layer.softmax_entropy_nats for layer in scan.layers])
    return tuple(
        Row(
            model_name=model.hub_id or model.name,
            num_blocks=model.n_layers,
            exec_index=features[layer.layer_idx][1],
            num_parameters=features[layer.layer_idx][2],
            quantization_type=label,
            source="scan",
        )
        for layer, label in zip(scan.layers, labels, strict=True)
    )


def _ewq_labels(entropies: Sequence[float]) -> list[str]:
    limits = thresholds(entropies, 1.0)
    return [_LABELS[decide(entropy, limits, 3)] for entropy in entropies]


def layer_features(
    tensors: Iterable[LayoutTensor | TensorScan], n_blocks: int
) -> dict[int, Features]:
    """What a classifier sees of each layer, by layer_idx, from shapes alone."""
    sizes: Counter[int] = Counter()
    for tensor in tensors:
        idx = layer_idx(tensor.name)
        if idx is not None:
            sizes[idx] += prod(tensor.shape)
    return {idx: (n_blocks, idx + 2, sizes[idx]) for idx in sorted(sizes)}


def merge_rows(*sets: Iterable[Row]) -> tuple[Row, ...]:
    """Rows of several sets, sorted; of one layer the last set's row counts."""
    merged = {row.key: row for rows in sets for row in rows}
    return tuple(merged[key] for key in sorted(merged))


def split(rows: Sequence[Row], seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """70 % to train with and 30 % to ask, with the same share of quantised layers.

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
    asked: list[Row] = []
    for label in sorted(by_label):
        members = by_label[label]
        n_train = round(TRAIN_SHARE * len(members))
        for rank, i in enumerate(rng.permutation(len(members))):
            (train if rank < n_train else asked).extend(members[i])
    return tuple(train), tuple(asked)


def select_layers(
    rows: Sequence[Row], features: Sequence[Features], variant: Variant = "full"
) -> tuple[Selection, ...]:
    """Which layers the random forest would quantise.

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
    learned = split(rows, SEED)[0] if variant == "train" else rows
    scores = fit_and_score(FOREST, learned, features)
    return tuple(Selection(quantise=s > 0.5, probability=s) for s in scores)


def fit_and_score(
    name: str,
    rows: Sequence[Row],
    features: Sequence[Features],
    columns: Sequence[int] = (0, 1, 2),
) -> list[float]:
    """Fit a classifier and ask it: above 0.5 means quantise.

    Probabilities in [0, 1], but for the SVM, whose margins are shifted by 0.5.

    Args:
        name: of CLASSIFIERS.
        rows: to learn from, of both labels.
        features: to answer for.
        columns: the features used, as indices of FEATURES.

    Raises:
        ToolError: a library is missing.
    """
    model = _pipeline(name)
    known = np.array([row.features for row in rows], dtype=np.float64)[:, columns]
    asked = np.array(features, dtype=np.float64)[:, columns]
    model.fit(known, np.array([row.quantized for row in rows]))
    if name == "SVM":
        return [float(margin) + 0.5 for margin in model.decision_function(asked)]
    return [float(p) for p in model.predict_proba(asked)[:, 1]]


def feature_importance(rows: Sequence[Row]) -> list[float]:
    """The forest's mean decrease in impurity by feature; sums to 1.

    Raises:
        ToolError: scikit-learn is missing.
    """
    model = _pipeline(FOREST)
    model.fit(
        np.array([row.features for row in rows], dtype=np.float64),
        np.array([row.quantized for row in rows]),
    )
    return [float(share) for share in model[-1].feature_importances_]


def _pipeline(name: str) -> Any:
    """StandardScaler and a classifier: seeded, on one thread."""
    try:
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        return make_pipeline(StandardScaler(), _classifier(name))
    except ImportError as error:
        raise ToolError(
            STAGE,
            error.name,
            "is not installed",
            "pip install 'ewq-gguf[fastewq]'",
        ) from error


def _classifier(name: str) -> Any:
    if name == "XGB":
        from xgboost import XGBClassifier

        return XGBClassifier(random_state=SEED, n_jobs=1)
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    made: dict[str, Any] = {
        "logistic regression": LogisticRegression(random_state=SEED),
        "SVM": SVC(kernel="rbf", random_state=SEED),
        FOREST: RandomForestClassifier(_N_TREES, random_state=SEED, n_jobs=1),
        "kNN": KNeighborsClassifier(n_jobs=1),
        "Gaussian naive Bayes": GaussianNB(),
    }
    return made[name]

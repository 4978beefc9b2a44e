"""The paper's rows and classifiers, recomputed: sections 4 and 6.3, tables 2, 3, 5, 13.

Source: arXiv:2503.04704v2. Its "block" is a layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import correlation, fmean

from ewq_gguf.bench.statistics import composite_score, paired_t
from ewq_gguf.experiments.paper_report import Check, Relation, Table, check
from ewq_gguf.fastewq.rows import Row

#: Shapes of layers, by model.
Shapes = Mapping[str, Mapping[str, str]]
#: Latent attention of DeepSeek-V2-Lite: q, kv_a, kv_b, o and three norms. Its first
#: layer is dense; the others have 64 experts, 2 shared ones and a router.
_MLA = 2048 * (3072 + 576) + 512 * 4096 + 2048 * 2048 + 2 * 2048 + 512
_DEEPSEEK = {
    "deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct": _MLA + 3 * 10944 * 2048,
    "deepseek-ai/DeepSeek-V2-Lite": _MLA + 66 * 3 * 1408 * 2048 + 64 * 2048,
}


def layer_parameters(shapes: Shapes, model: str) -> int:
    """Parameters of a layer of table 2, norms and biases included."""
    if model in _DEEPSEEK:
        return _DEEPSEEK[model]
    hidden, q, kv, ffn, n_vector = (
        int(shapes[model][key]) for key in ("hidden", "q", "kv", "ffn", "n_vector")
    )
    return hidden * (2 * q + 2 * kv + 3 * ffn) + n_vector


def _printed_parameters(row: Row) -> int:
    return row.original_num_parameters or row.num_parameters


def check_rows(rows: Sequence[Row], shapes: Shapes) -> Iterator[Check]:
    """Table 2, and what sections 4.1, 4.3 and 4.4 say of the rows."""
    for row in rows:
        if row.source == "table 2":
            what = f"{row.model_name} num_parameters"
            computed = layer_parameters(shapes, row.model_name)
            yield check("table 2", what, _printed_parameters(row), computed)
    yield from _dataset(rows)


def check_classifiers(tables: Mapping[int, Table]) -> Iterator[Check]:
    """Tables 3 and 5: the classification report and the confusion matrices."""
    yield from _table3(tables[3], tables[5])
    yield from _table5(tables[3], tables[5])


def _dataset(rows: Sequence[Row]) -> Iterator[Check]:
    n_rows, raw, quantised, n_test = 700, 407, 293, 210
    models = {row.model_name: row for row in rows if row.source == "table 2"}.values()
    layers = [row for row in models for _ in range(row.num_blocks)]
    rho = correlation(
        [row.num_blocks for row in layers], [_printed_parameters(row) for row in layers]
    )
    middle = 100 * fmean(50 <= row.num_blocks <= 100 for row in models)
    for section, what, printed, computed, tolerance in (
        ("4.1", "rows: raw and quantised together", n_rows, raw + quantised, 0),
        ("4.1", "quantised, %", 42, 100 * quantised / n_rows, 0.5),
        ("4.1", "raw, %", 58, 100 * raw / n_rows, 0.5),
        ("4.1", "rows: layers of table 2's models together", n_rows, len(layers), 0),
        ("4.1", "correlation of num_parameters and num_blocks, over those layers",
         0.93, rho, 0.005),
        ("4.1", "most models have 50 to 100 layers: share of table 2's, %",
         50, middle, 0),
        ("4.3", "importances together, %", 100, 66.4 + 19.0 + 14.6, 0.15),
        ("4.3", "accuracy of the whole forest, % (computed: table 3's)", 89.3, 80, 0.5),
        ("4.4", "rows to evaluate, 30 %", n_test, 0.3 * n_rows, 0),
        ("4.4", "quantised rows of the split, if it was stratified",
         89, n_test * quantised / n_rows, 0.5),
    ):  # fmt: skip
        relation: Relation = "<=" if what.startswith("most") else "="
        yield check(section, what, printed, computed, tolerance, relation)


def _table3(report: Table, confusion: Table) -> Iterator[Check]:
    """Every figure of the report from table 5, its two columns swapped."""
    matrices = {row["classifier"]: row for row in confusion}
    for row in report:
        matrix = matrices[row["classifier"]]
        tn, fp, fn, tp = (int(matrix[key]) for key in ("tn", "fn", "fp", "tp"))
        n = tn + fp + fn + tp
        zero, one = _class_scores(tn, fn, fp), _class_scores(tp, fp, fn)
        weights, support = {
            "0": ((1.0, 0.0), tn + fp),
            "1": ((0.0, 1.0), tp + fn),
            "Macro avg": ((0.5, 0.5), n),
            "Weighted avg": (((tn + fp) / n, (tp + fn) / n), n),
            "Accuracy": ((0.0, 0.0), n),
        }[row["class"]]
        what = f"{row['classifier']} {row['class']}"
        if row["class"] == "Accuracy":
            yield check("table 3", what, float(row["f1"]), (tn + tp) / n, 0.005)
        else:
            for key in ("precision", "recall", "f1"):
                value = weights[0] * zero[key] + weights[1] * one[key]
                yield check("table 3", f"{what} {key}", float(row[key]), value, 0.005)
        yield check("table 3", f"{what} support", int(row["support"]), support)


def _class_scores(right: int, wrongly_called: int, missed: int) -> dict[str, float]:
    """Precision, recall and F1 of one label."""
    return {
        "precision": right / (right + wrongly_called),
        "recall": right / (right + missed),
        "f1": 2 * right / (2 * right + wrongly_called + missed),
    }


def _table5(report: Table, confusion: Table) -> Iterator[Check]:
    """Table 5 with its columns as they are named, and the text about it."""
    precision = {
        row["classifier"]: row["precision"] for row in report if row["class"] == "0"
    }
    for row in confusion:
        name, tn, fn = row["classifier"], int(row["tn"]), int(row["fn"])
        what = f"{name} precision of class 0, columns as named"
        printed = float(precision[name])
        yield check("table 5", what, printed, tn / (tn + fn), 0.005)
    by_name = {row["classifier"]: row for row in confusion}
    fewer = int(by_name["XGB"]["tp"]) - int(by_name["random forest"]["tp"])
    what = "quantised layers that the forest finds fewer than XGB"
    yield check("table 5", what, 1, fewer)
    svm, regression = by_name["SVM"], by_name["logistic regression"]
    n_differing = sum(svm[key] != regression[key] for key in ("tn", "fn", "fp", "tp"))
    what = "counts in which SVM and logistic regression differ"
    yield check("4.4", what, 0, n_differing)


def check_scores(tables: Mapping[int, Table]) -> Iterator[Check]:
    """Table 13: composite scores ln(perplexity) - accuracy of table 7, in pairs."""
    scores: dict[str, list[float]] = defaultdict(list)
    for row in tables[7]:
        scores[row["variant"]].append(
            composite_score(float(row["mmlu_perplexity"]), float(row["mmlu_accuracy"]))
        )
    for row in tables[13]:
        ours, theirs = (
            [score for variant in row[side].split(" + ") for score in scores[variant]]
            for side in ("fast", "fast_train")
        )
        test = paired_t(ours, theirs)
        assert test is not None  # the shipped scores differ
        difference = fmean(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        for key, computed in (
            ("abs_diff", difference), ("t", test.t), ("p", test.p), ("d", test.cohens_d)
        ):  # fmt: skip
            half_digit = 0.5 * 10.0 ** -len(row[key].partition(".")[2])
            what = f"{row['fast']}: {key}"
            yield check("table 13", what, float(row[key]), computed, half_digit)

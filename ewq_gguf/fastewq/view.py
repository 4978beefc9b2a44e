"""FastEWQ's figures in 80 columns, ours beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ewq_gguf import data
from ewq_gguf.errors import printable
from ewq_gguf.fastewq.records import (
    Added,
    ClassScores,
    Evaluation,
    Scores,
    Training,
)
from ewq_gguf.report.text import number_table

#: A column's heading for each name, where eight stand side by side.
_SHORT = {
    "logistic regression": "LR", "SVM": "SVM", "random forest": "RF", "XGB": "XGB",
    "kNN": "kNN", "Gaussian naive Bayes": "NB", "majority": "maj.",
    "neighbours": "neig.",
}  # fmt: skip


def evaluation_view(result: Evaluation) -> RenderableType:
    """The whole view, for a rich console."""
    parts: list[RenderableType] = [
        _head(result),
        _accuracies(result),
        _confusions(
            "Held out: 30 % of the rows, below each the paper's tables 3 and 5",
            result.split,
            _paper_scores(),
        ),
        _confusions("Models left out, all rows together", result.left_out, {}),
        _models(result),
        _features(result),
        Text(verdict(result.left_out, result.n_models)),
    ]
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def training_view(result: Training) -> RenderableType:
    """The rows that plans learn from now, for a rich console."""
    table = Table.grid(padding=(0, 2))
    table.add_row("rows", f"{result.n_paper} of the paper, {result.n_own} of your own")
    for model in result.own_models:
        table.add_row("", Text(printable(model)))
    table.add_row("in sample", f"{_share(result.in_sample)}, circular")
    for scores in result.left_out:
        table.add_row("models left out", f"{_share(scores)}, {scores.name}")
    return Group(table, Text(), Text(verdict(result.left_out, result.n_models)))


def added_view(result: Added) -> RenderableType:
    """The rows that were added, for a rich console."""
    table = Table.grid(padding=(0, 2))
    for model, (n_rows, n_quantised) in result.models.items():
        table.add_row(
            Text(printable(model)), f"{n_rows} layers, {n_quantised} to quantise"
        )
    table.add_row(Text(result.path, overflow="fold"), f"{result.n_rows} rows")
    return Group(table, Text("`ewq fastewq train` lets plans learn from them."))


def verdict(left_out: Sequence[Scores], n_models: int) -> str:
    """How well the rows generalise to a model that is not among them, in words."""
    by_name = {scores.name: scores for scores in left_out}
    forest, majority = by_name["random forest"], by_name["majority"]
    n_rows = forest.tn + forest.fp + forest.fn + forest.tp
    if forest.accuracy_low > majority.accuracy:
        verb = "better than"
    elif forest.accuracy_high < majority.accuracy:
        verb = "worse than"
    else:
        verb = "not distinguishable from"
    return (
        f"On a model it has not met, a forest fitted on these {n_rows} rows of "
        f"{n_models} models is right for {forest.accuracy:.0%} of the layers (95 % "
        f"interval {forest.accuracy_low:.0%} to {forest.accuracy_high:.0%}, if layers "
        f"were independent): {verb} always answering the more frequent label "
        f"({majority.accuracy:.0%})."
    )


def _head(result: Evaluation) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row(
        "rows",
        f"{result.n_rows} of {result.n_models} models, {result.n_quantised} to "
        f"quantise; the paper had 700, 293",
    )
    if result.n_pairs:
        table.add_row(
            "neighbours",
            f"{result.n_equal_pairs} of {result.n_pairs} adjacent layers share their "
            f"label, {result.n_equal_pairs / result.n_pairs:.0%}",
        )
    return table


def _accuracies(result: Evaluation) -> Table:
    table = number_table(
        "",
        f"held out\n{result.n_train} : {result.n_rows - result.n_train}",
        f"mean of\n{result.n_splits} splits",
        "models\nleft out",
        "in\nsample",
        "paper",
        title="Accuracy, 95 % intervals; in sample is circular, the paper's held out",
    )
    table.columns[0].no_wrap = True
    paper = _paper_scores()
    for split, repeated, left_out, in_sample in zip(
        result.split, result.repeated, result.left_out, result.in_sample, strict=True
    ):
        table.add_row(
            split.name,
            _share(split),
            f"{repeated.mean:.2f} {repeated.low:.2f}-{repeated.high:.2f}",
            _share(left_out),
            f"{in_sample.accuracy:.2f}",
            paper[split.name][-1] if split.name in paper else "-",
        )
    return table


def _confusions(
    title: str, rows: Sequence[Scores], paper: dict[str, tuple[str, ...]]
) -> Table:
    classes = (
        h for label in ("raw", "quantise") for h in (f"{label}\nP", "\nR", "\nF")
    )
    table = number_table(
        *("", "tn", "fp", "fn", "tp", *classes, "ROC\nAUC"),
        title=f"{title}\npositive: quantise; P precision, R recall, F their F1",
    )
    for scores in rows:
        auc = "-" if scores.roc_auc is None else f"{scores.roc_auc:.2f}"
        table.add_row(
            scores.name,
            *(str(n) for n in (scores.tn, scores.fp, scores.fn, scores.tp)),
            *_class_cells(scores.raw),
            *_class_cells(scores.quantised),
            auc,
        )
        if scores.name in paper:
            table.add_row("  paper", *paper[scores.name][:-1], "-")
    return table


def _models(result: Evaluation) -> Table:
    names = (_SHORT[scores.name] for scores in result.left_out)
    title = "Accuracy on each whole model, left out"
    table = number_table("", "rows", *names, title=title)
    for model in result.left_out_models:
        table.add_row(
            Text(printable(model.model_name.split("/")[-1]), overflow="fold"),
            str(model.n_rows),
            *(f"{share:.2f}" for share in model.accuracy.values()),
        )
    return table


def _features(result: Evaluation) -> Table:
    title = "Random forest: importance, mean accuracy without"
    headings = ("", "importance", "paper", "accuracy without", "paper")
    table = number_table(*headings, title=title)
    paper = {row["feature"]: row for row in data.table("paper_features")}
    for importance in result.features:
        printed = paper[importance.feature]
        table.add_row(
            importance.feature,
            f"{importance.importance:.1%}",
            f"{float(printed['importance']):.1%}",
            f"{importance.accuracy_without:.1%}",
            f"{float(printed['accuracy_without']):.1%}",
        )
    all_three = float(paper["none"]["accuracy_without"])
    whole = next(r.mean for r in result.repeated if r.name == "random forest")
    table.add_row("none", "", "", f"{whole:.1%}", f"{all_three:.1%}")
    return table


def _paper_scores() -> dict[str, tuple[str, ...]]:
    """Per classifier tn, fp, fn, tp, six class scores and the accuracy, as printed.

    Table 5 swaps the names of fp and fn: table 3's figures follow only that way.
    """
    report: dict[str, list[str]] = {}
    for row in data.table("paper_table3"):
        cells = report.setdefault(row["classifier"], [])
        if row["class"] in ("0", "1"):
            cells += [row["precision"], row["recall"], row["f1"]]
        elif row["class"] == "Accuracy":
            cells.append(row["f1"])
    return {
        row["classifier"]: (
            row["tn"], row["fn"], row["fp"], row["tp"], *report[row["classifier"]],
        )
        for row in data.table("paper_table5")
    }  # fmt: skip


def _class_cells(scores: ClassScores) -> list[str]:
    return [f"{share:.2f}" for share in (scores.precision, scores.recall, scores.f1)]


def _share(scores: Scores) -> str:
    return f"{scores.accuracy:.2f} {scores.accuracy_low:.2f}-{scores.accuracy_high:.2f}"

"""The paper against itself: what its tables and public shapes allow to recompute.

Nothing here is our measurement. A disagreement says that two printed figures, or a
printed one and a model's public shape, cannot both be right; not which of them is.

Source: arXiv:2503.04704v2. Its "block" is a layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import fsum, sqrt
from statistics import fmean, pvariance

from ewq_gguf.experiments.paper_record import Check, PaperCheck, Relation
from ewq_gguf.experiments.paper_shapes import SHAPES, layer_parameters
from ewq_gguf.fastewq.rows import Row
from ewq_gguf.significance import composite_score, paired_t

Table = Sequence[Mapping[str, str]]

_GIB_GB = 2**30 / 1e9
#: Bits per weight that reproduce table 9: 4.25 is a 16-bit scale per 64 weights, or
#: scale and offset per 128; 8-bit weights come without any.
BITS = {"raw": 16.0, "8bit": 8.0, "4bit": 4.25}
NOTES = (
    "Layer sizes (table 9, and `blocks` of tables 6 and 7) are GiB; totals of raw "
    "models are GB of 1e9 bytes. Both are headed GB.",
    "They are 16, 8.00 and 4.25 bits per parameter, norms and biases included.",
    "Totals are recomputed with the embedding and the head at 16 bits. The uniform "
    "variants seem to quantise these in ways the paper does not state. Mixed totals "
    "are the printed blocks plus 2.75 (Llama), 2.83 or 2.80 (Qwen), 2.66 (gemma), "
    "0.75 (Phi), raw ones plus 3.07, 3.08, 2.90, 0.87: no one unit gives both.",
    "Table 5's columns `False Negative` and `False Positive` are swapped: table 3 "
    "follows from the swapped ones, and class 0 has 121 rows only that way.",
    "`diff` of table 8 is the larger number of layers that one selection has and the "
    "other has not: first against ewq, then against fast.",
    "Table 13 follows from ln(perplexity) - accuracy, with sample standard deviations "
    "in t and pooled population ones in Cohen's d.",
)

#: Accuracies the text gives: of a classifier that learned these layers, and of one
#: on layers it did not learn, which must do better here, having learned most of them.
_AGREEMENT: tuple[tuple[str, float, Relation], ...] = (
    ("fast", 99, "="),
    ("fast train", 80, "<="),
)


def check_paper(tables: Mapping[int, Table], rows: Sequence[Row]) -> PaperCheck:
    """Recompute everything; nothing is left out because it disagrees.

    Args:
        tables: 3, 5, 6, 7, 8, 9, 13 and 14, as shipped.
        rows: the shipped labelled layers.
    """
    return PaperCheck(
        checks=(
            *_table2(rows),
            *_dataset(rows),
            *_table3(tables[3], tables[5]),
            *_table5(tables[3], tables[5]),
            *_tables67(tables),
            *_table8(tables[8]),
            *_table9(tables[9]),
            *_table13(tables[13], tables[7]),
            *_table14(tables[14], {**_by_variant(tables[6]), **_by_variant(tables[7])}),
            *_claims(tables),
        ),
        notes=NOTES,
    )


def _check(
    subject: str,
    what: str,
    printed: float,
    computed: float,
    tolerance: float = 0.0,
    relation: Relation = "=",
) -> Check:
    # Half a unit is exact in decimal but not in binary.
    slack = tolerance + 1e-9
    above, below = printed - computed > slack, computed - printed > slack
    return Check(
        subject=subject,
        what=what,
        printed=printed,
        computed=computed,
        tolerance=tolerance,
        relation=relation,
        agrees=not ((above and relation != ">=") or (below and relation != "<=")),
    )


def _table2(rows: Sequence[Row]) -> Iterator[Check]:
    for row in rows:
        if row.source == "table 2":
            yield _check(
                "table 2",
                f"{row.model_name} num_parameters",
                row.original_num_parameters or row.num_parameters,
                layer_parameters(row.model_name),
            )


def _dataset(rows: Sequence[Row]) -> Iterator[Check]:
    """Sections 4.1, 4.3 and 4.4."""
    n_rows, raw, quantised, asked = 700, 407, 293, 210
    yield _check("4.1", "rows: raw and quantised together", n_rows, raw + quantised)
    yield _check("4.1", "quantised, %", 42, 100 * quantised / n_rows, 0.5)
    yield _check("4.1", "raw, %", 58, 100 * raw / n_rows, 0.5)
    printed = {row.model_name: row for row in rows if row.source == "table 2"}
    n_layers = sum(row.num_blocks for row in printed.values())
    yield _check("4.1", "rows: layers of table 2's models together", n_rows, n_layers)
    correlation = _correlation(
        [
            (row.num_blocks, row.original_num_parameters or row.num_parameters)
            for row in printed.values()
            for _ in range(row.num_blocks)
        ]
    )
    yield _check(
        "4.1",
        "correlation of num_parameters and num_blocks, over those layers",
        0.93,
        correlation,
        0.005,
    )
    n_middle = sum(50 <= row.num_blocks <= 100 for row in printed.values())
    yield _check(
        "4.1",
        "most models have 50 to 100 layers: share of table 2's, %",
        50,
        100 * n_middle / len(printed),
        relation="<=",
    )
    yield _check("4.3", "importances together, %", 100, 66.4 + 19.0 + 14.6, 0.15)
    yield _check(
        "4.3", "accuracy of the whole forest, % (computed: table 3's)", 89.3, 80, 0.5
    )
    yield _check("4.4", "rows to evaluate, 30 %", asked, 0.3 * n_rows)
    yield _check(
        "4.4",
        "quantised rows of the split, if it was stratified",
        89,
        asked * quantised / n_rows,
        0.5,
    )


def _correlation(pairs: Sequence[tuple[float, float]]) -> float:
    xs, ys = zip(*pairs, strict=True)
    mean_x, mean_y = fmean(xs), fmean(ys)
    covariance = fmean((x - mean_x) * (y - mean_y) for x, y in pairs)
    return float(covariance / sqrt(pvariance(xs) * pvariance(ys)))


def _table3(report: Table, confusion: Table) -> Iterator[Check]:
    """Every figure of the report from table 5, its two columns swapped."""
    matrices = {row["classifier"]: row for row in confusion}
    for row in report:
        matrix = matrices[row["classifier"]]
        tn, fp, fn, tp = (int(matrix[key]) for key in ("tn", "fn", "fp", "tp"))
        zero, one = _class_scores(tn, fn, fp), _class_scores(tp, fp, fn)
        n = tn + fp + fn + tp
        what = f"{row['classifier']} {row['class']}"
        if row["class"] == "Accuracy":
            yield _check("table 3", what, float(row["f1"]), (tn + tp) / n, 0.005)
        else:
            weights = {
                "0": (1.0, 0.0),
                "1": (0.0, 1.0),
                "Macro avg": (0.5, 0.5),
                "Weighted avg": ((tn + fp) / n, (tp + fn) / n),
            }[row["class"]]
            for key in ("precision", "recall", "f1"):
                value = weights[0] * zero[key] + weights[1] * one[key]
                yield _check("table 3", f"{what} {key}", float(row[key]), value, 0.005)
        support = {"0": tn + fp, "1": tp + fn}.get(row["class"], n)
        yield _check("table 3", f"{what} support", int(row["support"]), support)


def _class_scores(right: int, wrongly_called: int, missed: int) -> dict[str, float]:
    """Precision, recall and F1 of one label."""
    return {
        "precision": right / (right + wrongly_called),
        "recall": right / (right + missed),
        "f1": 2 * right / (2 * right + wrongly_called + missed),
    }


def _table5(report: Table, confusion: Table) -> Iterator[Check]:
    """What the columns would mean by their printed names, and the text about them."""
    precision = {
        row["classifier"]: row["precision"] for row in report if row["class"] == "0"
    }
    for row in confusion:
        yield _check(
            "table 5",
            f"{row['classifier']} precision of class 0, columns as named",
            float(precision[row["classifier"]]),
            int(row["tn"]) / (int(row["tn"]) + int(row["fn"])),
            0.005,
        )
    by_name = {row["classifier"]: row for row in confusion}
    forest, xgb = by_name["random forest"], by_name["XGB"]
    yield _check(
        "table 5",
        "quantised layers that the forest finds fewer than XGB",
        1,
        int(xgb["tp"]) - int(forest["tp"]),
    )
    differing = sum(
        by_name["SVM"][key] != by_name["logistic regression"][key]
        for key in ("tn", "fn", "fp", "tp")
    )
    yield _check(
        "4.4", "counts in which SVM and logistic regression differ", 0, differing
    )


def _tables67(tables: Mapping[int, Table]) -> Iterator[Check]:
    """Counts from table 8, sizes from table 9 and the counts."""
    sizes = {row["model"]: row for row in tables[9]}
    counts = _counts(tables[8], tables[9])
    first = _by_variant(tables[6])
    for number in (6, 7):
        subject = f"table {number}"
        for row in tables[number]:
            model, variant = row["model"], row["variant"]
            name = f"{model.split('/')[1]} {variant}"
            found = [int(row[key]) for key in ("n_raw", "n_8bit", "n_4bit")]
            for key, printed, computed in zip(
                ("raw", "8bit", "4bit"), found, counts[model, variant], strict=True
            ):
                yield _check(subject, f"{name} {key} layers", printed, computed)
            layer_gib = [float(sizes[model][f"{key}_gb"]) for key in BITS]
            n_layers = int(sizes[model]["n_blocks"])
            gib = fsum(n * size for n, size in zip(found, layer_gib, strict=True))
            rounding = 0.005 + 0.00005 * n_layers
            yield _check(
                subject, f"{name} blocks, GiB", float(row["blocks_gb"]), gib, rounding
            )
            outside_gb = 2 * SHAPES[model].n_outside / 1e9
            yield _check(
                subject,
                f"{name} total, GB",
                float(row["total_gb"]),
                gib * _GIB_GB + outside_gb,
                0.005 + 0.00005 * n_layers * _GIB_GB,
            )
            if number == 7 and (model, variant) in first:
                differing = sum(row[key] != first[model, variant][key] for key in row)
                yield _check(subject, f"{name} differs from table 6 in", 0, differing)


def _counts(
    selections: Table, sizes: Table
) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Raw, 8-bit and 4-bit layers by model and variant, from table 8."""
    counts = {}
    for row in sizes:
        model, n = row["model"], int(row["n_blocks"])
        counts[model, "raw"] = (n, 0, 0)
        counts[model, "8bit"] = (0, n, 0)
        counts[model, "4bit"] = (0, 0, n)
        for chosen in selections:
            if chosen["model"] == model:
                n_all = len(chosen["selected_exec_index"].split())
                n_4bit = len(chosen["four_bit_exec_index"].split())
                name = "" if chosen["variant"] == "ewq" else f"{chosen['variant']} "
                counts[model, f"{name}8bit mixed"] = (n - n_all, n_all, 0)
                mixed = (n - n_all, n_all - n_4bit, n_4bit)
                counts[model, f"{name}4bit/8bit mixed"] = mixed
    return counts


def _table8(selections: Table) -> Iterator[Check]:
    by_variant: dict[tuple[str, str], list[str]] = {
        (row["model"], row["variant"]): row["selected_exec_index"].split()
        for row in selections
    }
    for row in selections:
        name = f"{row['model'].split('/')[1]} {row['variant']}"
        chosen = by_variant[row["model"], row["variant"]]
        total = int(row["n_selected"])
        yield _check("table 8", f"{name} total", total, len(set(chosen)))
        four = set(row["four_bit_exec_index"].split())
        yield _check(
            "table 8",
            f"{name} 4-bit layers that are not the first of the order",
            0,
            len(four - set(chosen[: len(four)])),
        )
        others = [v for v in ("ewq", "fast") if v != row["variant"]]
        printed = [] if row["diff"] == "-" else row["diff"].split(" / ")
        for value, other in zip(printed, others, strict=False):
            theirs = by_variant[row["model"], other]
            differing = max(
                len(set(chosen) - set(theirs)), len(set(theirs) - set(chosen))
            )
            yield _check(
                "table 8", f"{name} diff to {other}", abs(int(value)), differing
            )


def _table9(sizes: Table) -> Iterator[Check]:
    for row in sizes:
        n_weights = layer_parameters(row["model"])
        for key, bits in BITS.items():
            yield _check(
                "table 9",
                f"{row['model'].split('/')[1]} {key}, {bits:g} bits, GiB",
                float(row[f"{key}_gb"]),
                n_weights * bits / 8 / 2**30,
                0.00005,
            )


def _by_variant(table: Table) -> dict[tuple[str, str], Mapping[str, str]]:
    return {(row["model"], row["variant"]): row for row in table}


def _table13(comparisons: Table, results: Table) -> Iterator[Check]:
    """Composite scores ln(perplexity) - accuracy of section 6.3.1, in pairs."""
    scores: dict[str, list[float]] = defaultdict(list)
    for row in results:
        scores[row["variant"]].append(
            composite_score(float(row["mmlu_perplexity"]), float(row["mmlu_accuracy"]))
        )
    for row in comparisons:
        ours, theirs = (
            [score for variant in row[side].split(" + ") for score in scores[variant]]
            for side in ("fast", "fast_train")
        )
        test = paired_t(ours, theirs)
        assert test is not None  # the shipped scores differ
        differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        found = {
            "abs_diff": fmean(differences),
            "t": test.t,
            "p": test.p,
            "d": test.cohens_d,
        }
        for key, computed in found.items():
            yield _check(
                "table 13",
                f"{row['fast']}: {key}",
                float(row[key]),
                computed,
                0.5 * 10.0 ** -len(row[key].partition(".")[2]),
            )


def _table14(
    summary: Table, results: Mapping[tuple[str, str], Mapping[str, str]]
) -> Iterator[Check]:
    """Relative differences from the raw model, in %, of tables 6 and 7."""
    for row in summary:
        key = (row["model"], row["variant"])
        here, raw = results[key], results[row["model"], "raw"]
        name = f"{row['model'].split('/')[1]} {row['variant']}"
        *size, total = row["size_total_gb"].split(" / ")
        yield _check(
            "table 14", f"{name} total, GB", float(total), float(here["total_gb"])
        )
        for what, printed, column, half in (
            ("accuracy", row["accuracy"], "mmlu_accuracy", 5e-5),
            ("perplexity", row["perplexity"], "mmlu_perplexity", 5e-5),
            ("size", "".join(size), "total_gb", 0.005),
        ):
            value, base = float(here[column]), float(raw[column])
            if printed.endswith("%"):
                # Both figures are rounded, and so is their printed quotient.
                rounding = 0.005 + 100 * half / base * (1 + value / base)
                yield _check(
                    "table 14",
                    f"{name} {what}, %",
                    float(printed.rstrip("%")),
                    100 * (value / base - 1),
                    rounding,
                )
            elif printed:
                yield _check("table 14", f"{name} {what}", float(printed), value)


def _claims(tables: Mapping[int, Table]) -> Iterator[Check]:
    """Sentences of sections 6.3 and 7 that tables 6 to 8 can be asked about."""
    ewq, fast = _by_variant(tables[6]), _by_variant(tables[7])
    models = [row["model"] for row in tables[9]]

    def change(row: Mapping[str, str], column: str) -> float:
        return 100 * (float(row[column]) / float(ewq[row["model"], "raw"][column]) - 1)

    for variant, printed, relation in _AGREEMENT:
        yield _check(
            "6.3",
            f"{variant} agrees with ewq, % of table 8's layers",
            printed,
            _agreement(tables, variant),
            0.5,
            relation,
        )
    for model in models:
        row = fast[model, "fast 4bit/8bit mixed"]
        saved = -change(row, "total_gb")
        worse = change(row, "mmlu_perplexity")
        what = f"{model.split('/')[1]} {row['variant']}"
        yield _check("6.3", f"{what}: 18 % or more saved", 18, saved, 0.5, "<=")
        yield _check("6.3", f"{what}: 22 % or less saved", 22, saved, 0.5, ">=")
        yield _check("6.3", f"{what}: perplexity within 0.5 %", 0.5, worse, 0.05, ">=")
    for model in models:
        for variant in ("8bit mixed", "4bit/8bit mixed"):
            row = ewq[model, variant]
            lost = -change(row, "mmlu_accuracy")
            saved = -change(row, "total_gb")
            what = f"{model.split('/')[1]} {variant}"
            yield _check("7", f"{what}: accuracy within 0.5 %", 0.5, lost, 0.05, ">=")
            yield _check("7", f"{what}: up to 18 % saved", 18, saved, 0.5, ">=")


def _agreement(tables: Mapping[int, Table], variant: str) -> float:
    """On how many layers a selection and EWQ's agree, in %."""
    chosen = {
        (row["model"], row["variant"]): set(row["selected_exec_index"].split())
        for row in tables[8]
    }
    n_layers = sum(int(row["n_blocks"]) for row in tables[9])
    n_differing = sum(
        len(chosen[row["model"], variant] ^ chosen[row["model"], "ewq"])
        for row in tables[9]
    )
    return 100 * (1 - n_differing / n_layers)

"""`ewq fastewq`: what its classifiers are worth, and rows of your own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from ewq_gguf.cli.common import (
    PATH,
    BarProgress,
    json_option,
    quiet_option,
    show_record,
)
from ewq_gguf.fastewq import dataset
from ewq_gguf.fastewq import evaluation as classify
from ewq_gguf.fastewq.classifier import rows_of_scan
from ewq_gguf.fastewq.records import Added
from ewq_gguf.fastewq.view import added_view, evaluation_view, training_view
from ewq_gguf.records import Scan, load_record


@click.group()
def fastewq() -> None:
    """Evaluate and train the classifier that chooses layers without weights.

    It learns from the 147 labelled layers that the paper's tables tell. Rows of your
    own scans join them with `add`, and change plans after `train`.
    """


@fastewq.command()
@quiet_option
@json_option
def evaluate(quiet: bool, as_json: bool) -> None:
    """Compare six classifiers and two baselines, beside the paper's figures.

    On held-out rows, on whole models left out, and in sample; half a minute.
    """
    rows = dataset.rows_in_use()
    BarProgress(quiet=quiet).note(f"fitting and asking about {len(rows)} rows")
    result = classify.evaluate(rows, dataset.rows_sha256(rows))
    show_record(result, evaluation_view, as_json=as_json)


@fastewq.command()
@click.argument("scans", nargs=-1, required=True, type=PATH, metavar="SCAN...")
@json_option
def add(scans: tuple[Path, ...], as_json: bool) -> None:
    """Label the layers of scanned models by EWQ and keep them as rows of your own.

    A model that was added before is replaced. Plans change only after
    `ewq fastewq train`.
    """
    found = [rows_of_scan(load_record(Scan, path, "fastewq")) for path in scans]
    new = [row for rows in found for row in rows]
    merged = dataset.add(new)
    n_rows = Counter(row.model_name for row in merged)
    n_quantised: Counter[str] = Counter()
    for row in merged:
        n_quantised[row.model_name] += row.quantized
    models = {
        name: (n_rows[name], n_quantised[name])
        for name in sorted({row.model_name for row in new})
    }
    result = Added(path=str(dataset.own_path()), n_rows=len(merged), models=models)
    show_record(result, added_view, as_json=as_json)


@fastewq.command()
@click.option("--reset", is_flag=True, help="Go back to the paper's rows alone.")
@json_option
def train(reset: bool, as_json: bool) -> None:
    """Let plans learn from your own rows too, and say what that is worth.

    No fitted model is stored: the rows are, and each plan fits the forest anew.
    """
    if reset:
        dataset.reset()
    rows = dataset.shipped_rows() if reset else dataset.merged_rows()
    result = classify.training(rows, dataset.rows_sha256(rows))
    if not reset:
        dataset.use(rows)
    show_record(result, training_view, as_json=as_json)

"""`ewq fastewq`: evaluate its classifiers, and train with rows of your own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from ewq_gguf.cli.common import (
    PATH,
    json_option,
    quiet_option,
    show_record,
)
from ewq_gguf.cli.progress import BarProgress
from ewq_gguf.fastewq import evaluation, rows
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
    labelled = rows.rows_in_use()
    BarProgress(quiet=quiet).note(f"fitting and asking about {len(labelled)} rows")
    result = evaluation.evaluate(labelled)
    show_record(result, evaluation_view, as_json=as_json)


@fastewq.command()
@click.argument("scans", nargs=-1, required=True, type=PATH, metavar="SCAN...")
@json_option
def add(scans: tuple[Path, ...], as_json: bool) -> None:
    """Label the layers of scanned models by EWQ and keep them as rows of your own.

    A model that was added before is replaced. Plans change only after
    `ewq fastewq train`.
    """
    new = [
        row
        for path in scans
        for row in rows.rows_of_scan(load_record(Scan, path, rows.STAGE))
    ]
    merged = rows.add(new)
    n_rows = Counter(row.model_name for row in merged)
    n_quantised: Counter[str] = Counter()
    for row in merged:
        n_quantised[row.model_name] += row.quantized
    models = {
        name: (n_rows[name], n_quantised[name])
        for name in sorted({row.model_name for row in new})
    }
    result = Added(path=str(rows.own_path()), n_rows=len(merged), models=models)
    show_record(result, added_view, as_json=as_json)


@fastewq.command()
@click.option("--reset", is_flag=True, help="Go back to the paper's rows alone.")
@json_option
def train(reset: bool, as_json: bool) -> None:
    """Let plans learn from your own rows too, and say how right they then are.

    No fitted model is stored: the rows are, and each plan fits the forest anew.
    """
    if reset:
        rows.reset()
    labelled = rows.shipped_rows() if reset else rows.merged_rows()
    result = evaluation.training(labelled)
    if not reset:
        rows.use(labelled)
    show_record(result, training_view, as_json=as_json)

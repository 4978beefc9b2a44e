"""`ewq paper`: the paper's figures, recomputed."""

from __future__ import annotations

import click

from ewq_gguf import data
from ewq_gguf.cli.common import json_option, show_record
from ewq_gguf.experiments.paper import check_paper
from ewq_gguf.experiments.paper_report import paper_view
from ewq_gguf.fastewq.rows import shipped_rows

_TABLES = (3, 5, 6, 7, 8, 9, 13, 14)


@click.group()
def paper() -> None:
    """Recompute the figures in the paper's tables."""


@paper.command()
@json_option
def check(as_json: bool) -> None:
    """Print every figure that can be recomputed beside its value, agreeing or not.

    From the tables themselves and the models' public shapes; nothing is measured. The
    exit code is 0 whatever is found.
    """
    tables = {number: data.table(f"paper_table{number}") for number in _TABLES}
    result = check_paper(tables, data.table("paper_shapes"), shipped_rows())
    show_record(result, paper_view, as_json=as_json)

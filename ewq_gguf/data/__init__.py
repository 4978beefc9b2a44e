"""Small tables that come with the package: rows to learn from, figures of the paper."""

from __future__ import annotations

import csv
from importlib.resources import files


def table(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file of this folder; lines that start with # are its source.

    Args:
        name: without `.csv`, such as `paper_table6`.
    """
    text = files(__name__).joinpath(f"{name}.csv").read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return list(csv.DictReader(lines))

"""Small files of the package: rows to learn from, the paper's figures, texts."""

from __future__ import annotations

import csv
from importlib.resources import files
from pathlib import Path

#: What models are asked to answer: passages of our own, a summary of each.
PROMPTS = Path(__file__).parent / "prompts.jsonl"
_DOMAINS = Path(__file__).parent / "domains"


def domains() -> tuple[tuple[str, Path], ...]:
    """Texts of our own in the proof of concept's six domains, by name.

    One document per line; those of `nonsense` are what no model should find likely.
    """
    return tuple((path.stem, path) for path in sorted(_DOMAINS.glob("*.txt")))


def table(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file of this folder; lines that start with # are its source.

    Args:
        name: without `.csv`, such as `paper_table6`.
    """
    text = files(__name__).joinpath(f"{name}.csv").read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return list(csv.DictReader(lines))

"""The paper's figures beside the recomputed ones, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ewq_gguf.experiments.paper_record import Check, PaperCheck


def paper_view(result: PaperCheck) -> RenderableType:
    """Agreements, then disagreements, then how many there are, for a rich console."""
    wrong = [check for check in result.checks if not check.agrees]
    parts: list[RenderableType] = [
        _checks("Agree", (check for check in result.checks if check.agrees)),
        _checks("Differ", wrong),
        _summary(result),
        Group(*(Text(f"- {note}") for note in result.notes)),
        Text(
            f"{len(result.checks) - len(wrong)} of {len(result.checks)} figures "
            f"agree, {len(wrong)} differ."
        ),
    ]
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def _checks(title: str, checks: Iterable[Check]) -> Table:
    table = _table(title)
    table.add_column("")
    table.add_column("", ratio=1, overflow="fold")
    for heading in ("printed", "computed", "within"):
        table.add_column(heading, justify="right")
    for check in checks:
        sign = "" if check.relation == "=" else f"{check.relation} "
        table.add_row(
            check.subject,
            check.what,
            f"{sign}{_number(check.printed)}",
            _number(check.computed),
            f"{check.tolerance:.2g}",
        )
    return table


def _summary(result: PaperCheck) -> Table:
    table = _table("By table and section")
    table.add_column("")
    for heading in ("agree", "differ"):
        table.add_column(heading, justify="right")
    for subject in dict.fromkeys(check.subject for check in result.checks):
        verdicts = [c.agrees for c in result.checks if c.subject == subject]
        agree = sum(verdicts)
        table.add_row(subject, str(agree), str(len(verdicts) - agree))
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=None,
        pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip


def _number(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")

"""Figures of the paper, printed and recomputed: their record and their table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from ewq_gguf.records.base import Part, Record
from ewq_gguf.report.text import number_table

Relation = Literal["=", "<=", ">="]
#: Rows of a CSV file.
Table = Sequence[Mapping[str, str]]


class Check(Part):
    """One printed figure, recomputed.

    Attributes:
        subject: the table, or the section of the text, such as `table 6` or `4.1`.
        what: name of the figure.
        printed: the figure in the paper.
        computed: the same from other figures of the paper, or from public shapes.
        tolerance: difference that rounding of the printed digits explains.
        relation: how printed relates to computed where it is true: `=`, or `<=` and
            `>=` for bounds that the text claims.
        agrees: whether it does.
    """

    subject: str
    what: str
    printed: float
    computed: float
    tolerance: float
    relation: Relation
    agrees: bool


class PaperCheck(Record):
    """Every figure that can be recomputed.

    Attributes:
        checks: in the paper's order.
        notes: how figures were read where the paper leaves it open.
    """

    schema_name: Literal["ewq.paper_check"] = "ewq.paper_check"
    schema_version: Literal[1] = 1

    checks: tuple[Check, ...]
    notes: tuple[str, ...]


def check(
    subject: str,
    what: str,
    printed: float,
    computed: float,
    tolerance: float = 0.0,
    relation: Relation = "=",
) -> Check:
    """A figure with whether it agrees.

    Args:
        subject: the table or the section.
        what: name of the figure.
        printed: the figure in the paper.
        computed: the same from other figures.
        tolerance: difference that rounding explains.
        relation: printed to computed where it is true.
    """
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


def _checks(title: str, checks: Iterable[Check]) -> RichTable:
    table = number_table(
        "", "", "printed", "computed", "within", n_words=2, title=title
    )
    table.columns[1].ratio, table.columns[1].overflow = 1, "fold"
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


def _summary(result: PaperCheck) -> RichTable:
    table = number_table("", "agree", "differ", title="By table and section")
    for subject in dict.fromkeys(check.subject for check in result.checks):
        verdicts = [c.agrees for c in result.checks if c.subject == subject]
        agree = sum(verdicts)
        table.add_row(subject, str(agree), str(len(verdicts) - agree))
    return table


def _number(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")

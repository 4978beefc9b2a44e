"""What the paper prints beside what its own tables give."""

from __future__ import annotations

from typing import Literal

from ewq_gguf.records.base import Part, Record

Relation = Literal["=", "<=", ">="]


class Check(Part):
    """One printed figure, recomputed.

    Attributes:
        subject: the table, or the section of the text, such as `table 6` or `4.1`.
        what: which figure.
        printed: by the paper.
        computed: from other figures of the paper, or from public shapes.
        tolerance: what rounding of the printed digits explains.
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

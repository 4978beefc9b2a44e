"""Tables, role names and colours that several views share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from ewq_gguf import ggml_types

#: Short names of the commonest roles, in the order they are shown.
_SHORT = {
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o",
    "attn_qkv": "qkv", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
}  # fmt: skip
_MAX_HEADER = 24
_GAP = 2


@dataclass(frozen=True)
class Column:
    """A column of a map.

    Attributes:
        name: its header, broken into lines where it is long.
        cells: one per row.
        is_number: whether it is aligned at the right.
    """

    name: str
    cells: Sequence[Text]
    is_number: bool = False

    @property
    def width(self) -> int:
        """Width in characters."""
        header = min(len(self.name), _MAX_HEADER)
        return max(header, *(cell.cell_len for cell in self.cells), 1)


@dataclass(frozen=True)
class Map:
    """Columns in one table, or in several below each other on a narrow terminal.

    Attributes:
        lead: columns that each table begins with.
        columns: the others.
    """

    lead: Sequence[Column]
    columns: Sequence[Column]

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """The tables, with a blank line between them."""
        for i, group in enumerate(self._groups(options.max_width)):
            if i:
                yield Text()
            yield _table([*self.lead, *group])

    def _groups(self, width: int) -> Iterator[list[Column]]:
        free = width - sum(column.width + _GAP for column in self.lead) + _GAP
        group: list[Column] = []
        left = free
        for column in self.columns:
            if group and column.width + _GAP > left:
                yield group
                group, left = [], free
            group.append(column)
            left -= column.width + _GAP
        yield group


def _table(columns: Sequence[Column]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, _GAP // 2))
    for column in columns:
        table.add_column(
            column.name,
            justify="right" if column.is_number else "left",
            max_width=column.width,
            overflow="fold",
        )
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*row)
    return table


def number_table(*headings: str, n_words: int = 1, title: str | None = None) -> Table:
    """A table without lines, of columns of words and then of numbers.

    Args:
        headings: headings of the columns.
        n_words: number of columns that hold words, from the left.
        title: title above the table, whose columns are then closer; None for none.
    """
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0) if title else (0, 1),
    )
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < n_words else "right")
    return table


def short_role(role: str) -> str:
    """`q` for `attn_q`, `gate_exps` for `ffn_gate_exps`."""
    return _SHORT.get(role, role.removeprefix("attn_").removeprefix("ffn_"))


def in_order(roles: Iterable[str]) -> list[str]:
    """Roles in the order of a layer: attention, then the feed-forward network.

    Variants such as `ffn_gate_exps` follow what their names begin with.
    """
    ranks = {role: rank for rank, role in enumerate(_SHORT)}

    def rank(role: str) -> int:
        prefixes = [name for name in ranks if role.startswith(name)]
        return ranks[max(prefixes, key=len)] if prefixes else len(ranks)

    return sorted(roles, key=lambda role: (rank(role), role))


def type_style(ggml_type: str) -> str:
    """A colour for a type: the fewer bits, the warmer."""
    bits = ggml_types.bits_per_weight(ggml_type)
    for limit, style in (
        (2.7, "red"),
        (3.6, "dark_orange"),
        (4.8, "yellow"),
        (6.0, "green"),
        (9.0, "cyan"),
        (16.0, "blue"),
    ):
        if bits <= limit:
            return style
    return "magenta"

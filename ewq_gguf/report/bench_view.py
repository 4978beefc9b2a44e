"""Results of several files, one row each, in 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ewq_gguf.bench.task import ResultTable
from ewq_gguf.bench.tasks import all_tasks
from ewq_gguf.errors import printable
from ewq_gguf.records import Engine, Result

_MAX_NAME = 24


def bench_view(results: Sequence[Result]) -> RenderableType:
    """The tables of all tasks; each number has its standard error beside it.

    Args:
        results: at least one.
    """
    parts: list[RenderableType] = []
    for task in all_tasks():
        for table in task.tables(results):
            parts += [table_view(table), Text()]
    engine = results[0].engine
    parts.append(Text(f"{_where(engine)}; {_what(engine)}"))
    return Group(*parts)


def table_view(table: ResultTable) -> RenderableType:
    """A task's table for a rich console."""
    parts: list[RenderableType] = [_text(table.above)] if table.above else []
    if table.columns:
        grid = Table(
            title=table.title or None, title_justify="left", title_style="bold",
            box=None, pad_edge=False, padding=(0, 1, 0, 0),
        )  # fmt: skip
        for i, name in enumerate(table.columns):
            is_file = name == "file"
            grid.add_column(
                name,
                justify="right" if i else "left",
                max_width=_MAX_NAME if is_file else None,
                overflow="fold" if is_file else "ellipsis",
            )
        for i, row in enumerate(table.rows, 1):
            is_total = table.has_total and i == len(table.rows)
            grid.add_row(*map(_text, row), style="bold" if is_total else None)
        parts.append(grid)
    return Group(*parts, *map(_text, table.notes))


def _text(text: str) -> Text:
    return Text(printable(text))


def _what(engine: Engine) -> str:
    if engine.commit:
        return f"{engine.name} {engine.commit[:9]}"
    counts = [f"{count} {kind}" for kind, count in sorted(engine.n_modules.items())]
    return engine.version + (f"; matrices: {', '.join(counts)}" if counts else "")


def _where(engine: Engine) -> str:
    if not engine.devices:
        return "on the CPU"
    names = ", ".join(f"{name} ({text})" for name, text in engine.devices.items())
    return printable(f"{engine.n_layers_offloaded} layers on {names}")

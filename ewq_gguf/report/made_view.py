"""What a person wants to see when a file is made."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ewq_gguf.pipeline import Made
from ewq_gguf.records import Plan
from ewq_gguf.report.plan_view import layer_counts
from ewq_gguf.report.text import size_text

_N_NEAREST = 4


def made_view(made: Made) -> RenderableType:
    """Size, layers, neighbours, and how to run it."""
    table = Table.grid(padding=(0, 2))
    totals, found = made.plan.totals, made.verification
    reused = " (was there already, still valid)" if made.is_reused else ""
    table.add_row("file", Text(f"{made.path}{reused}"))
    if made.plan_path is not None:
        table.add_row("plan", Text(f"{made.plan_path}  (`ewq plan show` draws it)"))
    table.add_row(
        "size",
        f"{found.found_size_bytes:,} bytes, as predicted; {totals.bpw:.2f} bits per "
        "weight",
    )
    table.add_row("layers", layer_counts(made.plan))
    table.add_row("others", _others(made.plan))
    table.add_row("verified", f"{len(found.tensors)} tensors, each of its planned type")
    table.add_row("presets", _presets(made))
    table.add_row("answers", _answer(made))
    table.add_row("run", Text(f"llama-cli -m {made.path}"))
    return Group(Text(), table, Text())


def _others(plan: Plan) -> str:
    return ", ".join(
        f"{tensor.role} {tensor.written_type}"
        for tensor in plan.tensors
        if tensor.layer_idx is None and tensor.is_quantizable
    )


def _presets(made: Made) -> Table:
    """The standard files nearest in size, and Q8_0 and Q4_K_M whatever theirs."""
    size = made.verification.found_size_bytes
    by_distance = sorted(
        made.preset_bytes, key=lambda name: abs(made.preset_bytes[name] - size)
    )
    names = {*by_distance[:_N_NEAREST], "Q8_0", "Q4_K_M"} & set(made.preset_bytes)
    table = Table.grid(padding=(0, 2))
    for name in sorted(names, key=lambda name: -made.preset_bytes[name]):
        n_bytes = made.preset_bytes[name]
        table.add_row(name, size_text(n_bytes), f"{n_bytes / size - 1:+.0%}")
    return table


def _answer(made: Made) -> Text:
    found = made.verification
    if found.answer is None:
        return Text("not loaded (llama-cpp-python is not installed, or --no-load)")
    return Text(f"{found.prompt}{found.answer}".replace("\n", " "))

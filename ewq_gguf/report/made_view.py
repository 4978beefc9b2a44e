"""A made file: its size, types, checks, nearest presets, and a command to run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ewq_gguf.errors import printable
from ewq_gguf.records import Companion, Plan, Verification
from ewq_gguf.report.companion_view import companion_line
from ewq_gguf.report.plan_view import fallback_lines, layer_counts
from ewq_gguf.report.search_view import search_line
from ewq_gguf.size_text import size_text

_N_NEAREST = 4


def made_view(
    path: Path,
    plan: Plan,
    verification: Verification,
    preset_bytes: Mapping[str, int],
    *,
    plan_path: Path | None = None,
    is_reused: bool = False,
    companions: Sequence[tuple[Path, Companion]] = (),
) -> RenderableType:
    """Size, layers, neighbours, and how to run it.

    Args:
        path: path of the GGUF.
        plan: plan that it was made from.
        verification: verification of the file.
        preset_bytes: file sizes of the standard presets, by name.
        plan_path: path of the plan, where it was written.
        is_reused: whether the file was there already.
        companions: files beside it, with their verification.
    """
    table = Table.grid(padding=(0, 2))
    reused = " (was there already, still valid)" if is_reused else ""
    size = verification.found_size_bytes
    table.add_row("file", Text(f"{path}{reused}"))
    if plan_path is not None:
        table.add_row("plan", Text(f"{plan_path}  (`ewq plan show` draws it)"))
    predicted = "" if plan.totals.is_estimate else ", as predicted"
    table.add_row(
        "size", f"{size:,} bytes{predicted}; {plan.totals.bpw:.2f} bits per weight"
    )
    table.add_row("layers", layer_counts(plan))
    table.add_row("non-layer tensors", _non_layer_types(plan))
    if plan.search is not None:
        table.add_row("search", Text(search_line(plan.search)))
    for line in fallback_lines(plan):
        table.add_row("fallback", line)
    count = len(verification.tensors)
    table.add_row("verified", f"{count} tensors, each of its planned type")
    if verification.exact:
        for line in exact_lines(verification):
            table.add_row("exact", Text(line))
    table.add_row("presets", _presets(size, preset_bytes))
    table.add_row("smoke test", _answer(verification))
    for other, companion in companions:
        table.add_row(companion.content, Text(companion_line(other, companion)))
    table.add_row("run", Text(_command(path, companions)))
    return Group(Text(), table, Text())


def exact_lines(verification: Verification) -> list[str]:
    """Errors of the matrices that were quantised already."""
    exact = verification.exact
    wrong = {name: values for name, values in exact.items() if values.n_wrong}
    lines = [
        f"{name}: {values.n_wrong} weights are not the base's, by up to "
        f"{values.max_error:.3g}"
        for name, values in wrong.items()
    ]
    if len(wrong) < len(exact):
        rounding = max(values.max_rounding for values in exact.values())
        after = f", once rounded to its dtype (by up to {rounding:.3g})"
        lines.insert(
            0,
            f"{len(exact) - len(wrong)} matrices that were quantised already are the "
            f"base's, error 0{after if rounding else ''}",
        )
    return lines


def _command(path: Path, companions: Sequence[tuple[Path, Companion]]) -> str:
    """The command that runs it with the files beside it."""
    files = {companion.content: other for other, companion in companions}
    if "mtp" in files:
        mmproj = f" --mmproj {files['mmproj']}" if "mmproj" in files else ""
        draft = f"-md {files['mtp']} --spec-type draft-mtp"
        return f"llama-server -m {path}{mmproj} {draft}"
    if "mmproj" in files:
        return f"llama-mtmd-cli -m {path} --mmproj {files['mmproj']}"
    return f"llama-cli -m {path}"


def _non_layer_types(plan: Plan) -> str:
    return ", ".join(
        f"{tensor.role} {tensor.written_type}"
        for tensor in plan.tensors
        if tensor.layer_idx is None and tensor.is_quantizable
    )


def _presets(size: int, preset_bytes: Mapping[str, int]) -> Table:
    """Presets nearest in size, and always Q8_0 and Q4_K_M."""
    by_distance = sorted(
        preset_bytes, key=lambda name: abs(log(preset_bytes[name] / size))
    )
    names = {*by_distance[:_N_NEAREST], "Q8_0", "Q4_K_M"} & set(preset_bytes)
    table = Table.grid(padding=(0, 2))
    for name in sorted(names, key=lambda name: -preset_bytes[name]):
        n_bytes = preset_bytes[name]
        table.add_row(name, size_text(n_bytes), f"{n_bytes / size - 1:+.0%}")
    return table


def _answer(verification: Verification) -> Text:
    if verification.answer is None:
        return Text("not loaded (llama-cpp-python is not installed, or --no-load)")
    text = f"{verification.prompt}{verification.answer}"
    return Text(printable(" ".join(text.split())))

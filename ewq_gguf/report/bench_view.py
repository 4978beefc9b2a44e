"""Results of several files, one row each, in 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ewq_gguf.errors import printable
from ewq_gguf.records import Engine, Result, TextResult
from ewq_gguf.report.scores_view import generation_view, mmlu_view
from ewq_gguf.report.text import size_text

_NONE = "·"
_MAX_NAME = 24


def bench_view(results: Sequence[Result]) -> RenderableType:
    """A table per kind of number; each number has its standard error beside it.

    Args:
        results: at least one.
    """
    parts: list[RenderableType] = []
    texts = list(dict.fromkeys(text.name for r in results for text in r.texts))
    for name in texts:
        found = [(r, text) for r in results for text in r.texts if text.name == name]
        parts += [_quality(found), Text(_about(found[0][0], found[0][1])), Text()]
    for result in results:
        if result.mmlu is not None:
            parts += [Text(printable(result.file.name)), mmlu_view(result.mmlu), Text()]
        if result.generation is not None:
            view = generation_view(result.generation)
            parts += [Text(printable(result.file.name)), view, Text()]
    if any(result.speed or result.memory for result in results):
        parts += [_speed(results), Text()]
    engine = results[0].engine
    parts.append(Text(f"{_where(engine)}; {_what(engine)}"))
    return Group(*parts)


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("file", max_width=_MAX_NAME, overflow="fold")
    for name in names:
        table.add_column(name, justify="right")
    return table


def _quality(found: Sequence[tuple[Result, TextResult]]) -> Table:
    has_kld = any(text.kld for _, text in found)
    kld_names = ("KLD mean", "99 %", "same top") if has_kld else ()
    table = _table("size", "perplexity", *kld_names)
    for result, text in found:
        cells: list[Text | str] = [
            Text(printable(result.file.name)),
            size_text(result.size_bytes),
            f"{text.ppl:.3f} ±{text.ppl_stderr:.3f}",
        ]
        if (kld := text.kld) is not None:
            top_error = kld.stderr.get("top1_agreement")
            top = "" if top_error is None else f" ±{100 * top_error:.1f}"
            cells += [
                f"{kld.kld_mean_nats:.5f}{_error(kld.stderr.get('kld_mean_nats'))}",
                f"{kld.kld_p99_nats:.3f}",
                f"{100 * kld.top1_agreement:.1f}{top} %",
            ]
        elif has_kld:
            cells += [_NONE] * len(kld_names)
        table.add_row(*cells)
    return table


def _about(result: Result, text: TextResult) -> str:
    asked = result.parameters
    units = "lines" if asked.is_lines else f"windows of {asked.n_ctx}"
    skipped = f", {text.n_skipped} longer left out" if text.n_skipped else ""
    against = ""
    if text.kld and result.base:
        against = f"; KLD in nats against {result.base.name}"
    return printable(
        f"{text.name}: {text.n_tokens:,} tokens scored in {len(text.chunks)} "
        f"{units}{skipped}{against}"
    )


def _speed(results: Sequence[Result]) -> Table:
    table = _table("prompt t/s", "answer t/s", "first", "peak RSS", "weights", "KV")
    for result in results:
        speed, memory = result.speed, result.memory
        times = [_NONE] * 3
        if speed is not None:
            times = [
                f"{speed.prompt_tps:.1f} ±{speed.prompt_tps_std:.1f}",
                f"{speed.generation_tps:.1f} ±{speed.generation_tps_std:.1f}",
                f"{speed.ttft_seconds:.2f} s",
            ]
        sizes = [_NONE] * 3
        if memory is not None:
            sizes = [
                size_text(memory.peak_rss_bytes),
                size_text(memory.weights_bytes),
                size_text(memory.kv_bytes),
            ]
        table.add_row(Text(printable(result.file.name)), *times, *sizes)
    return table


def _error(value: float | None) -> str:
    return "" if value is None else f" ±{value:.5f}"


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

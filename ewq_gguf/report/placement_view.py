"""A placement in 80 columns: machines in the order of their layers, and how full."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ewq_gguf.errors import printable
from ewq_gguf.records.placement import Machine, Placement, Stage
from ewq_gguf.report.scan_view import bar
from ewq_gguf.report.text import size_text

_NAME_CHARACTERS = 21


def placement_view(placement: Placement) -> RenderableType:
    """The stages, what each machine has room for, hops and time."""
    return Group(_stages(placement), Text(), _foot(placement))


def _stages(placement: Placement) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("machine", no_wrap=True)
    for heading in ("layers", "weights", "KV"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("of its limit", no_wrap=True)
    table.add_column("speed", justify="right", no_wrap=True)
    machines = {machine.name: machine for machine in placement.machines}
    for stage in placement.stages:
        machine = machines[stage.machine]
        speed = machine.bytes_per_second
        share = _share(stage, machine)
        table.add_row(
            Text(printable(stage.machine, _NAME_CHARACTERS)),
            _layers_text(stage),
            size_text(stage.weight_bytes),
            size_text(stage.kv_bytes),
            f"{bar(share)} {share:4.0%}",
            "-" if speed is None else f"{size_text(speed)}/s",
        )
    return table


def _layers_text(stage: Stage) -> str:
    """`0-9`, with `+out` where the output head is."""
    runs = []
    if stage.n_layers == 1:
        runs.append(str(stage.first_layer))
    elif stage.n_layers:
        runs.append(f"{stage.first_layer}-{stage.last_layer}")
    if stage.has_output:
        runs.append("out")
    return "+".join(runs) or "-"


def _share(stage: Stage, machine: Machine) -> float:
    """How much of the scarcer of memory and disk is used."""
    used = stage.weight_bytes + stage.kv_bytes + stage.compute_bytes
    share = used / machine.memory_bytes
    if machine.disk_bytes is not None:
        share = max(share, stage.weight_bytes / machine.disk_bytes)
    return share


def _foot(placement: Placement) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("context", f"{placement.n_ctx:,} tokens")
    table.add_row("hops", f"{placement.hops} between machines for each token")
    seconds = placement.seconds_per_token
    if seconds is not None:
        time = f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
        table.add_row("time", f"{time} to read all weights once")
    used = {stage.machine for stage in placement.stages}
    idle = [m.name for m in placement.machines if m.name not in used]
    if idle:
        table.add_row("not needed", Text(printable(", ".join(idle))))
    return table

"""A placement in 80 columns: machines in the order of their layers, and their use."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ewq_gguf.errors import printable
from ewq_gguf.records.placement import Machine, Placement, Stage
from ewq_gguf.report.scan_view import bar
from ewq_gguf.report.text import Column, Map
from ewq_gguf.size_text import size_text


def placement_view(placement: Placement) -> RenderableType:
    """The stages with the bytes on each machine, hops and time."""
    return Group(_stages(placement), Text(), _foot(placement))


def _stages(placement: Placement) -> Map:
    machines = {machine.name: machine for machine in placement.machines}
    stages = placement.stages
    speeds = [machines[stage.machine].bytes_per_second for stage in stages]
    shares = [_share(stage, machines[stage.machine]) for stage in stages]
    numbers = {
        "layers": [_layers_text(stage) for stage in stages],
        "weights": [size_text(stage.weight_bytes) for stage in stages],
        "KV": [size_text(stage.kv_bytes) for stage in stages],
        "buffers": [size_text(stage.compute_bytes) for stage in stages],
        "share of limit": [f"{bar(share)} {share:4.0%}" for share in shares],
        "speed": [
            "-" if speed is None else f"{size_text(speed)}/s" for speed in speeds
        ],
    }
    return Map(
        [Column("machine", [Text(printable(stage.machine)) for stage in stages])],
        [
            Column(name, [Text(cell) for cell in cells], is_number=True)
            for name, cells in numbers.items()
        ],
    )


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
    """Used share of memory or disk, whichever is fuller."""
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
        table.add_row("unused machines", Text(printable(", ".join(idle))))
    return table

"""The options that say how large a file may be: sizes, this machine, a cluster."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from ewq_gguf.api import Options, machine_budget
from ewq_gguf.cli.common import PATH
from ewq_gguf.cli.sections import option
from ewq_gguf.errors import InputError
from ewq_gguf.plan.size_target import SizeTarget, parse_bpw, parse_budget
from ewq_gguf.records.placement import Machine
from ewq_gguf.rpc.machines import check_machines, machines_of_tables, parse_machine

_MEMORY = "Memory as budget"
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class BudgetOptions:
    """The options that say how large the file may be.

    Attributes:
        budget: Size, share of the unquantised file, or `auto`.
        bpw: Bits per weight.
        machine: Machines of a cluster.
        machines: TOML file of such machines.
        ctx: Tokens of context that memory must hold beside the file.
        device: Devices whose memory `auto` is.
    """

    budget: str | None = None
    bpw: str | None = None
    machine: tuple[str, ...] = ()
    machines: Path | None = None
    ctx: int | None = None
    device: str | None = None

    def given(self) -> list[str]:
        """The options that were given."""
        return [f"--{name}" for name, value in vars(self).items() if value]

    def size_target(self, options: Options) -> SizeTarget | None:
        """The budget that was asked for, None without one.

        Raises:
            click.BadParameter: there are two.
            UsageError: it is no size, or there is no such device.
            ToolError: a device is named and llama.cpp has none.
        """
        has_machines = bool(self.machine or self.machines)
        if (self.budget is not None) + (self.bpw is not None) + has_machines > 1:
            raise click.BadParameter(
                "--budget, --bpw and --machine are budgets each; give one"
            )
        is_auto, n_ctx = self.budget == "auto", self.ctx or 4096
        for flag in self.given():
            if flag == "--device" and not is_auto:
                raise click.BadParameter(f"{flag} goes with --budget auto")
            if flag == "--ctx" and not (is_auto or has_machines):
                raise click.BadParameter(f"{flag} goes with --budget auto")
        if is_auto:
            return machine_budget(n_ctx, self.device or "auto", options)
        if has_machines:
            machines = machines_of(self.machine, self.machines)
            text = f"{len(machines)} machines"
            return SizeTarget(text, machines=machines, n_ctx=n_ctx, may_exceed=True)
        if self.bpw is not None:
            return parse_bpw(self.bpw)
        return None if self.budget is None else parse_budget(self.budget)


BUDGET_OPTIONS = (
    option(
        "--budget",
        metavar="SIZE|%|auto",
        help="Largest size of the file: 6GiB, 5.5GB, 80% of the unquantised file, or "
        "auto: the memory of this machine.",
    ),
    option(
        "--bpw", metavar="X", help="Largest size in bits per weight of the whole file."
    ),
    option(
        "--machine",
        section=_MEMORY,
        multiple=True,
        metavar="NAME=MEM[,DISK][,SPEED]",
        help="Machine of a cluster, the main one first, then RPC workers by address; "
        "repeat. Such as gpu1=24GiB or 10.0.0.2:50052=64GB,100GB,200GB/s.",
    ),
    option(
        "--machines",
        section=_MEMORY,
        type=PATH,
        metavar="FILE",
        help="TOML file of [[machine]] tables with name, memory, disk, speed.",
    ),
    option(
        "--ctx",
        section=_MEMORY,
        type=click.IntRange(1, 1 << 31),
        metavar="N",
        help="Tokens of context that --budget auto and --machine leave memory for.  "
        "[default: 4096]",
    ),
    option(
        "--device",
        section=_MEMORY,
        metavar="NAME",
        help="Device whose memory --budget auto is: cpu, or one of llama.cpp's such as "
        "CUDA0.  [default: every GPU, else the CPU]",
    ),
)


def machines_of(texts: Sequence[str], file: Path | None) -> tuple[Machine, ...]:
    """The file's machines, then those of `--machine`; the first is the main one.

    Raises:
        UsageError: one has another form, or a name is given twice.
        InputError: the file cannot be read, or is not a list of machines.
    """
    listed = () if file is None else machines_of_tables(_read_toml(file))
    machines = (*listed, *map(parse_machine, texts))
    check_machines(machines)
    return machines


def _read_toml(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES).decode()
    except OSError as error:
        raise InputError(
            "plan", path, f"cannot be read ({error.strerror})", "check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError("plan", path, "is not UTF-8", "save it as UTF-8") from error
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(
            "plan", path, f"is not TOML ({error})", "give [[machine]] tables"
        ) from error

"""The options that make a policy and a budget, of `ewq plan` and `ewq gguf`."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from math import inf
from typing import Any

import click

from ewq_gguf.api import machine_budget
from ewq_gguf.cli.common import PATH, F, all_of, explicit, options_of
from ewq_gguf.cli.machines import machines_of
from ewq_gguf.plan.size_target import SizeTarget, parse_bpw, parse_budget
from ewq_gguf.records import (
    EwqPolicy,
    FastEwqPolicy,
    OptimalPolicy,
    PresetPolicy,
    RulePolicy,
    UniformPolicy,
)

_MAX_FACTORS = 1000


def _option(*args: Any, default: Any = None, **kwargs: Any) -> Callable[[F], F]:
    """An option whose default is shown."""
    return click.option(
        *args, default=default, show_default=default is not None, **kwargs
    )


_POLICY = (
    _option(
        "--policy",
        default="ewq",
        help="ewq, fastewq, uniform:TYPE, preset:NAME, or optimal: the best file of a "
        "size that can be found.",
    ),
)
_MEASURE = (
    _option(
        "--measure",
        type=click.Choice(["softmax", "histogram"]),
        default="softmax",
        help="Which entropy decides.",
    ),
    _option("--epsilon", type=float, default=0.01, help="Of the softmax measure."),
    _option(
        "--bins",
        type=click.IntRange(2, 65536),
        default=256,
        help="Of the histogram measure.",
    ),
)
_FACTOR = (
    _option(
        "--factor", type=float, default=1.0, help="X of the threshold mu - X sigma."
    ),
)
_RULE = (
    _option(
        "--rule",
        type=click.Choice(["mean", "q75"]),
        default="mean",
        help="Raw from the mean on, or from the 75th percentile on.",
    ),
    _option(
        "--granularity",
        type=click.Choice(["layer", "tensor"]),
        default="layer",
        help="Decide layers, or tensors within their role.",
    ),
)
_FAST = (
    _option(
        "--variant",
        type=click.Choice(["full", "train"]),
        default="full",
        help="fastewq: fitted on every row, or on 70 % of them.",
    ),
    _option(
        "--low-layers",
        type=click.IntRange(0, 10_000),
        default=0,
        help="fastewq: how many of the chosen layers, from the last one down, get the "
        "third precision from the top.",
    ),
)
_OPTIMAL = (
    _option(
        "--effort",
        type=float,
        default=20.0,
        metavar="MINUTES",
        help="optimal: that files may be measured for.",
    ),
    _option(
        "--min-tps",
        type=float,
        metavar="X",
        help="optimal: tokens per second that the file has to generate here.",
    ),
    _option(
        "--calibration",
        type=PATH,
        metavar="FILE",
        help="optimal: text for the importance matrix where none is given; without it "
        "the model writes its own.",
    ),
    _option(
        "--types",
        metavar="T,T,...",
        help="optimal: what tensors may be, besides raw.  [default: all]",
    ),
    _option(
        "--floor",
        multiple=True,
        metavar="[ROLE=]TYPE",
        help="optimal: at least as many bits, of a role such as attn_v or of all; "
        "repeat.",
    ),
    _option(
        "--ceiling",
        multiple=True,
        metavar="[ROLE=]TYPE",
        help="optimal: at most as many bits, likewise.",
    ),
)
_TYPES = (
    _option(
        "--ladder",
        default="Q4_K,Q8_0,raw",
        help="Precisions, low to high; those below the third from the top serve "
        "budgets.",
    ),
    _option(
        "--embedding-type",
        default="auto",
        help="Of the embedding: raw, a type, or auto: raw, with a budget the ladder's, "
        "of policy uniform its own.",
    ),
    _option("--output-type", default="auto", help="Of the output head, likewise."),
)
_RAW_TYPE = (
    _option(
        "--raw-type",
        type=click.Choice(["auto", "f16", "bf16"], case_sensitive=False),
        default="auto",
        help="What `raw` means; auto is the source's own type.",
    ),
)
_BUDGET = (
    _option(
        "--budget",
        metavar="SIZE|%|auto",
        help="What the file may take: 6GiB, 5.5GB, 80% of the unquantised, or what "
        "this machine has.",
    ),
    _option(
        "--bpw", metavar="X", help="The same in bits per weight of the whole file."
    ),
    _option(
        "--machine",
        multiple=True,
        metavar="NAME=MEM[,DISK][,SPEED]",
        help="A machine of a cluster, the main one first, then RPC workers by address; "
        "repeat. Such as gpu1=24GiB or 10.0.0.2:50052=64GB,100GB,200GB/s.",
    ),
    _option(
        "--machines",
        type=PATH,
        metavar="FILE",
        help="A TOML file of them: [[machine]] tables with name, memory, disk, speed.",
    ),
    _option(
        "--ctx",
        type=click.IntRange(1, 1 << 31),
        default=4096,
        help="Tokens of context that --budget auto and machines leave room for.",
    ),
    _option(
        "--device",
        default="auto",
        help="Whose memory --budget auto means: cpu, a device of llama.cpp such as "
        "CUDA0, or auto: every device, else the CPU's.",
    ),
)


#: What `policy_of`, `raw_type_of` and `ask_of` read.
policy_options = all_of(
    (
        *_POLICY,
        *_MEASURE,
        *_FACTOR,
        *_RULE,
        *_FAST,
        *_OPTIMAL,
        *_TYPES,
        *_RAW_TYPE,
        *_BUDGET,
    )  # fmt: skip
)
#: What `ewq_policy_of` and `raw_type_of` read, the factor left out.
rule_options = all_of((*_MEASURE, *_RULE, *_TYPES, *_RAW_TYPE))
#: What `optimal_policy_of` reads.
optimal_options = all_of(_OPTIMAL)
#: What `raw_type_of` reads.
raw_type_option = all_of(_RAW_TYPE)

_ENTROPY_NAMES = ("measure", "epsilon", "bins", "factor", "rule", "granularity")
_FAST_NAMES = ("variant", "low_layers")
_OPTIMAL_NAMES = ("effort", "min_tps", "calibration", "types", "floor", "ceiling")
_TYPE_NAMES = ("ladder", "embedding_type", "output_type")
_BUDGET_NAMES = ("budget", "bpw", "machine", "machines", "ctx", "device")
POLICY_OPTIONS = (
    "policy", *_ENTROPY_NAMES, *_FAST_NAMES, *_OPTIMAL_NAMES, *_TYPE_NAMES,
    *_BUDGET_NAMES, "raw_type",
)  # fmt: skip

#: What a policy does not take.
_FOREIGN = {
    "ewq": (*_FAST_NAMES, *_OPTIMAL_NAMES),
    "fastewq": (*_ENTROPY_NAMES, *_OPTIMAL_NAMES),
    "uniform": (
        *_ENTROPY_NAMES,
        *_FAST_NAMES,
        *_OPTIMAL_NAMES,
        "ladder",
        *_BUDGET_NAMES,
    ),
    "preset": (
        *_ENTROPY_NAMES,
        *_FAST_NAMES,
        *_OPTIMAL_NAMES,
        *_TYPE_NAMES,
        *_BUDGET_NAMES,
    ),
    "optimal": (*_ENTROPY_NAMES, *_FAST_NAMES, *_TYPE_NAMES),
}


def policy_of(values: dict[str, Any]) -> RulePolicy:
    """The policy that the command line asks for.

    Raises:
        click.BadParameter: there is no such policy, an option is another's, or a number
            is none.
    """
    name, colon, argument = values["policy"].partition(":")
    has_argument = name in ("uniform", "preset")
    if (
        name not in _FOREIGN
        or bool(colon) != has_argument
        or bool(argument) != bool(colon)
    ):
        raise click.BadParameter(
            f"unknown policy {values['policy']!r}; use ewq, fastewq, optimal, "
            "uniform:TYPE such as uniform:Q8_0, or preset:NAME such as preset:Q4_K_M",
            param_hint="--policy",
        )
    if given := explicit(_FOREIGN[name]):
        raise click.BadParameter(
            f"{given[0]} does not go with policy {values['policy']}"
        )
    if name == "preset":
        return PresetPolicy(preset=argument.strip().upper())
    if has_argument:
        types = _types(values)
        del types["ladder"]
        return UniformPolicy(ggml_type=_type_name(argument), **types)
    if name == "optimal":
        return optimal_policy_of(values)
    if name == "fastewq":
        return FastEwqPolicy(
            variant=values["variant"], n_low=values["low_layers"], **_types(values)
        )
    return ewq_policy_of(values)


def optimal_policy_of(values: dict[str, Any]) -> OptimalPolicy:
    """Policy `optimal` with the options that were given.

    Raises:
        click.BadParameter: the effort is no number.
    """
    if not 0 <= values["effort"] < inf:
        raise click.BadParameter(
            f"{values['effort']} is not a number from 0 up", param_hint="--effort"
        )
    min_tps, types = values["min_tps"], values["types"]
    if min_tps is not None and not 0 < min_tps < inf:
        raise click.BadParameter(
            f"{min_tps} is not a number above 0", param_hint="--min-tps"
        )
    return OptimalPolicy(
        types=OptimalPolicy().types if types is None else tuple(_type_names(types)),
        effort_minutes=values["effort"],
        min_tps=min_tps,
        floors=_by_role(values["floor"]),
        ceilings=_by_role(values["ceiling"]),
    )


def _by_role(given: tuple[str, ...]) -> dict[str, str]:
    """`attn_v=Q5_0`, or a type alone for every role."""
    pairs = (text.rpartition("=") for text in given)
    return {of.strip() or "*": _type_name(ggml_type) for of, _, ggml_type in pairs}


def _type_names(text: str) -> list[str]:
    return [_type_name(part) for part in text.split(",")]


def ewq_policy_of(values: dict[str, Any]) -> EwqPolicy:
    """Policy `ewq` with the options that were given.

    Raises:
        click.BadParameter: a number is none.
    """
    for flag in ("epsilon", "factor"):
        if not 0 <= values[flag] < float("inf"):
            raise click.BadParameter(
                f"{values[flag]} is not a number from 0 up", param_hint=f"--{flag}"
            )
    return EwqPolicy(
        measure=values["measure"],
        epsilon=values["epsilon"],
        n_bins=values["bins"],
        factor=values["factor"],
        rule=values["rule"],
        granularity=values["granularity"],
        **_types(values),
    )


def _types(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "ladder": tuple(_type_names(values["ladder"])),
        "embedding_type": _type_name(values["embedding_type"]),
        "output_type": _type_name(values["output_type"]),
    }


def _type_name(text: str) -> str:
    """`raw`, `auto`, or a ggml type in its own spelling."""
    stripped = text.strip()
    return stripped.lower() if stripped.lower() in {"raw", "auto"} else stripped.upper()


def raw_type_of(values: dict[str, Any]) -> str:
    """`auto`, `F16` or `BF16`."""
    raw: str = values["raw_type"]
    return raw if raw == "auto" else raw.upper()


def ask_of(values: dict[str, Any]) -> SizeTarget | None:
    """The budget that the command line asks for.

    Raises:
        click.BadParameter: there are two.
        UsageError: it is no size, or there is no such device.
        ToolError: a device is named and llama.cpp has none.
    """
    budget, bpw = values["budget"], values["bpw"]
    has_machines = bool(values["machine"] or values["machines"])
    if (budget is not None) + (bpw is not None) + has_machines > 1:
        raise click.BadParameter(
            "--budget, --bpw and --machine are budgets each; give one"
        )
    is_auto = budget == "auto"
    needless = [] if is_auto else ["device"] if has_machines else ["ctx", "device"]
    if given := explicit(needless):
        raise click.BadParameter(f"{given[0]} goes with --budget auto")
    if is_auto:
        return machine_budget(values["ctx"], values["device"], options_of(values))
    if has_machines:
        machines = machines_of(values["machine"], values["machines"])
        text = f"{len(machines)} machines"
        return SizeTarget(text, machines=machines, n_ctx=values["ctx"], may_exceed=True)
    if bpw is not None:
        return parse_bpw(bpw)
    return None if budget is None else parse_budget(budget)


def factors_of(text: str) -> list[float]:
    """The factors of `FROM:TO:STEP`, both ends included, or of a list.

    Raises:
        click.BadParameter: it is neither, or names none, more than a thousand, or one
            below 0.
    """
    try:
        if ":" not in text:
            factors = [float(part) for part in text.split(",")]
            if len(factors) > _MAX_FACTORS or not all(0 <= x < inf for x in factors):
                raise ValueError
            return factors
        first, last, step = (Decimal(part) for part in text.split(":"))
        n_steps = int((last - first) / step)
        if step <= 0 or first < 0 or not 0 <= n_steps < _MAX_FACTORS:
            raise ValueError
        return [float(first + step * i) for i in range(n_steps + 1)]
    except (ValueError, ArithmeticError):
        raise click.BadParameter(
            f"{text!r} is neither FROM:TO:STEP, such as 0.3:1.5:0.05, nor numbers with "
            "commas between them",
            param_hint="--factors",
        ) from None

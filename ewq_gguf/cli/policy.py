"""The options that make a policy and a budget, of `ewq plan` and `ewq gguf`."""

from __future__ import annotations

from typing import Any

import click

from ewq_gguf.cli.common import F, explicit
from ewq_gguf.plan.ask import Ask, parse_bpw, parse_budget
from ewq_gguf.records import EwqPolicy, RulePolicy, UniformPolicy


def option(*args: Any, default: Any = None, **kwargs: Any) -> Any:
    """An option whose default is shown."""
    return click.option(
        *args, default=default, show_default=default is not None, **kwargs
    )


measure_options = (
    option(
        "--measure",
        type=click.Choice(["softmax", "histogram"]),
        default="softmax",
        help="Which entropy decides.",
    ),
    option("--epsilon", type=float, default=0.01, help="Of the softmax measure."),
    option(
        "--bins",
        type=click.IntRange(2, 65536),
        default=256,
        help="Of the histogram measure.",
    ),
)

_RULE_OPTIONS = (
    option(
        "--factor", type=float, default=1.0, help="X of the threshold mu - X sigma."
    ),
    option(
        "--rule",
        type=click.Choice(["mean", "q75"]),
        default="mean",
        help="Raw from the mean on, or from the 75th percentile on.",
    ),
    option(
        "--granularity",
        type=click.Choice(["layer", "tensor"]),
        default="layer",
        help="Decide layers, or tensors within their role.",
    ),
)
_TYPE_OPTIONS = (
    option(
        "--ladder",
        default="Q4_K,Q8_0,raw",
        help="Precisions, low to high; those below the third from the top serve "
        "budgets.",
    ),
    option(
        "--embedding-type",
        default="auto",
        help="Of the embedding: raw, a type, or auto: raw, with a budget the ladder's.",
    ),
    option("--output-type", default="auto", help="Of the output head, likewise."),
)
raw_type_option = option(
    "--raw-type",
    type=click.Choice(["auto", "f16", "bf16"], case_sensitive=False),
    default="auto",
    help="What `raw` means; auto is the source's own type.",
)
_BUDGET_OPTIONS = (
    option(
        "--budget",
        metavar="SIZE|%|auto",
        help="What the file may take: 6GiB, 5.5GB, 80% of the unquantised, or what "
        "this machine has.",
    ),
    option("--bpw", metavar="X", help="The same in bits per weight of the whole file."),
)


def policy_options(function: F) -> F:
    """The options that `policy_of`, `raw_type_of` and `ask_of` read."""
    policy = option("--policy", default="ewq", help="ewq, or uniform:TYPE.")
    options = (
        policy,
        *measure_options,
        *_RULE_OPTIONS,
        *_TYPE_OPTIONS,
        raw_type_option,
        *_BUDGET_OPTIONS,
    )
    for each in reversed(options):
        function = each(function)
    return function


_MEASURE = ("measure", "epsilon", "bins")
_RULE = ("factor", "rule", "granularity")
_TYPES = ("ladder", "embedding_type", "output_type")
_BUDGET = ("budget", "bpw")

#: What another policy does not take.
_FOREIGN = {"uniform": (*_MEASURE, *_RULE, *_TYPES, *_BUDGET), "ewq": ()}
POLICY_OPTIONS = ("policy", *_MEASURE, *_RULE, *_TYPES, *_BUDGET, "raw_type")


def policy_of(values: dict[str, Any]) -> RulePolicy:
    """The policy that the command line asks for.

    Raises:
        click.BadParameter: there is no such policy, an option is another's, or a number
            is none.
    """
    name, colon, argument = values["policy"].partition(":")
    if (
        name not in _FOREIGN
        or bool(argument) != (name == "uniform")
        or (colon and not argument)
    ):
        raise click.BadParameter(
            f"unknown policy {values['policy']!r}; use ewq, or uniform:TYPE such as "
            "uniform:Q8_0",
            param_hint="--policy",
        )
    if given := explicit(_FOREIGN[name]):
        raise click.BadParameter(f"{given[0]} does not go with policy {name}")
    if name == "uniform":
        return UniformPolicy(ggml_type=_type_name(argument))
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
        ladder=tuple(_type_name(part) for part in values["ladder"].split(",")),
        embedding_type=_type_name(values["embedding_type"]),
        output_type=_type_name(values["output_type"]),
    )


def ask_of(values: dict[str, Any]) -> Ask | None:
    """The budget that the command line asks for.

    Raises:
        click.BadParameter: there are two.
        UsageError: it is no size.
    """
    budget, bpw = values["budget"], values["bpw"]
    if budget is not None and bpw is not None:
        raise click.BadParameter("--budget and --bpw are two budgets; give one")
    if bpw is not None:
        return parse_bpw(bpw)
    return None if budget is None else parse_budget(budget)


def _type_name(text: str) -> str:
    """`raw`, `auto`, or a ggml type in its own spelling."""
    stripped = text.strip()
    return stripped.lower() if stripped.lower() in {"raw", "auto"} else stripped.upper()


def raw_type_of(values: dict[str, Any]) -> str:
    """`auto`, `F16` or `BF16`."""
    raw: str = values["raw_type"]
    return raw if raw == "auto" else raw.upper()

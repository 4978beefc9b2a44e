"""The options that make a policy and a budget, from the policies' own parameters."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal
from math import inf
from typing import Any

import click

from ewq_gguf.cli.budget import BUDGET_OPTIONS, BudgetOptions
from ewq_gguf.cli.sections import Decorator, collected, option
from ewq_gguf.errors import UsageError
from ewq_gguf.plan.grammar import RULES, SILENT, forms, parse, read, value_texts
from ewq_gguf.records import (
    EwqPolicy,
    GivenPolicy,
    Measures,
    RulePolicy,
)

_MAX_FACTORS = 1000


@dataclass(frozen=True)
class PolicyOptions:
    """The policy and the budget of a command.

    Attributes:
        policy: Policy with every parameter that was given.
        budget: Options of the budget.
    """

    policy: RulePolicy
    budget: BudgetOptions


raw_type_option = option(
    "--raw-type",
    section="Conversion of the checkpoint",
    type=click.Choice(["auto", "f16", "bf16"], case_sensitive=False),
    default="auto",
    callback=lambda ctx, param, value: value if value == "auto" else value.upper(),
    help="Type of unquantised matrices; auto is the checkpoint's own.",
)


def _parameter_option(
    rule: type[RulePolicy], name: str, section: str | None = None
) -> Decorator:
    """The option of a policy's parameter; its value is None where it is not given."""
    field = rule.parameters()[name]

    def value_of(ctx: click.Context, param: click.Parameter, given: Any) -> Any:
        texts = given if isinstance(given, tuple) else () if given is None else (given,)
        try:
            values = [read(field, text) for text in texts]
        except ValueError as error:
            raise click.BadParameter(f"{given} {error}") from None
        if field.value_type is dict and values:
            return {role: name for value in values for role, name in value.items()}
        return values[0] if values else None

    default = ""
    if field.default not in SILENT:
        default = f"  [default: {value_texts(field.default)[0].replace('+', ',')}]"
    return option(
        field.parameter.flag,
        name,
        section=section,
        type=click.Choice(field.choices) if field.choices else None,
        metavar=field.parameter.metavar or ("N" if field.is_number else None),
        multiple=field.value_type is dict,
        callback=value_of,
        help=f"{field.parameter.help}{default}",
    )


def parameter_options(
    rule: type[RulePolicy], *, without: Collection[str] = ()
) -> Decorator:
    """The options of one policy: the command takes `policy`."""
    names = [
        name
        for name, field in rule.parameters().items()
        if field.parameter.flag and name not in without
    ]

    def arguments(values: dict[str, Any]) -> dict[str, Any]:
        given = {name: values.pop(name) for name in names}
        policy = rule(**{n: v for n, v in given.items() if v is not None})
        return {**values, "policy": policy}

    return collected([_parameter_option(rule, name) for name in names], arguments)


def _measures(values: dict[str, Any]) -> dict[str, Any]:
    given = {name: values.pop(name) for name in ("epsilon", "n_bins")}
    measures = Measures(**{n: v for n, v in given.items() if v is not None})
    return {**values, "measures": measures}


#: The options of the entropies: the command takes `measures`.
measure_options = collected(
    [_parameter_option(EwqPolicy, name) for name in ("epsilon", "n_bins")], _measures
)


def _every_parameter() -> dict[str, Decorator]:
    """The option of each parameter of all policies, in the sections of the help."""
    options = {}
    for rule in RULES.values():
        for name, field in rule.parameters().items():
            users = [key for key, other in RULES.items() if name in other.parameters()]
            if field.parameter.flag and name not in options:
                section = f"Options of --policy {', '.join(users)}"
                options[name] = _parameter_option(rule, name, section)
    return options


_PARAMETERS = _every_parameter()
_POLICY = option(
    "--policy",
    default="ewq",
    metavar="POLICY",
    help="Rule that chooses the types: ewq, fastewq, uniform:TYPE, a preset such as "
    "Q4_K_M, or optimal: the best file of the budget, found by measuring. With "
    "parameters and budget: ewq:tensor:x0.8@6GiB.",
)


def _policy(values: dict[str, Any]) -> dict[str, Any]:
    """The policy and the budget of the command line.

    Raises:
        click.BadParameter: an option is another policy's, or contradicts the text.
        UsageError: there is no such policy.
    """
    text = values.pop("policy")
    budget = BudgetOptions(**{n: values.pop(n) for n in vars(BudgetOptions())})
    given = {name: values.pop(name) for name in _PARAMETERS}
    rule, spelt_budget = rule_of(text, "--policy")
    if budget.given() and (spelt_budget or rule.takes_budget == "never"):
        problem = "contradicts" if spelt_budget else "does not go with"
        raise click.BadParameter(f"{budget.given()[0]} {problem} policy {text}")
    if spelt_budget:
        budget = BudgetOptions(spelt_budget)
    merged = {name: getattr(rule, name) for name in rule.model_fields_set}
    for name, value in given.items():
        if value is None:
            continue
        field = rule.parameters().get(name)
        if field is None:
            flag = _flag(name)
            raise click.BadParameter(f"{flag} does not go with policy {text}")
        if merged.setdefault(name, value) != value:
            flag = field.parameter.flag
            raise click.BadParameter(f"{flag} contradicts policy {text}")
    policy = PolicyOptions(type(rule)(**merged), budget)
    return {**values, "policy": policy}


def _flag(name: str) -> str:
    """The option of a parameter, of whichever policy has it."""
    fields = (rule.parameters().get(name) for rule in RULES.values())
    return next(field.parameter.flag for field in fields if field is not None)


#: All options of policies and budgets: the command takes `policy`, PolicyOptions.
policy_options = collected([_POLICY, *BUDGET_OPTIONS, *_PARAMETERS.values()], _policy)
#: The options that a finished plan has decided.
POLICY_FLAGS = (
    "--policy",
    *map(_flag, _PARAMETERS),
    "--calibration",
    *(f"--{name}" for name in vars(BudgetOptions())),
    "--raw-type",
)


def rule_of(text: str, flag: str) -> tuple[RulePolicy, str | None]:
    """The policy and the budget of a text, of a policy that can be planned by.

    Raises:
        UsageError: there is no such policy, or it only tells where types came from.
    """
    policy, budget = parse(text, flag)
    if isinstance(policy, GivenPolicy):
        problem = f"policy {policy.name} tells where types came from, and chooses none"
        raise UsageError("plan", flag, problem, f"use {', '.join(forms())}")
    return policy, budget


def _factors_of(ctx: click.Context, param: click.Parameter, text: str) -> list[float]:
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
            "commas between them"
        ) from None


def factors_option(default: str) -> Decorator:
    """`--factors`: the command takes a list of numbers."""
    return option(
        "--factors",
        default=default,
        callback=_factors_of,
        metavar="FROM:TO:STEP",
        help="Factors X to plan with, TO included; or a list with commas.",
    )

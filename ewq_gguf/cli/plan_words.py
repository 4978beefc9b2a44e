"""Plans in a few words: `ewq:tensor:x0.8@80%`, or the file of a finished one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from ewq_gguf.api import PlanSpec
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.plan.size_target import SizeTarget, parse_bpw, parse_budget
from ewq_gguf.records import (
    EwqPolicy,
    FastEwqPolicy,
    OptimalPolicy,
    Plan,
    RulePolicy,
    UniformPolicy,
    load_record,
)

HELP = (
    "A plan's file, or POLICY[:WORD...][@BUDGET] to make it: ewq, with any of tensor, "
    "histogram, q75, xFACTOR and epsEPSILON; fastewq, with train or lowN; "
    "uniform:TYPE; optimal, with effortMINUTES, always with a budget. Such as "
    "ewq:tensor:x0.8 or fastewq@80%. '' for none."
)
_FORM = re.compile(r"(?P<policy>[^@]+)(@(?P<budget>.+))?")

_NUMBERS = ("x", "eps", "low", "effort")
_NUMBERED = re.compile(rf"({'|'.join(_NUMBERS)})([0-9.]+)")

#: What each word says, by policy; numbers are taken off words first.
_WORDS: dict[str, dict[str, Callable[[str], dict[str, Any]]]] = {
    "ewq": {
        "tensor": lambda _: {"granularity": "tensor"},
        "histogram": lambda _: {"measure": "histogram"},
        "q75": lambda _: {"rule": "q75"},
        "x": lambda number: {"factor": float(number)},
        "eps": lambda number: {"epsilon": float(number)},
    },
    "fastewq": {
        "train": lambda _: {"variant": "train"},
        "low": lambda number: {"n_low": int(number)},
    },
    "optimal": {"effort": lambda minutes: {"effort_minutes": float(minutes)}},
}
_POLICIES: dict[str, type[EwqPolicy | FastEwqPolicy | OptimalPolicy]] = {
    "ewq": EwqPolicy,
    "fastewq": FastEwqPolicy,
    "optimal": OptimalPolicy,
}


def parse_plans(texts: Iterable[str]) -> tuple[PlanSpec, ...]:
    """The plans of an option that repeats or takes commas.

    Raises:
        click.BadParameter: words that no policy has.
        InputError: a file is no plan.
        UsageError: a budget is none.
    """
    parts = [part.strip() for text in texts for part in text.split(",")]
    return tuple(_wanted(part) for part in parts if part)


def _wanted(text: str) -> PlanSpec:
    path = Path(text)
    if path.suffix == ".json" or path.is_file():
        plan = load_record(Plan, path, STAGE)
        # `ewq plan` calls it NAME.POLICY.json.
        return PlanSpec(plan, name=path.stem.removeprefix(f"{plan.model.name}."))
    form = _FORM.fullmatch(text)
    policy = _policy(form["policy"]) if form else None
    if form is None or policy is None:
        raise click.BadParameter(
            f"{text!r} is neither a plan's file nor a policy; use "
            "ewq[:tensor|histogram|q75|xFACTOR|epsEPSILON...], fastewq[:train|lowN], "
            "optimal[:effortMINUTES] or uniform:TYPE, each with @BUDGET where it takes "
            "one",
            param_hint="--plans",
        )
    return PlanSpec(policy, budget=_budget(form["budget"]))


def _policy(text: str) -> RulePolicy | None:
    """The policy that the words before a budget name; None where they name none."""
    name, *words = text.split(":")
    if name == "uniform" and len(words) == 1 and words[0]:
        return UniformPolicy(ggml_type=words[0].upper())
    if name not in _POLICIES:
        return None
    values: dict[str, Any] = {}
    for word in words:
        numbered = _NUMBERED.fullmatch(word)
        key, number = numbered.groups() if numbered else (word, "")
        if key not in _WORDS[name] or bool(number) != (key in _NUMBERS):
            return None
        try:
            values |= _WORDS[name][key](number)
        except ValueError:  # such as x1.2.3
            return None
    return _POLICIES[name](**values)


def _budget(text: str | None) -> SizeTarget | None:
    if text is None:
        return None
    bits = text.removesuffix("bpw")
    return parse_budget(text) if bits == text else parse_bpw(bits)

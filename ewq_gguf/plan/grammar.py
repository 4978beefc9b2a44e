"""The grammar of policies: `ewq:tensor:x0.8@6GiB`, in options, labels and views.

    POLICY[:VALUE...][@BUDGET], or the name of a preset: Q4_K_M

The values of a policy are its parameters, as records.policy tells them: a choice stands
for itself, others follow their word, as in `x0.8` or `embd=Q6_K`. Lists are joined by
`+`; what is left away has its default.
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any, get_args
from zlib import crc32

from ewq_gguf.errors import UsageError
from ewq_gguf.ggml_types import QUANTISED_TYPES
from ewq_gguf.records.parameter import PolicyField, TypeParameter
from ewq_gguf.records.policy import (
    GivenPolicy,
    Policy,
    PresetPolicy,
    RulePolicy,
)

#: The policies by name; only those of RULES can be planned by.
RULES: dict[str, type[RulePolicy]] = {
    rule.model_fields["name"].default: rule for rule in get_args(RulePolicy)
}
POLICIES: dict[str, type[Policy]] = RULES | {
    rule.model_fields["name"].default: rule for rule in get_args(GivenPolicy)
}
_PRESET = re.compile(r"(I?Q|TQ|B?F|MXFP|NVFP)[0-9]\w*")
_SHA256 = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{56}\b")
#: Values that tell a reader nothing.
SILENT: tuple[Any, ...] = (None, {}, "", "auto", QUANTISED_TYPES)
_LONGEST_LABEL = 60


def spell(policy: Policy, budget: str | None = None) -> str:
    """The text that `parse` reads as this policy; defaults are left away."""
    return _spelt(policy, is_label=False) + (f"@{budget}" if budget else "")


def parse(text: str, option: str = "--policy") -> tuple[Policy, str | None]:
    """The policy and the budget of a text, the budget as it stands there.

    Args:
        text: Policy as `spell` writes it.
        option: Option that it was given to, for messages.

    Raises:
        UsageError: there is no such policy, or it has no such parameter.
    """
    spelt, at, budget = text.strip().partition("@")
    name, *words = spelt.split(":")
    if not words and _PRESET.fullmatch(name.upper()):
        name, words = "preset", [name]
    rule = POLICIES.get(name)
    if rule is None or bool(at) != bool(budget):
        problem, remedy = f"unknown policy {text!r}", f"use {', '.join(forms())}"
        raise UsageError("plan", option, problem, remedy)
    values: dict[str, Any] = {}
    try:
        for word in words:
            _take(rule, word, values)
    except ValueError as error:
        problem = f"{word!r} of {spelt!r} {error}"
        raise UsageError("plan", option, problem, f"use {form(rule)}") from None
    for name, field in rule.parameters().items():
        if field.is_required and name not in values:
            problem = f"policy {spelt!r} lacks its {name}"
            raise UsageError("plan", option, problem, f"use {form(rule)}")
    return rule(**values), budget or None


def label(policy: Policy) -> str:
    """The policy for file names and rows: spelt, without what a run fills in."""
    text = _SHA256.sub(r"\1", _spelt(policy, is_label=True))
    text = re.sub(r"[:=+]+", "-", text.replace(" ", ""))
    if len(text) <= _LONGEST_LABEL and not set(text) & {"%", "*"}:
        return text
    return f"{policy.name}-{crc32(policy.model_dump_json().encode()):08x}"


def describe(policy: Policy) -> str:
    """The policy as it is spelt, and the value of every parameter with an option."""
    values = [
        f"{field.parameter.flag[2:]} {text}"
        for name, field in policy.parameters().items()
        if field.parameter.flag and (value := getattr(policy, name)) not in SILENT
        for text in value_texts(value)
    ]
    details = f" ({', '.join(values)})" if values else ""
    return _SHA256.sub(r"\1", spell(policy)) + details


def forms() -> list[str]:
    """How each policy that can be asked for is spelt."""
    return [form(rule) for rule in RULES.values()]


def form(rule: type[Policy]) -> str:
    """How a policy is spelt, such as `fastewq[:train][:lowN]`."""
    if rule is PresetPolicy:
        return "a preset such as Q4_K_M"
    text: str = rule.model_fields["name"].default
    for field in rule.parameters().values():
        value = "N" if field.is_number else field.parameter.metavar or "TEXT"
        value = field.parameter.word + value.replace(",", "+")
        value = "|".join(x for x in field.choices if x != field.default) or value
        if not field.parameter.is_recorded:
            text += f":{value}" if field.is_required else f"[:{value}]"
    return text


def read(field: PolicyField, text: str) -> Any:
    """The value of a parameter from its text; of one by role, a single role's.

    Raises:
        ValueError: with what is wrong, as the end of a sentence about the text.
    """
    if field.choices:
        if text not in field.choices:
            raise ValueError(f"is none of {', '.join(field.choices)}")
        return text
    if field.is_number:
        try:
            number = field.value_type(text)
        except ValueError:
            raise ValueError("is not a number") from None
        if problem := field.parameter.problem(number):
            raise ValueError(problem)
        return number
    name = _type_name if isinstance(field.parameter, TypeParameter) else _unquoted
    if field.value_type is str:
        return name(text)
    if field.value_type is tuple:
        return tuple(name(part) for part in re.split(r"[+,]", text))
    role, _, ggml_type = text.rpartition("=")
    return {_unquoted(role.strip()) or "*": name(ggml_type)}


def _take(rule: type[Policy], word: str, values: dict[str, Any]) -> None:
    """Add the parameter that a word names to a policy's values.

    Raises:
        ValueError: there is none, the value is none, or another one was given.
    """
    name = _parameter_of(rule, word, values)
    field = rule.parameters()[name]
    value = read(field, word.removeprefix(field.parameter.word))
    if isinstance(value, dict):
        value = {**values.get(name, {}), **value}
    elif values.get(name, value) != value:
        raise ValueError("is a second value of one parameter")
    values[name] = value


def _parameter_of(rule: type[Policy], word: str, given: Container[str]) -> str:
    """The name of the parameter that a word gives.

    Raises:
        ValueError: there is none.
    """
    for name, field in rule.parameters().items():
        prefix = field.parameter.word
        if field.choices:
            pattern = "|".join(field.choices)
        elif field.is_number:
            pattern = f"{prefix}[0-9.].*"
        elif prefix or name in given:
            pattern = f"{prefix}.+" if prefix else "(?!)"
        else:
            pattern = r"[^=]+\+[^=]+" if field.value_type is tuple else "[^+=]+"
        if re.fullmatch(pattern, word, re.DOTALL):
            return name
    raise ValueError("is no parameter of it")


def _spelt(policy: Policy, *, is_label: bool) -> str:
    if isinstance(policy, PresetPolicy) and _PRESET.fullmatch(policy.preset):
        return policy.preset
    parts: list[str] = [policy.name]
    for name, field in policy.parameters().items():
        value, is_left_out = getattr(policy, name), field.parameter.is_recorded
        if value != field.default and not (is_left_out and is_label):
            parts += [f"{field.parameter.word}{text}" for text in value_texts(value)]
    return ":".join(parts)


def value_texts(value: Any) -> list[str]:
    """A parameter's value as it is spelt; by role, one text each."""
    if isinstance(value, dict):
        return [
            _quoted(name) if role == "*" else f"{_quoted(role)}={_quoted(name)}"
            for role, name in value.items()
        ]
    if isinstance(value, tuple):
        return ["+".join(map(_quoted, value))]
    if isinstance(value, float):
        return [repr(value).removesuffix(".0")]
    return [_quoted(str(value))]


def _quoted(text: str) -> str:
    return re.sub(
        r"[^\w .*-]", lambda m: "".join(f"%{b:02X}" for b in m[0].encode()), text
    )


def _unquoted(text: str) -> str:
    def decoded(match: re.Match[str]) -> str:
        return bytes.fromhex(match[0].replace("%", "")).decode(errors="replace")

    return re.sub(r"(%[0-9A-F]{2})+", decoded, text)


def _type_name(text: str) -> str:
    """`raw`, `auto`, or a ggml type in its own spelling."""
    stripped = text.strip()
    return stripped.lower() if stripped.lower() in {"raw", "auto"} else stripped.upper()

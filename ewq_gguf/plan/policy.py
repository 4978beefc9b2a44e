"""Is a policy one that can be planned?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ewq_gguf import ggml_types
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.records import (
    EwqPolicy,
    FastEwqPolicy,
    GivenPolicy,
    OptimalPolicy,
    Policy,
    PresetPolicy,
)
from ewq_gguf.records.parameter import TypeParameter

#: Most precisions of a ladder; ggml has no more types that rise in size.
_MAX_RUNGS = 12


def check_policy(
    policy: Policy, *, has_budget: bool = False, has_imatrix: bool = False
) -> None:
    """Refuse unknown types and impossible parameters before any work.

    Raises:
        UsageError: naming the parameter.
        InputError: a type needs an importance matrix.
    """
    if has_budget and policy.takes_budget == "never":
        raise UsageError(
            "plan",
            "--budget",
            f"policy {policy.name} has no types to choose from",
            "use it with --policy ewq or fastewq",
        )
    if not has_budget and policy.takes_budget == "must":
        raise UsageError(
            "plan",
            f"--policy {policy.name}",
            "has no size to fill",
            "give one, such as --budget 6GiB, --budget 30% or --bpw 4.5",
        )
    if isinstance(policy, GivenPolicy | PresetPolicy):
        return
    for name, field in policy.parameters().items():
        value, flag = getattr(policy, name), field.parameter.flag
        if field.is_number and value is not None:
            if problem := field.parameter.problem(value):
                raise UsageError("plan", flag, f"{value} {problem}", "change it")
        elif isinstance(field.parameter, TypeParameter):
            # Policy optimal makes a matrix where none is given.
            has_matrix = has_imatrix or isinstance(policy, OptimalPolicy)
            for ggml_type in _types_of(value):
                _check_type(flag or f"--policy {policy.name}", ggml_type, has_matrix)
    if isinstance(policy, OptimalPolicy):
        _check_optimal(policy)
    elif isinstance(policy, EwqPolicy | FastEwqPolicy):
        _check_ladder(policy.ladder)
        if (
            isinstance(policy, FastEwqPolicy)
            and policy.n_low
            and len(policy.ladder) < 3
        ):
            raise UsageError(
                "plan",
                "--low-layers",
                "needs a ladder of three",
                "such as --ladder Q4_K,Q8_0,raw",
            )


def _types_of(value: str | tuple[str, ...] | dict[str, str]) -> Iterable[str]:
    """The types of a parameter; `auto` is none."""
    if isinstance(value, str):
        return () if value == "auto" else (value,)
    return value.values() if isinstance(value, dict) else value


def _check_optimal(policy: OptimalPolicy) -> None:
    if not policy.types:
        raise UsageError("plan", "--types", "is empty", "name types, such as Q8_0,Q4_K")
    for role in {*policy.floors, *policy.ceilings}:
        floor, ceiling = (
            by_role.get(role, by_role.get("*"))
            for by_role in (policy.floors, policy.ceilings)
        )
        if floor and ceiling and _bits(floor) > _bits(ceiling):
            raise UsageError(
                "plan",
                "--floor",
                f"{floor} has more bits than the ceiling {ceiling} of {role}",
                "lower it, or raise the ceiling",
            )


def _check_ladder(ladder: Sequence[str]) -> None:
    if not 2 <= len(ladder) <= _MAX_RUNGS:
        raise UsageError(
            "plan",
            "--ladder",
            f"has {len(ladder)} precisions",
            f"name 2 to {_MAX_RUNGS}, low to high, such as Q4_K,Q8_0,raw",
        )
    bits = [_bits(name) for name in ladder]
    if bits[-1] > 16:
        raise UsageError(
            "plan",
            "--ladder",
            f"{ladder[-1]} has more than the 16 bits of raw",
            "let it end with raw, such as Q4_K,Q8_0,raw",
        )
    if sorted(set(bits)) != bits:
        raise UsageError(
            "plan",
            "--ladder",
            f"{','.join(ladder)} does not rise from low to high",
            "sort it, such as Q4_K,Q8_0,raw",
        )


def _bits(name: str) -> float:
    return 16.0 if name == "raw" else ggml_types.bits_per_weight(name)


def _check_type(option: str, name: str, has_imatrix: bool) -> None:
    if name == "raw":
        return
    if name not in ggml_types.PLANNABLE:
        raise UsageError(
            "plan",
            option,
            f"{name!r} is not a ggml type",
            f"use raw or one of {', '.join(ggml_types.PLANNABLE)}",
        )
    if name in ggml_types.IMATRIX_TYPES and not has_imatrix:
        raise InputError(
            "plan",
            option,
            f"{name} needs an importance matrix, and none is given",
            "choose a type that needs none, such as Q2_K or IQ3_S, or give --imatrix",
        )

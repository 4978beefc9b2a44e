"""Is a policy one that can be planned?"""

from __future__ import annotations

from collections.abc import Sequence

from ewq_gguf import ggml_types
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.records import (
    EwqPolicy,
    GivenPolicy,
    OptimalPolicy,
    Policy,
    PresetPolicy,
    UniformPolicy,
)

#: Of precisions in a ladder; ggml has no more types that rise in size.
_MAX_RUNGS = 12


def check_policy(
    policy: Policy, *, has_budget: bool = False, has_imatrix: bool = False
) -> None:
    """Refuse unknown types and impossible parameters before any work.

    Raises:
        UsageError: naming the parameter.
        InputError: a type needs an importance matrix.
    """
    is_given = isinstance(policy, GivenPolicy)
    if has_budget and (is_given or isinstance(policy, UniformPolicy | PresetPolicy)):
        raise UsageError(
            "plan",
            "--budget",
            f"policy {policy.name} has no types to choose from",
            "use it with --policy ewq or fastewq",
        )
    if isinstance(policy, GivenPolicy) or isinstance(policy, PresetPolicy):
        return
    if isinstance(policy, OptimalPolicy):
        _check_optimal(policy, has_budget)
        return
    for option, name in (
        ("--embedding-type", policy.embedding_type),
        ("--output-type", policy.output_type),
    ):
        if name != "auto":
            _check_type(option, name, has_imatrix)
    if isinstance(policy, UniformPolicy):
        _check_type("--policy uniform", policy.ggml_type, has_imatrix)
        return
    for name in policy.ladder:
        _check_type("--ladder", name, has_imatrix)
    _check_ladder(policy.ladder)
    if isinstance(policy, EwqPolicy):
        _check_at_least("--factor", policy.factor, 0)
        _check_at_least("--epsilon", policy.epsilon, 0)
        _check_at_least("--bins", policy.n_bins, 2)
    else:
        _check_at_least("--low-layers", policy.n_low, 0)
        if policy.n_low and len(policy.ladder) < 3:
            raise UsageError(
                "plan",
                "--low-layers",
                "needs a ladder of three",
                "such as --ladder Q4_K,Q8_0,raw",
            )


def _check_optimal(policy: OptimalPolicy, has_budget: bool) -> None:
    if not has_budget:
        raise UsageError(
            "plan",
            "--policy optimal",
            "has no size to fill",
            "give one, such as --budget 6GiB, --budget 30% or --bpw 4.5",
        )
    if not policy.types:
        raise UsageError("plan", "--types", "is empty", "name types, such as Q8_0,Q4_K")
    # A matrix is made where none is given.
    named = (
        ("--types", policy.types),
        ("--floor", policy.floors.values()),
        ("--ceiling", policy.ceilings.values()),
    )
    for option, names in named:
        for name in names:
            _check_type(option, name, has_imatrix=True)
    for of in {*policy.floors, *policy.ceilings}:
        floor, ceiling = (
            named.get(of, named.get("*")) for named in (policy.floors, policy.ceilings)
        )
        if floor and ceiling and _bits(floor) > _bits(ceiling):
            raise UsageError(
                "plan",
                "--floor",
                f"{floor} has more bits than the ceiling {ceiling} of {of}",
                "lower it, or raise the ceiling",
            )
    _check_at_least("--effort", policy.effort_minutes, 0)


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


def _check_at_least(flag: str, value: float, least: int) -> None:
    if not value >= least:  # NaN is not
        raise UsageError(
            "plan", flag, f"{value} is not {least} or more", "give a larger number"
        )


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

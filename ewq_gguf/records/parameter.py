"""Parameters of policies: how each is given as an option, spelt and checked."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel


@dataclass(frozen=True)
class Parameter:
    """How a parameter of a policy is given, spelt and checked.

    Attributes:
        flag: Long option of the command line; empty where there is none.
        word: Characters before the value in the grammar, such as the x of `x0.8`;
            empty where the value alone is clear.
        help: Line of the option's help.
        metavar: Placeholder of the value in the option's help.
        least: Smallest number allowed.
        above: Number that the value must exceed.
        most: Largest number allowed.
        is_recorded: Whether a run fills it in, so that labels leave it out.
    """

    flag: str = ""
    word: str = ""
    help: str = ""
    metavar: str | None = None
    least: float | None = None
    above: float | None = None
    most: float | None = None
    is_recorded: bool = False

    def problem(self, number: float) -> str | None:
        """The end of a sentence about a number that is not allowed, else None."""
        if (
            (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and number < inf
            and (self.most is None or number <= self.most)
        ):
            return None
        if self.above is not None:
            return f"is not a number above {self.above:g}"
        upper = "up" if self.most is None else f"to {self.most:g}"
        return f"is not a number from {self.least or 0:g} {upper}"


@dataclass(frozen=True)
class TypeParameter(Parameter):
    """A parameter whose values are ggml types, `raw`, `auto` or a preset."""


@dataclass(frozen=True)
class PolicyField:
    """A field of a policy that has a Parameter.

    Attributes:
        parameter: How it is given.
        value_type: int, float, str, tuple of types, or dict of types by role.
        choices: All values, where they are few; else empty.
        default: Value that need not be given; meaningless where one is required.
        is_required: Whether there is no default.
    """

    parameter: Parameter
    value_type: type
    choices: tuple[str, ...]
    default: Any
    is_required: bool

    @property
    def is_number(self) -> bool:
        """Whether its values are numbers."""
        return self.value_type in (int, float)


def policy_fields(model: type[BaseModel]) -> dict[str, PolicyField]:
    """The fields of a record that have a Parameter, by their names."""
    fields = {}
    for name, info in model.model_fields.items():
        types = get_args(info.annotation)
        is_choice = get_origin(info.annotation) is Literal
        value_type = next((t for t in types if t is not type(None)), None)
        if is_choice:
            value_type = str
        elif type(None) not in types:
            value_type = get_origin(info.annotation) or info.annotation
        for parameter in info.metadata:
            if isinstance(parameter, Parameter):
                assert isinstance(value_type, type)
                fields[name] = PolicyField(
                    parameter,
                    value_type,
                    types if is_choice else (),
                    info.default,
                    info.is_required(),
                )
    return fields

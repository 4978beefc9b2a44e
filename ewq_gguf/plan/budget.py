"""Algorithm 1: the decision fitted to what a file may take (arXiv:2503.04704, 3.4).

1. Everything raw fits: quantise nothing.
2. The decision fits: promote.
3. It does not: take the largest uniform type of the ladder that fits, and promote.
4. None fits: demote below the ladder, lowest priority first, until it does.

Below the ladder is TQ1_0; with an importance matrix IQ2_XXS and IQ1_M, which lose less.
A group with a tensor the matrix has no entry for passes over the steps that need one.

To promote is to pass over the groups again and again, highest priority first, one step
each; what does not fit is skipped, and the passes end when one changes nothing. A step
counts in types as written: where llama-quantize's fallback makes two rungs the same,
they are one. More budget never means fewer bytes: the smaller budget's first refusal is
an acceptance of the larger one's, which is then ahead for good.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from ewq_gguf.ggml_types import bits_per_weight, tensor_bytes, written_type
from ewq_gguf.plan.groups import AllocationGroup
from ewq_gguf.plan.importance import needs_entry
from ewq_gguf.plan.size_target import SizeLimit
from ewq_gguf.plan.sizes import padded
from ewq_gguf.records import LayoutTensor

#: Below every ladder that does not go as low: the paper's 1.58-bit type.
FLOOR = "TQ1_0"
#: With an importance matrix, low to high.
_IMATRIX_FLOOR = ("IQ1_M", "IQ2_XXS")


@dataclass(frozen=True)
class Fitted:
    """What `fit` reached: the type asked for each group; see records.plan.Budget."""

    types: tuple[str, ...]
    case: Literal[1, 2, 3, 4]
    start: str
    n_steps: int


def group_bytes(tensors: Sequence[LayoutTensor], ggml_type: str) -> int:
    """Bytes of some tensors in a file where all are asked to have this type."""
    return sum(
        padded(tensor_bytes(written_type(ggml_type, tensor.shape[-1]), tensor.shape))
        for tensor in tensors
    )


def fit(
    groups: Sequence[AllocationGroup],
    ladder: Sequence[str],
    raw: str,
    limit: SizeLimit,
    *,
    other_bytes: int,
    demote_decision: bool = False,
    entries: Collection[str] | None = None,
) -> Fitted:
    """Choose a type for every group so that the file stays within the limit.

    Args:
        groups: with their decisions.
        ladder: types from low to high, no `raw` among them but by its own name.
        raw: the source's type.
        limit: of the file.
        other_bytes: of the file without the groups.
        demote_decision: before a uniform type is taken, demote what was decided below
            the highest rung, lowest priority first.
        entries: names of the tensors that an importance matrix weighs; None without
            one.

    Raises:
        InputError: the limit is below what can be reached, or above what raw takes.
    """
    floor = [
        name
        for name in ((FLOOR,) if entries is None else _IMATRIX_FLOOR)
        if bits_per_weight(name) < bits_per_weight(ladder[0])
    ]
    rungs = [*floor, *ladder]
    # What no rule decided is raw, whatever the ladder ends with.
    top, undecided = len(rungs) - 1, [*rungs, raw]
    choices = [
        _Choices(
            group,
            undecided if group.rung is None else [*rungs, ladder[-1]],
            raw,
            entries or (),
        )
        for group in groups
    ]
    state = _State(groups, undecided, choices, limit.n_bytes - other_bytes)
    uniform = sorted(
        (
            i
            for i in range(len(floor), top + 1)
            if bits_per_weight(rungs[i]) < bits_per_weight(raw)
        ),
        key=lambda i: -state.bytes_at([i] * len(groups)),
    )
    raw_types = tuple(group.fixed or raw for group in groups)
    most = other_bytes + sum(
        group_bytes(group.tensors, name)
        for group, name in zip(groups, raw_types, strict=True)
    )
    least = other_bytes + sum(min(c.sizes[: uniform[-1] + 1]) for c in state.choices)
    limit.check_reached(least, most, "this ladder reaches", "another --ladder")
    if limit.n_bytes >= most:
        return Fitted(raw_types, 1, "raw", 0)
    state.begin([top + 1 if u.rung is None else u.rung + len(floor) for u in groups])
    if state.room >= 0:
        return state.fitted(2, "decision", state.promote())
    if demote_decision:
        n_steps = state.demote(lambda rung: len(floor) < rung < top)
        if state.room >= 0:
            return state.fitted(3, "decision", n_steps)
    for rung in uniform:
        state.begin([rung] * len(groups))
        if state.room >= 0:
            return state.fitted(3, state.types[rung], state.promote())
    n_steps = state.demote(lambda rung: True)
    return state.fitted(4, state.types[uniform[-1]], n_steps)


class _State:
    """The groups' rungs, and the room that is left."""

    def __init__(
        self,
        groups: Sequence[AllocationGroup],
        types: Sequence[str],
        choices: Sequence[_Choices],
        room: int,
    ) -> None:
        self.types = types
        self.order = sorted(range(len(groups)), key=lambda i: groups[i].priority)
        self.choices = choices
        self.all_room = room
        self.begin([0] * len(groups))

    def bytes_at(self, rungs: Sequence[int]) -> int:
        return sum(c.sizes[rung] for c, rung in zip(self.choices, rungs, strict=True))

    def begin(self, rungs: Sequence[int]) -> None:
        self.rungs = list(rungs)
        self.room = self.all_room - self.bytes_at(rungs)

    def move(self, group: int, rung: int) -> None:
        sizes = self.choices[group].sizes
        self.room -= sizes[rung] - sizes[self.rungs[group]]
        self.rungs[group] = rung

    def promote(self) -> int:
        """Step up, highest priority first, until nothing fits; return the steps."""
        n_steps, is_done = 0, False
        while not is_done:
            is_done = True
            for i in reversed(self.order):
                rung = self.choices[i].above(self.rungs[i])
                if rung is None:
                    continue
                sizes = self.choices[i].sizes
                if sizes[rung] - sizes[self.rungs[i]] <= self.room:
                    self.move(i, rung)
                    n_steps, is_done = n_steps + 1, False
        return n_steps

    def demote(self, may: Callable[[int], bool]) -> int:
        """Step down from rungs that may, lowest priority first, until it fits."""
        n_steps, is_done = 0, False
        while not is_done:
            is_done = True
            for i in self.order:
                rung = self.choices[i].below(self.rungs[i])
                if self.room < 0 and rung is not None and may(self.rungs[i]):
                    self.move(i, rung)
                    n_steps, is_done = n_steps + 1, False
        return n_steps

    def fitted(self, case: Literal[2, 3, 4], start: str, n_steps: int) -> Fitted:
        types = tuple(
            choices.asked[rung]
            for choices, rung in zip(self.choices, self.rungs, strict=True)
        )
        return Fitted(types, case, start, n_steps)


class _Choices:
    """What one group is asked to be on each rung, its bytes, and which are steps."""

    def __init__(
        self,
        group: AllocationGroup,
        types: Sequence[str],
        raw: str,
        entries: Collection[str],
    ) -> None:
        columns = [tensor.shape[-1] for tensor in group.tensors]
        lacking = [t.shape[-1] for t in group.tensors if t.name not in entries]
        asked, name = [], raw
        for ggml_type in reversed(types):
            if not any(needs_entry(ggml_type, n) for n in lacking):
                name = ggml_type
            asked.append(group.fixed or name)
        self.asked = asked[::-1]
        self.sizes = [group_bytes(group.tensors, name) for name in self.asked]
        self.written = [[written_type(name, n) for n in columns] for name in self.asked]

    def above(self, rung: int) -> int | None:
        """The next rung that is written in other types and not smaller."""
        rungs = range(rung + 1, len(self.sizes))
        return next(
            (
                i
                for i in rungs
                if self.sizes[i] >= self.sizes[rung]
                and self.written[i] != self.written[rung]
            ),
            None,
        )

    def below(self, rung: int) -> int | None:
        """The next lower rung that is smaller."""
        rungs = range(rung - 1, -1, -1)
        return next((i for i in rungs if self.sizes[i] < self.sizes[rung]), None)

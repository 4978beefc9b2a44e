"""Algorithm 1: a decision fitted to a file size (arXiv:2503.04704, 3.4).

1. Everything raw fits: quantise nothing.
2. The decision fits: promote.
3. It does not: take the largest uniform type of the ladder that fits, and promote.
4. None fits: demote below the ladder, lowest priority first, until it does.

Below the ladder is TQ1_0; with an importance matrix IQ2_XXS and IQ1_M, which lose less.
A group with a tensor the matrix has no entry for passes over the steps that need one.

To promote is to pass over the groups again and again, highest priority first, one step
each; steps that do not fit are skipped, and the passes end when one changes nothing. A
step counts in types as written: where llama-quantize's fallback makes two rungs the
same, they are one. More budget never means fewer bytes: the smaller budget's first
refusal is an acceptance of the larger one's, which is then ahead for good.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
class FittedTypes:
    """The type of each group, and how it was reached; see records.plan.Budget."""

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


def fit_types(
    groups: Sequence[AllocationGroup],
    ladder: Sequence[str],
    raw: str,
    limit: SizeLimit,
    *,
    other_bytes: int,
    demote_decision: bool = False,
    entries: Collection[str] | None = None,
) -> FittedTypes:
    """Choose a type for every group so that the file stays within the limit.

    Args:
        groups: groups with their decisions.
        ladder: types from low to high, with `raw` replaced by its own name.
        raw: type of the source.
        limit: largest size of the file.
        other_bytes: bytes of the file without the groups.
        demote_decision: before a uniform type is taken, demote groups that were decided
            below the highest rung, lowest priority first.
        entries: names of the tensors that an importance matrix weighs; None without
            one.

    Raises:
        InputError: the limit is below what can be reached, or above what raw takes.
    """
    floor = _below(ladder, has_imatrix=entries is not None)
    rungs, n_floor = [*floor, *ladder], len(floor)
    # Groups that no rule decided are raw, whatever the ladder ends with.
    top, undecided = len(rungs) - 1, [*rungs, raw]
    ladders = [
        _GroupLadder(
            group,
            undecided if group.rung is None else [*rungs, ladder[-1]],
            raw,
            entries or (),
        )
        for group in groups
    ]
    order = sorted(range(len(groups)), key=lambda i: groups[i].priority)
    state = _Allocation(ladders, undecided, order, limit.n_bytes - other_bytes)
    uniform = [
        rung
        for rung in range(n_floor, top + 1)
        if bits_per_weight(rungs[rung]) < bits_per_weight(raw)
    ]
    uniform.sort(key=lambda rung: -state.bytes_at([rung] * len(groups)))
    raw_types = tuple(group.fixed or raw for group in groups)
    most = other_bytes + sum(
        group_bytes(group.tensors, name)
        for group, name in zip(groups, raw_types, strict=True)
    )
    least = other_bytes + sum(min(own.sizes[: uniform[-1] + 1]) for own in ladders)
    limit.check_reached(least, most, "this ladder reaches", "another --ladder")
    if limit.n_bytes >= most:
        return FittedTypes(raw_types, 1, "raw", 0)
    decided = [top + 1 if g.rung is None else g.rung + n_floor for g in groups]
    return state.fitted(
        decided, uniform, range(n_floor + 1, top) if demote_decision else range(0)
    )


def _below(ladder: Sequence[str], *, has_imatrix: bool) -> list[str]:
    """Types that groups may be demoted to below the ladder, low to high."""
    types = _IMATRIX_FLOOR if has_imatrix else (FLOOR,)
    return [t for t in types if bits_per_weight(t) < bits_per_weight(ladder[0])]


class _Allocation:
    """The rung of every group, and the bytes that are left."""

    def __init__(
        self,
        ladders: Sequence[_GroupLadder],
        types: Sequence[str],
        order: Sequence[int],
        n_bytes: int,
    ) -> None:
        self._ladders = ladders
        self._types = types
        self._order = order
        self._n_bytes = n_bytes
        self._begin([0] * len(ladders))

    def fitted(
        self, decided: Sequence[int], uniform: Sequence[int], demotable: range
    ) -> FittedTypes:
        """Cases 2 to 4 of the algorithm.

        Args:
            decided: rung of each group by the policy.
            uniform: rungs for all groups, large to small.
            demotable: rungs that the decision may be demoted from, if any.
        """
        self._begin(decided)
        if self._free_bytes >= 0:
            return self._result(2, "decision", self._promote())
        if demotable:
            n_steps = self._demote(demotable)
            if self._free_bytes >= 0:
                return self._result(3, "decision", n_steps)
        for rung in uniform:
            self._begin([rung] * len(self._ladders))
            if self._free_bytes >= 0:
                return self._result(3, self._types[rung], self._promote())
        n_steps = self._demote(range(len(self._types)))
        return self._result(4, self._types[uniform[-1]], n_steps)

    def bytes_at(self, rungs: Sequence[int]) -> int:
        """Bytes of all groups on these rungs."""
        return sum(own.sizes[i] for own, i in zip(self._ladders, rungs, strict=True))

    def _begin(self, rungs: Sequence[int]) -> None:
        self._rungs = list(rungs)
        self._free_bytes = self._n_bytes - self.bytes_at(rungs)

    def _move(self, group: int, rung: int) -> None:
        sizes = self._ladders[group].sizes
        self._free_bytes -= sizes[rung] - sizes[self._rungs[group]]
        self._rungs[group] = rung

    def _promote(self) -> int:
        """Step up, highest priority first, until nothing fits; return the steps."""
        n_steps, is_done = 0, False
        while not is_done:
            is_done = True
            for i in reversed(self._order):
                rung = self._ladders[i].above(self._rungs[i])
                if rung is None:
                    continue
                sizes = self._ladders[i].sizes
                if sizes[rung] - sizes[self._rungs[i]] <= self._free_bytes:
                    self._move(i, rung)
                    n_steps, is_done = n_steps + 1, False
        return n_steps

    def _demote(self, demotable: range) -> int:
        """Step down from these rungs, lowest priority first, until the file fits."""
        n_steps, is_done = 0, False
        while not is_done:
            is_done = True
            for i in self._order:
                rung = self._ladders[i].below(self._rungs[i])
                is_allowed = self._rungs[i] in demotable
                if self._free_bytes < 0 and rung is not None and is_allowed:
                    self._move(i, rung)
                    n_steps, is_done = n_steps + 1, False
        return n_steps

    def _result(self, case: Literal[2, 3, 4], start: str, n_steps: int) -> FittedTypes:
        types = tuple(
            own.types[rung]
            for own, rung in zip(self._ladders, self._rungs, strict=True)
        )
        return FittedTypes(types, case, start, n_steps)


class _GroupLadder:
    """The type that one group is asked to have on each rung, and its bytes there."""

    def __init__(
        self,
        group: AllocationGroup,
        types: Sequence[str],
        raw: str,
        entries: Collection[str],
    ) -> None:
        columns = [tensor.shape[-1] for tensor in group.tensors]
        lacking = [t.shape[-1] for t in group.tensors if t.name not in entries]
        own, name = [], raw
        for ggml_type in reversed(types):
            if not any(needs_entry(ggml_type, n) for n in lacking):
                name = ggml_type
            own.append(group.fixed or name)
        self.types = own[::-1]
        self.sizes = [group_bytes(group.tensors, name) for name in self.types]
        self._written = [
            [written_type(name, n) for n in columns] for name in self.types
        ]

    def above(self, rung: int) -> int | None:
        """The next rung that is written in other types and not smaller."""
        rungs = range(rung + 1, len(self.sizes))
        return next(
            (
                i
                for i in rungs
                if self.sizes[i] >= self.sizes[rung]
                and self._written[i] != self._written[rung]
            ),
            None,
        )

    def below(self, rung: int) -> int | None:
        """The next lower rung that is smaller."""
        rungs = range(rung - 1, -1, -1)
        return next((i for i in rungs if self.sizes[i] < self.sizes[rung]), None)

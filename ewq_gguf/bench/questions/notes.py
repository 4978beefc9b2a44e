"""Sentences about what was not asked, for below a table."""

from __future__ import annotations

from collections.abc import Sequence

from ewq_gguf.records.scores import RowFault, TooLong

#: Rows that are named; of more, the number is said.
_MAX_NAMED = 5


def too_long_notes(skipped: Sequence[TooLong]) -> list[str]:
    """How many prompts were longer than the context."""
    if not skipped:
        return []
    longest = max(one.n_tokens for one in skipped)
    return [
        f"{len(skipped)} prompts were not asked: they need up to {longest:,} tokens of "
        f"context, there are {skipped[0].n_ctx:,}."
    ]


def fault_notes(faults: Sequence[RowFault]) -> list[str]:
    """Rows that were left out or repeat another, the first of them by name."""
    notes = []
    for is_left_out, what in ((True, "left out"), (False, "repeated, and kept")):
        some = [fault for fault in faults if fault.is_left_out == is_left_out]
        if some:
            notes.append(f"{len(some)} rows of the files were {what}:")
        notes += [f"  {f.file} row {f.row} {f.problem}" for f in some[:_MAX_NAMED]]
        if len(some) > _MAX_NAMED:
            notes.append(f"  and {len(some) - _MAX_NAMED} more, in --json")
    return notes

"""Verification: the contents of a made file, compared with its plan."""

from __future__ import annotations

from typing import Literal

from ewq_gguf.records.base import Part, Record
from ewq_gguf.records.companion import Companion


class VerifiedTensor(Part):
    """One tensor's types.

    Attributes:
        name: in the GGUF.
        planned_type: the plan's type, after fallback.
        found_type: in the file.
    """

    name: str
    planned_type: str
    found_type: str


class Exactness(Part):
    """How far a tensor that a plan calls exact is from the base's.

    Attributes:
        n_wrong: weights that, rounded to the base's dtype, are not the base's.
        max_error: the farthest of them.
        max_rounding: how far the others are before they are rounded; 0 where the base
            holds the type's own values.
    """

    n_wrong: int
    max_error: float
    max_rounding: float


class Verification(Record):
    """A file that is what its plan says; another raises VerificationError.

    Attributes:
        plan_sha256: hash of the plan's canonical JSON.
        file_sha256: hash of the whole file.
        planned_size_bytes: the prediction.
        found_size_bytes: size of the file.
        tensors: every tensor.
        prompt: prompt of the load check; None where the file was not loaded.
        answer: its greedy continuation.
        exact: by tensor, how exact those are that were planned so; empty where there
            is none, or the base was not at hand.
        companions: the verified files beside it.
    """

    schema_name: Literal["ewq.verification"] = "ewq.verification"
    schema_version: Literal[1] = 1

    plan_sha256: str
    file_sha256: str
    planned_size_bytes: int
    found_size_bytes: int
    tensors: tuple[VerifiedTensor, ...]
    prompt: str | None
    answer: str | None
    exact: dict[str, Exactness] = {}
    companions: tuple[Companion, ...] = ()

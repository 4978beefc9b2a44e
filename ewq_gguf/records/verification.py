"""Verification: what was found in the file that came out."""

from __future__ import annotations

from typing import Literal

from ewq_gguf.records.base import Part, Record


class VerifiedTensor(Part):
    """One tensor's types.

    Attributes:
        name: in the GGUF.
        planned_type: of the plan, after fallback.
        found_type: in the file.
    """

    name: str
    planned_type: str
    found_type: str


class Verification(Record):
    """A file that is what its plan says; another raises VerificationError.

    Attributes:
        plan_sha256: of the plan's canonical JSON.
        file_sha256: of the whole file.
        planned_size_bytes: the prediction.
        found_size_bytes: of the file.
        tensors: every tensor.
        prompt: what the file was asked; None where it was not loaded.
        answer: its greedy continuation.
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

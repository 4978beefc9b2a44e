"""The engine of every experiment: its files are measured alike and recorded.

An experiment declares its files, where they and their measurements are kept, and what
is recorded of them. The order of work is the same for all, and everything that would
make the last step fail is looked at first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from ewq_gguf import store
from ewq_gguf.bench.files import check_measurable
from ewq_gguf.bench.runner import Request
from ewq_gguf.errors import InputError
from ewq_gguf.records import Plan, Record, load_record
from ewq_gguf.stages.converting import base_file
from ewq_gguf.stages.run import Run


@dataclass(frozen=True)
class ExperimentFile:
    """A file of an experiment, before it is made.

    Attributes:
        name: its name in the experiment.
        plan: the plan that it is made from; None for the base itself.
    """

    name: str
    plan: Plan | None


M = TypeVar("M")
M_co = TypeVar("M_co", covariant=True)
R = TypeVar("R", bound=Record)


class FileStore(Protocol[M_co]):
    """A place of files and measurements: a folder that stays, or the cache."""

    @property
    def run(self) -> Run:
        """The model and the options."""

    @property
    def request(self) -> Request:
        """The measurement of every file."""

    def check(self, files: Sequence[ExperimentFile]) -> None:
        """Refuse what could not be made or written.

        Raises:
            UsageError: something else is there, and would have to be replaced.
            ResourceError: the disk is too small.
        """

    def measure(
        self, files: Sequence[ExperimentFile], request: Request
    ) -> Sequence[M_co]:
        """Make and measure what is not there yet; the request has the base.

        Raises:
            EwqError: a stage failed; the message says what to do.
        """


def run_experiment(
    files: Sequence[ExperimentFile],
    place: FileStore[M],
    record: Callable[[Request, Sequence[M]], R],
) -> R:
    """Measure an experiment's files.

    Args:
        files: the files, in order.
        place: where they and their measurements are kept.
        record: makes the record of the measurements, in the same order; the request
            has the base.

    Raises:
        EwqError: a stage failed; the message says what to do.
    """
    place.check(files)
    base = base_file(place.run)
    check_measurable(base, place.request.n_ctx)
    place.check(files)  # the base took its part of the disk
    request = replace(place.request, base=base)
    return record(request, place.measure(files, request))


def existing(kind: type[R], out: Path, stage: str, *, force: bool) -> R | None:
    """The record that is there; None where there is none, or it is to be replaced.

    Raises:
        UsageError: another file is there.
    """
    if force or not out.exists():
        return None
    try:
        return load_record(kind, out, stage)
    except InputError:
        raise store.already_exists(out, stage) from None

"""The engine of every experiment: plan files, measure each alike, record, refuse early.

An experiment declares its files and what is recorded of their numbers (`Design`), and
where its files and measurements are kept (`FileStore`). The order of work is the same
for all, and everything that would make the last step fail is looked at first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from ewq_gguf import store
from ewq_gguf._version import __version__
from ewq_gguf.bench.files import check_measurable
from ewq_gguf.bench.runner import Request
from ewq_gguf.errors import InputError
from ewq_gguf.fastewq.rows import rows_in_use, rows_sha256
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.records import Plan, Record, load_record
from ewq_gguf.stages.converting import base_file
from ewq_gguf.stages.run import Run


@dataclass(frozen=True)
class Setting:
    """A model and how the files of an experiment are measured.

    Attributes:
        run: the model, the options, and everything read of it.
        request: measurement of every file; the model's base joins it.
    """

    run: Run
    request: Request

    def sha256(self, spec: object) -> str:
        """SHA-256 of everything that an experiment's record depends on.

        Args:
            spec: the experiment's own settings; their repr tells them apart.
        """
        options = self.run.options
        files = [
            None if path is None else store.sha256_file(path)
            for path in (options.imatrix, options.calibration)
        ]
        parts = (
            __version__,
            LLAMA_CPP_COMMIT,
            self.run.toolchain.key,
            self.run.identity.fingerprint,
            self.request.parameters().model_dump_json(),
            files,
            rows_sha256(rows_in_use()),
            spec,
        )
        return store.sha256_text(repr(parts))


@dataclass(frozen=True)
class ExperimentFile:
    """A file of an experiment, before it is made.

    Attributes:
        name: its name in the experiment.
        plan: the plan that it is made from; None for the base itself.
    """

    name: str
    plan: Plan | None


F = TypeVar("F", bound=ExperimentFile)
F_contra = TypeVar("F_contra", bound=ExperimentFile, contravariant=True)
M = TypeVar("M")
M_co = TypeVar("M_co", covariant=True)
R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Design(Generic[F, M, R]):
    """An experiment's part in the engine's work.

    Attributes:
        files: the files that are measured, in order.
        record: makes the record of their measurements, in the same order; the request
            has the base.
        stage: name of the experiment in errors.
    """

    files: Sequence[F]
    record: Callable[[Request, Sequence[M]], R]
    stage: str


class FileStore(Protocol[F_contra, M_co]):
    """A place of files and measurements: a folder that stays, or the cache."""

    def check(self, files: Sequence[F_contra]) -> None:
        """Refuse what could not be made or written.

        Raises:
            UsageError: something else is there, and would have to be replaced.
            ResourceError: the disk is too small.
        """

    def measure(self, files: Sequence[F_contra], request: Request) -> Sequence[M_co]:
        """Make and measure what is not there yet.

        Args:
            files: the files, each once.
            request: the measurement, with the base.

        Returns:
            The measurement of each file, in order.

        Raises:
            EwqError: a stage failed; the message says what to do.
        """


def run_experiment(
    setting: Setting, design: Design[F, M, R], files: FileStore[F, M], out: Path
) -> R:
    """Measure an experiment's files, and write its record.

    Args:
        setting: the model and the measurement.
        design: the files and the record.
        files: the place of files and measurements.
        out: path of the record; what is there is replaced.

    Raises:
        EwqError: a stage failed; the message says what to do.
    """
    files.check(design.files)
    base = base_file(setting.run)
    check_measurable(base, setting.request.n_ctx)
    files.check(design.files)  # the base took its part of the disk
    request = replace(setting.request, base=base)
    record = design.record(request, files.measure(design.files, request))
    store.write_text(out, record.to_json(), stage=design.stage, force=True)
    return record


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

"""The interface of a task: everything `ewq bench` knows about one is declared here.

A module of `ewq_gguf.bench.tasks` has one class `Task`. The runner, the child process,
the command line, results and tables take all else from it, by the registry there.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.errors import UsageError
from ewq_gguf.records import BenchedFile, BenchParameters, Result, read_journal
from ewq_gguf.records.base import Part

if TYPE_CHECKING:
    from ewq_gguf.bench.job import Job
    from ewq_gguf.bench.runner import Request
    from ewq_gguf.bench.texts.quality import Named

P = TypeVar("P", bound=Part)


@dataclass(frozen=True)
class TaskOption:
    """An option of the command line.

    Attributes:
        flag: its name, with the dashes.
        help: a sentence.
        metavar: the name of its value in the help; None for a number's range.
        default: its value where it is not given.
        minimum: smallest number; None where the value is a text.
        maximum: largest number; None for no limit.
    """

    flag: str
    help: str
    metavar: str | None = None
    default: int | str | None = None
    minimum: int | None = None
    maximum: int | None = None


class Settings(Part):
    """A task's data and how much of it is used, as the child process is told."""

    def parameters(self) -> dict[str, object]:
        """Fields of BenchParameters: hashes instead of paths.

        Raises:
            InputError: the data cannot be read.
        """
        return {}


@dataclass(frozen=True)
class ResultTable:
    """A table of results, as texts.

    Attributes:
        columns: headings; the first column is aligned to the left.
        rows: as many cells each.
        title: heading of the table; empty for none.
        above: a line before the table, such as the name of a file; empty for none.
        notes: lines after the table.
        has_total: whether the last row is the sum of the others.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    above: str = ""
    notes: Sequence[str] = ()
    has_total: bool = False


@dataclass(frozen=True)
class TaskRun:
    """A loaded model and everything else that a task needs to measure it.

    Attributes:
        job: the parameters, the settings and the paths.
        model: the loaded model.
        load: loads another model, such as the base.
        keep: adds a finished piece to the journal.
        tell: reports the share done, 0 to 1.
    """

    job: Job
    model: Named
    load: Callable[[Path], Named]
    keep: Callable[[Part], None]
    tell: Callable[[float], None]

    def finished(self, kind: type[P]) -> dict[str, P]:
        """Pieces that an earlier run, which was killed, has finished; by name."""
        return read_journal(Path(self.job.journal), kind)


class Task(ABC):
    """Something that is measured of a model, in a child process of its own.

    Attributes:
        name: key of the task's process and settings.
        names: the words of `--tasks` that ask for it.
        compared: those among them that compare with the base.
        options: for the command line; the first names the data, where there are any.
        variable: environment variable that names the data, too.
        is_default: whether it is measured without `--tasks` and without its data named.
        remedy: for a task that is asked for without its data.
    """

    name: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    compared: ClassVar[frozenset[str]] = frozenset()
    options: ClassVar[tuple[TaskOption, ...]] = ()
    variable: ClassVar[str] = ""
    is_default: ClassVar[bool] = True
    remedy: ClassVar[str] = "name a file, or `hub`"

    def default_names(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """The names that are measured without `--tasks`, by the options' values."""
        return self.names if self.is_default or self.source(values) else ()

    def source(self, values: Mapping[str, Any]) -> str | None:
        """The data that the options or the environment name."""
        name = self.options[0].flag.strip("-").replace("-", "_")
        return values[name] or os.environ.get(self.variable)

    def settings_of(self, values: Mapping[str, Any]) -> Settings | None:
        """The settings that the options' values give; None where data is missing.

        Raises:
            NetworkError, ResourceError: data cannot be fetched.
        """
        return None

    def parameters(self, request: Request) -> dict[str, object]:
        """Fields of BenchParameters.

        Raises:
            UsageError: data is missing.
            InputError: data cannot be read.
        """
        fields = request.settings_parameters(self.name)
        if fields is None:
            raise UsageError(STAGE, self.options[0].flag, "is missing", self.remedy)
        return fields

    def job_fields(
        self, request: Request, base: BenchedFile | None, parameters: BenchParameters
    ) -> dict[str, object]:
        """Fields of Job besides those that all tasks have."""
        return {}

    @abstractmethod
    def measure(self, run: TaskRun) -> dict[str, object]:
        """Measure a model in a child process.

        Returns:
            Fields of Result.

        Raises:
            EwqError: the data or the model is at fault.
        """

    @abstractmethod
    def tables(self, results: Sequence[Result]) -> list[ResultTable]:
        """The numbers of several files; nothing where it was not measured."""


def merge(fields: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add fields to others; tables of both are joined."""
    for key, value in more.items():
        is_table = isinstance(value, dict) and isinstance(fields.get(key), dict)
        fields[key] = {**fields[key], **value} if is_table else value

"""What the runner and its children tell each other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from ewq_gguf import errors
from ewq_gguf.bench.files import identify
from ewq_gguf.bench.mmlu_data import MmluTask, load_task
from ewq_gguf.bench.precision import Precision
from ewq_gguf.bench.scorer import STAGE
from ewq_gguf.errors import EwqError, ResourceError
from ewq_gguf.records import BenchParameters
from ewq_gguf.records.base import Part

#: Of children: the texts need the base beside the model, the others the model alone.
Kind = Literal["speed", "texts", "mmlu"]

_MARK = "@ewq "
# What ggml's backends, llama.cpp and torch say.
_NO_ROOM = re.compile(
    r"out of memory|(unable to|failed to|can't) allocate|alloc_buffer.* failed", re.I
)


class MmluRequest(Part):
    """Which of MMLU's questions, and how.

    Attributes:
        folder: holds test/ and dev/; absolute.
        n_shots: examples before each question.
        limit: questions per subject; None is all.
    """

    folder: str
    n_shots: int
    limit: int | None

    def task(self) -> MmluTask:
        """Its prompts.

        Raises:
            UsageError, InputError, ToolError: as of `load_task`.
        """
        return load_task(Path(self.folder), n_shots=self.n_shots, limit=self.limit)


class Job(Part):
    """What a child does; its paths are absolute.

    Attributes:
        part: which of the tasks.
        model: the GGUF file, or the folder of a checkpoint.
        precisions: of the checkpoint's tensors that bitsandbytes quantises.
        base: what it is compared with; None for no comparison.
        texts: files, as many as the parameters name.
        mmlu: the questions; None for none.
        parameters: what was asked.
        journal: gets each finished part, a line of JSON.
        failure: gets the error that ended the child, where it is one of ours.
    """

    part: Kind
    model: str
    precisions: dict[str, Precision]
    base: str | None
    texts: tuple[str, ...]
    mmlu: MmluRequest | None
    parameters: BenchParameters
    journal: str
    failure: str


class Failure(Part):
    """One of our errors, on its way from a child.

    Attributes:
        kind: name of its class.
        stage: as the error's.
        subject: likewise.
        problem: likewise.
        remedy: likewise.
    """

    kind: str
    stage: str
    subject: str | None
    problem: str
    remedy: str

    @classmethod
    def of(cls, error: EwqError) -> Failure:
        """An error as a message."""
        return cls(
            kind=type(error).__name__,
            stage=error.stage,
            subject=error.subject,
            problem=error.problem,
            remedy=error.remedy,
        )

    def error(self) -> EwqError:
        """The message as an error."""
        kind: type[EwqError] = getattr(errors, self.kind)
        return kind(self.stage, self.subject, self.problem, self.remedy)


def is_out_of_memory(log: str) -> bool:
    """Whether llama.cpp says that memory ran out, the host's or a device's."""
    return _NO_ROOM.search(log) is not None


def too_large(path: Path, problem: str) -> ResourceError:
    """The error for a model that has not enough memory."""
    size = identify(path).size_bytes / 1e9
    return ResourceError(
        STAGE,
        path,
        f"{problem}: its weights alone are {size:.1f} GB",
        "put fewer layers on the devices with -ngl, or use a smaller --ctx",
    )


def progress_line(share: float, rss_bytes: int) -> str:
    """How far a child is, as a line of its own in its log."""
    return f"\n{_MARK}{json.dumps([share, rss_bytes])}\n"


def read_progress(line: str) -> tuple[float, int] | None:
    """(share, bytes of RSS) of such a line; None for another."""
    if not line.startswith(_MARK):
        return None
    share, rss_bytes = json.loads(line.removeprefix(_MARK))
    return float(share), int(rss_bytes)

"""Messages between the runner and its child processes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ewq_gguf import errors
from ewq_gguf.bench.engines.precision import Precision
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.files import identify
from ewq_gguf.errors import EwqError, ResourceError
from ewq_gguf.records import BenchedFile, BenchParameters
from ewq_gguf.records.base import Part
from ewq_gguf.records.probe import TypeProbe

_MARK = "@ewq "
# What ggml's backends, llama.cpp and torch say.
_NO_ROOM = re.compile(
    r"out of memory|(unable to|failed to|can't) allocate|alloc_buffer.* failed", re.I
)
# What faulthandler says before it ends a child that no longer tells how far it is.
_STALLED = re.compile(r"^Timeout \((\d+:\d\d:\d\d)", re.M)


class ReferenceRequest(Part):
    """A reference file that is to be written.

    Attributes:
        out: the file; absolute.
        model: the base.
    """

    out: str
    model: BenchedFile


class WritingRequest(Part):
    """A text that the model is to write itself.

    Attributes:
        out: gets the documents, an empty line between two; absolute.
        n_documents: how many.
        n_tokens: longest document.
        seed: start of everything random.
    """

    out: str
    n_documents: int
    n_tokens: int
    seed: int


class ProbingRequest(Part):
    """Tensors that are to be moved; paths are absolute.

    Attributes:
        probes: in order.
        copy_path: where a copy of the base goes that is moved.
        imatrix: importance matrix for the quantisers, or None.
        lib_dir: holds ggml's quantisers.
    """

    probes: tuple[TypeProbe, ...]
    copy_path: str
    imatrix: str | None
    lib_dir: str


class Job(Part):
    """A child's work; its paths are absolute.

    Attributes:
        part: name of the task, or `reference`, `writing` or `probing`.
        model: the GGUF file, or the folder of a checkpoint.
        precisions: the checkpoint's tensors that bitsandbytes quantises.
        base: the model or reference to compare with; None for no comparison.
        texts: files, as many as the parameters name.
        settings: the task's own, as JSON; None for none.
        base_answers: folder where the base's answers are kept for other files.
        parameters: everything that results keep of the request.
        journal: gets each finished part, a line of JSON.
        failure: gets the error that ended the child, where it is one of ours.
        reference: the reference file to write; None for none.
        writing: the text to write; None for none.
        probing: the tensors that are moved; None for none.
    """

    part: str
    model: str
    precisions: dict[str, Precision] = {}
    base: str | None = None
    texts: tuple[str, ...] = ()
    settings: dict[str, Any] | None = None
    base_answers: str | None = None
    parameters: BenchParameters
    journal: str
    failure: str
    reference: ReferenceRequest | None = None
    writing: WritingRequest | None = None
    probing: ProbingRequest | None = None


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


def stalled_for(log: str) -> str | None:
    """How long a child made no progress that was ended for it, as h:mm:ss."""
    found = _STALLED.search(log)
    return found and found[1]


def too_large(path: Path, problem: str) -> ResourceError:
    """The error for a model that has not enough memory."""
    size = identify(path).size_bytes / 1e9
    return ResourceError(
        STAGE,
        path,
        f"{problem}: its weights alone are {size:.1f} GB",
        "use --device cpu, or a smaller model"
        if path.is_dir()
        else "put fewer layers on the devices with -ngl, or use a smaller --ctx",
    )


@dataclass(frozen=True)
class MemoryUse:
    """Memory of a child.

    Attributes:
        rss_bytes: on the host.
        gpu_bytes: on NVIDIA's GPUs; None where the driver does not tell.
    """

    rss_bytes: int
    gpu_bytes: int | None = None


def progress_line(share: float, rss_bytes: int, gpu_bytes: int | None = None) -> str:
    """How far a child is, as a line of its own in its log."""
    return f"\n{_MARK}{json.dumps([share, rss_bytes, gpu_bytes])}\n"


def read_progress(line: str) -> tuple[float, MemoryUse] | None:
    """(share, memory) of such a line; None for another."""
    if not line.startswith(_MARK):
        return None
    share, rss_bytes, gpu_bytes = json.loads(line.removeprefix(_MARK))
    return float(share), MemoryUse(rss_bytes, gpu_bytes)

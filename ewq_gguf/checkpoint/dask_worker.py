"""The part of a scan that a worker of a Dask cluster measures.

The worker opens the model itself, by the same name. Requests and answers are JSON text
and are validated as records.
"""

from __future__ import annotations

import platform
import socket
from functools import lru_cache
from typing import TYPE_CHECKING

from ewq_gguf._version import __version__
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.lora.merge import open_merged
from ewq_gguf.checkpoint.mapping import map_tensors
from ewq_gguf.checkpoint.scan import Work, measure
from ewq_gguf.checkpoint.source import Opening
from ewq_gguf.errors import (
    EwqError,
    InputError,
    ToolError,
)
from ewq_gguf.records import Layout, Measures, TensorScan
from ewq_gguf.records.base import Part

if TYPE_CHECKING:
    pass

VERSION = f"ewq {__version__} on Python {platform.python_version()}"


class Request(Part):
    """The tensors that one task measures.

    Attributes:
        run: differs between scans: a worker opens the model once in each.
        origin: the MODEL.
        adapters: The adapters that are merged into it, by each worker for itself.
        is_streamed: leave the weights on their server.
        fingerprint: The fingerprint of the checkpoint that the client sees.
        names: The GGUF names of the tensors.
        measures: parameters of the measures.
        allow_nonfinite: count NaN and infinities instead of refusing them.
        layout: the converter's, of these tensors.
    """

    run: str
    origin: str
    adapters: tuple[str, ...] = ()
    is_streamed: bool
    fingerprint: str
    names: tuple[str, ...]
    measures: Measures
    allow_nonfinite: bool
    layout: Layout | None


class Answer(Part):
    """The measured tensors of one task.

    Attributes:
        tensors: in the order of the request.
    """

    tensors: tuple[TensorScan, ...]


def measure_part(version: str, text: str) -> str:
    """Open the model on a worker and measure some of its tensors.

    Args:
        version: the client's.
        text: a request as JSON.

    Returns:
        An answer as JSON.

    Raises:
        ToolError: this worker runs another version.
        InputError: this worker sees another model, or a damaged one.
    """
    if version != VERSION:
        raise other_version(socket.gethostname(), VERSION, version)
    request = Request.model_validate_json(text)
    checkpoint = _opened(
        request.run, request.origin, request.adapters, request.is_streamed
    )
    ours = checkpoint.identity.fingerprint
    if ours != request.fingerprint:
        raise InputError(
            "scan",
            request.origin,
            f"is checkpoint {ours[:12]} for the worker on {socket.gethostname()}, "
            f"and {request.fingerprint[:12]} for the client",
            "let all machines see the same files",
        )
    names = set(request.names)
    tensors = [
        tensor
        for tensor in map_tensors(checkpoint, request.layout)[0]
        if tensor.name in names
    ]
    work = Work(allow_nonfinite=request.allow_nonfinite)
    entries = measure(checkpoint, tensors, request.measures, work)
    answer = Answer(tensors=tuple(entries[tensor.name] for tensor in tensors))
    return answer.model_dump_json()


@lru_cache(maxsize=2)
def _opened(
    run: str, origin: str, adapters: tuple[str, ...], is_streamed: bool
) -> Checkpoint:
    """The model, opened once in a scan; errors say on which machine."""
    try:
        return open_merged(origin, adapters, Opening(is_streamed=is_streamed))
    except EwqError as error:
        problem = f"on worker {socket.gethostname()}: {error.problem}"
        raise type(error)(error.stage, error.subject, problem, error.remedy) from error


def other_version(machine: str, theirs: str, ours: str) -> ToolError:
    """The error for a machine of the cluster that has another version."""
    return ToolError(
        "scan",
        machine,
        f"has {theirs}, the client {ours}",
        "install the same versions on all machines of the cluster",
    )

"""A scan on a Dask cluster: workers measure parts of it, this machine joins them.

Requests and answers are JSON text (dask_worker.py); a part that a lost worker had goes
to another one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from pydantic import ValidationError

from ewq_gguf._version import __version__
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.mapping import MappedTensor, map_tensors
from ewq_gguf.checkpoint.scan import Work, deal, part_of, scan_checkpoint
from ewq_gguf.errors import (
    InputError,
    NetworkError,
    ResourceError,
    ToolError,
    UsageError,
)
from ewq_gguf.records import Layout, Measures, Scan, TensorScan

if TYPE_CHECKING:
    from distributed import Client, Future
from ewq_gguf.checkpoint.dask_worker import (
    VERSION,
    Answer,
    Request,
    measure_part,
    other_version,
)

_CONNECT_SECONDS = 10
_WORKER_SECONDS = 30
_LOOK_SECONDS = 5  # between looks whether a worker is left
_PARTS_PER_THREAD = 4
_ADDRESS = re.compile(r"(tcp|tls)://.+:\d+")
_VERSION_NAME = "ewq_gguf._version:__version__"


def check_scheduler(scheduler: str) -> None:
    """Refuse early what cannot be a scheduler's address, or cannot be used.

    Raises:
        UsageError: it is no address.
        ToolError: the package that speaks to schedulers is missing.
    """
    if not _ADDRESS.fullmatch(scheduler):
        raise UsageError(
            "scan",
            scheduler,
            "is not a scheduler's address",
            "give one such as tcp://HOST:8786 or tls://HOST:8786",
        )
    if find_spec("distributed") is None:
        raise ToolError(
            "scan",
            None,
            "--scheduler needs distributed",
            "pip install 'ewq-gguf[cluster]'",
        )


def scan_on_cluster(
    scheduler: str,
    checkpoint: Checkpoint,
    measures: Measures,
    layout: Layout | None,
    work: Work,
) -> Scan:
    """Measure a checkpoint, as `scan_checkpoint` does, on the workers of a cluster.

    Args:
        scheduler: its address, `tcp://HOST:PORT` or `tls://HOST:PORT`.
        checkpoint: opened by `open_checkpoint`.
        measures: parameters of the measures.
        layout: the converter's, for a family that names alone do not map.
        work: how to go about it; the threads are the workers'.

    Raises:
        EwqError: a worker's, as it was raised there.
        ToolError: the cluster has another version, or distributed is missing here.
        NetworkError: the scheduler cannot be reached.
        ResourceError: there are no workers, or a part killed several.
    """
    check_scheduler(scheduler)
    tensors, _ = map_tensors(checkpoint, layout)
    if work.part is not None:
        tensors = part_of(tensors, *work.part)
    left = [tensor for tensor in tensors if tensor.name not in work.known]
    entries = dict(work.known)
    if left:
        with _connected(scheduler) as client:
            _check_versions(client)
            parts = deal(left, min(len(left), _PARTS_PER_THREAD * _n_threads(client)))
            request = Request(
                run=client.id,
                origin=checkpoint.origin,
                adapters=checkpoint.adapters,
                is_streamed=any(shard.remote for shard in checkpoint.shards),
                fingerprint=checkpoint.identity.as_found.fingerprint,
                names=(),
                measures=measures,
                allow_nonfinite=work.allow_nonfinite,
                layout=layout,
            )
            requests = [_request(request, part) for part in parts]
            with closing(_answers(client, requests)) as answers:
                for index, answer in answers:
                    for tensor in _checked(answer, parts[index]):
                        entries[tensor.name] = tensor
                        work.on_tensor(tensor)
                    work.on_bytes(sum(tensor.n_bytes for tensor in parts[index]))
    return scan_checkpoint(
        checkpoint, measures, layout=layout, work=replace(work, known=entries)
    )


def _request(request: Request, part: Sequence[MappedTensor]) -> str:
    """A part's request as JSON, with no more of the layout than it needs."""
    names = {tensor.name: None for tensor in part}
    layout = request.layout
    if layout is not None:
        some = tuple(tensor for tensor in layout.tensors if tensor.name in names)
        layout = layout.model_copy(update={"tensors": some})
    values = {"names": tuple(names), "layout": layout}
    return request.model_copy(update=values).model_dump_json()


def _checked(answer: str, part: Sequence[MappedTensor]) -> tuple[TensorScan, ...]:
    """A worker's answer, refused where it is not about the tensors that were asked."""
    try:
        tensors = Answer.model_validate_json(answer).tensors
    except ValidationError:
        tensors = ()
    expected = [(t.name, t.shape, t.dtype, t.hf_names) for t in part]
    if [(t.name, t.shape, t.dtype, t.hf_names) for t in tensors] != expected:
        raise InputError(
            "scan",
            part[0].name,
            "a worker's answer is not about the tensors it was asked for",
            "install the same versions on all machines of the cluster",
        )
    return tensors


@contextmanager
def _connected(scheduler: str) -> Iterator[Client]:
    """A client, closed in the end.

    Raises:
        NetworkError: the scheduler does not answer, or refuses.
    """
    from distributed import Client, Security

    # What it logs about a lost connection comes back as an error.
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    try:
        security = Security()
        own = security.get_connection_args("client").get("ssl_context")
        if scheduler.startswith("tls") and own is None:
            raise ValueError("no certificate is configured")
        client = Client(
            scheduler,
            security=security,
            timeout=_CONNECT_SECONDS,
            set_as_default=False,
        )
    except (OSError, ValueError) as error:
        raise NetworkError(
            "scan",
            scheduler,
            f"the scheduler cannot be reached ({error})",
            "start it with `dask scheduler`"
            if scheduler.startswith("tcp")
            else "set DASK_DISTRIBUTED__COMM__TLS__CA_FILE, ...__CLIENT__CERT and "
            "...__CLIENT__KEY as the cluster has them",
        ) from error
    with client, client.as_current():
        yield client


def _n_threads(client: Client) -> int:
    """Threads of all workers that are there."""
    counts: dict[str, int] = client.nthreads()
    return max(1, sum(counts.values()))


def _address(client: Client) -> str:
    """The scheduler's address."""
    return str(client.scheduler.address)


def _check_versions(client: Client) -> None:
    """Refuse machines without ewq, or with another one, before they are asked anything.

    Python's own function is what they run: a worker that cannot load ours goes down.

    Raises:
        ToolError: the scheduler or a worker has another version, or none.
        ResourceError: there is no worker.
    """
    _wait_for_worker(client)
    versions = client.run(resolve_name, _VERSION_NAME, on_error="return")
    server = _address(client)
    try:
        versions[server] = client.run_on_scheduler(resolve_name, _VERSION_NAME)
    except ImportError as error:
        versions[server] = error
    for address, version in versions.items():
        if isinstance(version, ImportError):
            raise other_version(address, "no ewq", f"ewq {__version__}")
        if isinstance(version, str) and version != __version__:
            raise other_version(address, f"ewq {version}", f"ewq {__version__}")


def _wait_for_worker(client: Client) -> None:
    try:
        client.wait_for_workers(1, timeout=_WORKER_SECONDS)
    except TimeoutError as error:
        address = _address(client)
        raise ResourceError(
            "scan",
            address,
            f"the cluster has had no worker for {_WORKER_SECONDS} s",
            f"start some with `dask worker {address}`",
        ) from error


def _answers(
    client: Client, requests: Sequence[str]
) -> Generator[tuple[int, str], None, None]:
    """Each request's index and answer, as they come; cancelled where nobody waits.

    Raises:
        EwqError: a worker's, or what became of the cluster.
    """
    from concurrent.futures import CancelledError

    from distributed import KilledWorker

    address = _address(client)
    futures = client.map(measure_part, [VERSION] * len(requests), requests, pure=False)
    index = {future.key: i for i, future in enumerate(futures)}
    try:
        for key, answer in _results(client, futures):
            yield index[key], answer
    except KilledWorker as error:
        raise ResourceError(
            "scan",
            address,
            f"{error.allowed_failures + 1} workers died of the same part, the last "
            f"was {error.last_worker.address}",
            "see their logs; give them more memory",
        ) from error
    except (CancelledError, OSError) as error:
        raise NetworkError(
            "scan",
            address,
            "the connection to the scheduler was lost",
            "run again when it is back: what was measured is kept",
        ) from error
    finally:
        client.cancel(futures)


def _results(client: Client, futures: Sequence[Future]) -> Iterator[tuple[str, str]]:
    """Each finished future's key and result.

    Raises:
        ResourceError: no worker is left.
    """
    from distributed import wait

    waiting = set(futures)
    while waiting:
        try:
            done, waiting = wait(
                waiting, timeout=_LOOK_SECONDS, return_when="FIRST_COMPLETED"
            )
        except TimeoutError:
            _wait_for_worker(client)
            continue
        for future in done:
            try:
                result = future.result(timeout=_LOOK_SECONDS)
            except TimeoutError:  # its worker died with the answer
                waiting.add(future)
            else:
                yield future.key, result

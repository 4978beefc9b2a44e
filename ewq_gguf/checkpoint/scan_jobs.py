"""The work of a scan: tensors cut into parts, which threads take in file order.

A tensor is summarised by the thread that brings its last part. Counts add as integers
and float sums are combined in part order, so threads cannot be seen in the result.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from enum import Enum, auto
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.checkpoint.exact_types import lattice_types
from ewq_gguf.checkpoint.mapping import (
    MappedTensor,
    Region,
)
from ewq_gguf.checkpoint.reader import BUFFER_BYTES, RangeReader
from ewq_gguf.checkpoint.regions import Pieces, parts_of
from ewq_gguf.entropy.codes import (
    N_CODES,
    CodeCounts,
    code_values,
    count_codes,
    summarise_codes,
)
from ewq_gguf.entropy.floats import (
    MAX_WEIGHT,
    FirstPass,
    Norms,
    SecondPass,
    combine_first,
    first_pass,
    second_pass,
    summarise_floats,
)
from ewq_gguf.errors import InputError
from ewq_gguf.records import Measures, Statistics, TensorScan


class _State(Enum):
    """How far a tensor is after one of its parts."""

    PART = auto()  # other parts are still to be done
    AGAIN = auto()  # every part once more, for the second pass
    DONE = auto()


class _Scratch(threading.local):
    """A thread's own buffer and table, made once."""

    def __init__(self) -> None:
        self.buffer = np.empty(BUFFER_BYTES, np.uint8)
        self.table = np.zeros(N_CODES, np.uint32)


_scratch = _Scratch()


class Job(ABC):
    """One tensor: its parts, its passes, at the end its summary."""

    n_passes = 1
    summary: Statistics
    weights_crc32: int
    lattice: tuple[str, ...] = ()

    def __init__(
        self, tensor: MappedTensor, reader: RangeReader, measures: Measures
    ) -> None:
        """Cut the tensor into parts; its files are open in the reader."""
        self.tensor = tensor
        self.reader = reader
        self.measures = measures
        self.lock = threading.Lock()
        self.parts = [
            part for region in tensor.regions for part in parts_of(region, reader)
        ]
        self.n_left = len(self.parts)

    @abstractmethod
    def run(self, index: int) -> _State:
        """Do one part, and say how far the tensor is with it."""

    def finish(self) -> None:
        """Find the types that hold the summarised weights exactly."""
        summary = self.summary
        if not summary.n_nonfinite and summary.min < summary.max:
            self.lattice = lattice_types(self.tensor, self.reader, _scratch.buffer)

    def pieces(self, index: int) -> Pieces:
        """The weights of one part, piece by piece."""
        return self.parts[index].pieces(self.reader, _scratch.buffer)


class _CodeJob(Job):
    """16-bit weights."""

    counts: NDArray[np.int64] | None = None

    def run(self, index: int) -> _State:
        dtype = self.tensor.dtype
        table = _scratch.table[: code_values(dtype).size]
        table[:] = 0
        for codes in self.pieces(index):
            count_codes(codes, table)
        with self.lock:
            if len(self.parts) > 1:
                before = 0 if self.counts is None else self.counts
                self.counts = table.astype(np.int64) + before
            self.n_left -= 1
            if self.n_left:
                return _State.PART
        counts = CodeCounts.of(table if self.counts is None else self.counts)
        self.weights_crc32 = counts.crc32
        self.summary = summarise_codes(
            counts,
            dtype,
            epsilon=self.measures.epsilon,
            n_bins=self.measures.n_bins,
        )
        self.counts = None
        return _State.DONE


class _FloatJob(Job):
    """32- and 64-bit weights, and FP8 ones with scales, in two passes."""

    n_passes = 2

    def __init__(
        self, tensor: MappedTensor, reader: RangeReader, measures: Measures
    ) -> None:
        super().__init__(tensor, reader, measures)
        self.first: list[list[FirstPass]] = [[] for _ in self.parts]
        self.second: list[list[SecondPass]] = [[] for _ in self.parts]
        self.crcs = [0] * len(self.parts)
        self.norms: Norms | None = None

    def run(self, index: int) -> _State:
        for data in self.pieces(index):
            if self.norms is None:
                self.first[index].append(first_pass(data))
                self.crcs[index] = crc32(data.data, self.crcs[index])
            elif self.norms.n_finite:
                self.second[index].append(
                    second_pass(
                        data,
                        self.norms,
                        epsilon=self.measures.epsilon,
                        n_bins=self.measures.n_bins,
                    )
                )
        with self.lock:
            self.n_left -= 1
            if self.n_left:
                return _State.PART
        if self.norms is None:
            self.norms = combine_first(sum(self.first, []))
            self.weights_crc32 = crc32(repr(self.crcs).encode())
            self.n_left = len(self.parts)
            return _State.AGAIN
        self.summary = summarise_floats(
            self.norms, sum(self.second, []), epsilon=self.measures.epsilon
        )
        return _State.DONE


def job_of(tensor: MappedTensor, reader: RangeReader, measures: Measures) -> Job:
    """The work that a tensor's dtype needs."""
    floats = tensor.dtype in ("F32", "F64") or tensor.regions[0].scales is not None
    return (_FloatJob if floats else _CodeJob)(tensor, reader, measures)


def run_jobs(
    jobs: Iterable[Job],
    n_threads: int,
    on_bytes: Callable[[int], None],
    on_job: Callable[[Job], None],
) -> None:
    """Do every part of every job; in this thread if one is all there is."""
    waiting = ((job, index) for job in jobs for index in range(len(job.parts)))

    def do(job: Job, index: int) -> tuple[Job, int, _State]:
        state = job.run(index)
        if state is _State.DONE:
            job.finish()
        return job, index, state

    def done(job: Job, index: int, state: _State) -> list[tuple[Job, int]]:
        on_bytes(job.parts[index].n_bytes // job.n_passes)
        if state is _State.DONE:
            on_job(job)
        again = state is _State.AGAIN
        return [(job, i) for i in range(len(job.parts))] if again else []

    if n_threads == 1:
        for item in waiting:
            todo = [item]
            while todo:
                todo += done(*do(*todo.pop()))
        return
    with ThreadPoolExecutor(n_threads) as pool:
        running: set[Future[tuple[Job, int, _State]]] = set()
        try:
            while True:
                while len(running) < 2 * n_threads and (part := next(waiting, None)):
                    running.add(pool.submit(do, *part))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    for again in done(*future.result()):
                        running.add(pool.submit(do, *again))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def nonfinite_error(job: Job, entry: TensorScan) -> InputError:
    """The error for a tensor with NaN or infinite weights, naming the first."""
    region, index = _first_nonfinite(job)
    return InputError(
        "scan",
        region.shard.path,
        f"{region.tensor.name} holds {entry.n_nonfinite} NaN or infinite weights, the "
        f"first at index {index}",
        "repair the checkpoint, or measure the rest with --allow-nonfinite",
    )


def _first_nonfinite(job: Job) -> tuple[Region, int]:
    """The region that holds the first one, and its index among the region's weights."""
    region, position = job.parts[0].region, 0
    for index, part in enumerate(job.parts):
        if part.region is not region:
            region, position = part.region, 0
        for data in job.pieces(index):
            if data.dtype.kind == "f":
                bad = ~(np.abs(data) <= MAX_WEIGHT)
            else:
                bad = ~np.isfinite(code_values(job.tensor.dtype))[data]
            if bad.any():
                return region, position + int(bad.argmax())
            position += bad.size
    raise AssertionError(f"{job.tensor.name} had a non-finite weight a moment ago")

"""One pass over the weights (two for 32-bit ones), with every core.

Tensors are cut into parts at fixed offsets; threads take parts in file order and a
tensor is summarised by whoever brings its last part. Counts add as integers and float
sums are combined in part order, so threads and shards cannot be seen in the result.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.mapping import MappedTensor, Region, map_tensors
from ewq_gguf.checkpoint.reader import BUFFER_BYTES, RangeReader
from ewq_gguf.checkpoint.regions import Pieces, parts_of
from ewq_gguf.entropy.codes import N_CODES, code_values, count_codes, summarise_codes
from ewq_gguf.entropy.floats import (
    FirstPass,
    Norms,
    SecondPass,
    combine_first,
    first_pass,
    second_pass,
    summarise_floats,
)
from ewq_gguf.entropy.layers import layer_scans
from ewq_gguf.entropy.summary import Summary
from ewq_gguf.errors import InputError
from ewq_gguf.records import Layout, Measures, Scan, TensorScan
from ewq_gguf.tensor_names import layer_idx, role


def scan_checkpoint(
    checkpoint: Checkpoint,
    measures: Measures | None = None,
    *,
    layout: Layout | None = None,
    n_threads: int = 1,
    allow_nonfinite: bool = False,
    on_bytes: Callable[[int], None] | None = None,
) -> Scan:
    """Measure every tensor of a checkpoint.

    Args:
        checkpoint: opened by `open_checkpoint`.
        measures: parameters of the measures; the paper's by default.
        layout: the converter's, for a family that names alone do not map.
        n_threads: reading and counting threads.
        allow_nonfinite: count NaN and infinities instead of refusing them.
        on_bytes: told how many bytes each finished part had.

    Raises:
        InputError: a file is not what its header says, or holds NaN or infinity.
    """
    measures = measures or Measures()
    tensors, dropped = map_tensors(checkpoint, layout)
    with RangeReader() as reader:
        for shard in checkpoint.shards:
            reader.open(shard)
        jobs = {t.name: _job(t, reader, measures) for t in _in_file_order(tensors)}
        _run(jobs.values(), n_threads, on_bytes or (lambda n_bytes: None))
        entries = tuple(_entry(jobs[tensor.name]) for tensor in tensors)
        if not allow_nonfinite:
            _refuse_nonfinite(jobs, entries)
    return Scan(
        model=checkpoint.identity,
        measures=measures,
        tensors=entries,
        layers=layer_scans(entries),
        dropped=dropped,
    )


def _in_file_order(tensors: Iterable[MappedTensor]) -> list[MappedTensor]:
    """So that a disk reads forward."""
    return sorted(
        tensors,
        key=lambda t: (t.regions[0].shard.path.name, t.regions[0].tensor.begin),
    )


class _Scratch(threading.local):
    """A thread's own buffer and table, made once."""

    def __init__(self) -> None:
        self.buffer = np.empty(BUFFER_BYTES, np.uint8)
        self.table = np.zeros(N_CODES, np.uint32)


_scratch = _Scratch()


class _Job:
    """One tensor: its parts, its passes, at the end its summary."""

    summary: Summary
    weights_crc32: int

    def __init__(
        self, tensor: MappedTensor, reader: RangeReader, measures: Measures
    ) -> None:
        self.tensor = tensor
        self.reader = reader
        self.measures = measures
        self.lock = threading.Lock()
        self.parts = [
            part for region in tensor.regions for part in parts_of(region, reader)
        ]
        self.n_left = len(self.parts)

    def run(self, index: int) -> bool:
        """Do one part; True if the tensor needs its parts done once more."""
        raise NotImplementedError

    def pieces(self, index: int) -> Pieces:
        return self.parts[index].pieces(self.reader, _scratch.buffer)


class _CodeJob(_Job):
    """16-bit weights, and 8-bit ones without scales."""

    counts: NDArray[np.int64] | None = None

    def run(self, index: int) -> bool:
        dtype = self.tensor.dtype
        table = _scratch.table[: code_values(dtype).size]
        table[:] = 0
        for codes in self.pieces(index):
            count_codes(codes, table)
        with self.lock:
            if self.counts is None:
                self.counts = table.astype(np.int64)
            else:
                self.counts += table
            self.n_left -= 1
            if self.n_left:
                return False
        occurring = np.flatnonzero(self.counts)
        self.weights_crc32 = crc32(
            self.counts[occurring].tobytes(), crc32(occurring.tobytes())
        )
        self.summary = summarise_codes(
            self.counts,
            dtype,
            epsilon=self.measures.epsilon,
            n_bins=self.measures.n_bins,
        )
        self.counts = None
        return False


class _FloatJob(_Job):
    """32- and 64-bit weights, and FP8 ones with scales, in two passes."""

    def __init__(
        self, tensor: MappedTensor, reader: RangeReader, measures: Measures
    ) -> None:
        super().__init__(tensor, reader, measures)
        self.first: list[list[FirstPass]] = [[] for _ in self.parts]
        self.second: list[list[SecondPass]] = [[] for _ in self.parts]
        self.crcs = [0] * len(self.parts)
        self.norms: Norms | None = None

    def run(self, index: int) -> bool:
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
                return False
        if self.norms is None:
            self.norms = combine_first(sum(self.first, []))
            self.weights_crc32 = crc32(repr(self.crcs).encode())
            self.n_left = len(self.parts)
            return True
        self.summary = summarise_floats(
            self.norms, sum(self.second, []), epsilon=self.measures.epsilon
        )
        return False


def _job(tensor: MappedTensor, reader: RangeReader, measures: Measures) -> _Job:
    floats = tensor.dtype in ("F32", "F64") or tensor.regions[0].scale is not None
    kind = _FloatJob if floats else _CodeJob
    return kind(tensor, reader, measures)


def _run(jobs: Iterable[_Job], n_threads: int, on_bytes: Callable[[int], None]) -> None:
    """Do every part of every job; in this thread if one is all there is."""
    waiting = ((job, index) for job in jobs for index in range(len(job.parts)))

    def work(job: _Job, index: int) -> tuple[_Job, int, bool]:
        return job, index, job.run(index)

    def done(job: _Job, index: int, again: bool) -> list[tuple[_Job, int]]:
        on_bytes(job.parts[index].n_bytes)
        return [(job, i) for i in range(len(job.parts))] if again else []

    if n_threads == 1:
        for item in waiting:
            todo = [item]
            while todo:
                todo += done(*work(*todo.pop()))
        return
    with ThreadPoolExecutor(n_threads) as pool:
        running: set[Future[tuple[_Job, int, bool]]] = set()
        try:
            while True:
                while len(running) < 2 * n_threads and (part := next(waiting, None)):
                    running.add(pool.submit(work, *part))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    for again in done(*future.result()):
                        running.add(pool.submit(work, *again))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _entry(job: _Job) -> TensorScan:
    tensor = job.tensor
    return TensorScan(
        name=tensor.name,
        hf_names=tuple(region.tensor.name for region in tensor.regions),
        role=role(tensor.name),
        layer_idx=layer_idx(tensor.name),
        shape=tensor.shape,
        dtype=tensor.dtype,
        weights_crc32=job.weights_crc32,
        **vars(job.summary),
    )


def _refuse_nonfinite(jobs: Mapping[str, _Job], entries: Iterable[TensorScan]) -> None:
    for entry in entries:
        if entry.n_nonfinite:
            region, index = _first_nonfinite(jobs[entry.name])
            raise InputError(
                "scan",
                region.shard.path,
                f"{region.tensor.name} holds {entry.n_nonfinite} NaN or infinite "
                f"weights, the first at index {index}",
                "repair the checkpoint, or measure the rest with --allow-nonfinite",
            )


def _first_nonfinite(job: _Job) -> tuple[Region, int]:
    """The region that holds the first one, and its index among the region's weights."""
    region, position = job.parts[0].region, 0
    for index, part in enumerate(job.parts):
        if part.region is not region:
            region, position = part.region, 0
        for data in job.pieces(index):
            if data.dtype.kind == "f":
                bad = ~np.isfinite(data)
            else:
                bad = ~np.isfinite(code_values(job.tensor.dtype))[data]
            if bad.any():
                return region, position + int(bad.argmax())
            position += bad.size
    raise AssertionError(f"{job.tensor.name} had a non-finite weight a moment ago")

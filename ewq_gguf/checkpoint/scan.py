"""One pass over the weights (two for 32-bit ones), with every core.

Tensors are cut into parts at fixed offsets; threads take parts in file order and a
tensor is summarised by whoever brings its last part. Counts add as integers and float
sums are combined in part order, so threads and shards cannot be seen in the result.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.mapping import MappedTensor, map_tensors
from ewq_gguf.checkpoint.reader import BUFFER_BYTES, RangeReader
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
from ewq_gguf.records import Measures, Scan, TensorScan
from ewq_gguf.tensor_names import layer_idx, role

#: A part is one thread's piece of work. Below 2^32 codes its counts fit uint32; the
#: size is part of the result of 32-bit sources, so it never depends on the machine.
PART_BYTES = 64 << 20


def scan_checkpoint(
    checkpoint: Checkpoint,
    measures: Measures | None = None,
    *,
    n_threads: int = 1,
    allow_nonfinite: bool = False,
    on_bytes: Callable[[int], None] | None = None,
) -> Scan:
    """Measure every tensor of a checkpoint.

    Args:
        checkpoint: opened by `open_checkpoint`.
        measures: parameters of the measures; the paper's by default.
        n_threads: reading and counting threads.
        allow_nonfinite: count NaN and infinities instead of refusing them.
        on_bytes: told how many bytes each finished part had.

    Raises:
        InputError: a file is not what its header says, or holds NaN or infinity.
    """
    measures = measures or Measures()
    tensors, dropped = map_tensors(checkpoint)
    in_file_order = sorted(tensors, key=lambda t: (t.shard.path.name, t.source.begin))
    with RangeReader() as reader:
        for tensor in tensors:
            reader.open(tensor.shard.path)
        jobs = {t.name: _job(t, reader, measures) for t in in_file_order}
        _run(jobs.values(), n_threads, on_bytes or (lambda n_bytes: None))
        entries = tuple(_entry(t, jobs[t.name].summary) for t in tensors)
        if not allow_nonfinite:
            _refuse_nonfinite(tensors, entries, reader)
    return Scan(
        model=checkpoint.identity,
        measures=measures,
        tensors=entries,
        layers=layer_scans(entries),
        dropped=dropped,
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

    def __init__(
        self, tensor: MappedTensor, reader: RangeReader, measures: Measures
    ) -> None:
        self.tensor = tensor
        self.reader = reader
        self.measures = measures
        self.lock = threading.Lock()
        source = tensor.source
        self.parts = [
            (begin, min(begin + PART_BYTES, source.end))
            for begin in range(source.begin, source.end, PART_BYTES)
        ]
        self.n_left = len(self.parts)

    def run(self, index: int) -> bool:
        """Do one part; True if the tensor needs its parts done once more."""
        raise NotImplementedError

    def chunks(self, index: int) -> Iterator[NDArray[np.uint8]]:
        begin, end = self.parts[index]
        return self.reader.chunks(self.tensor.shard.path, begin, end, _scratch.buffer)


class _CodeJob(_Job):
    """16-bit weights."""

    counts: NDArray[np.int64] | None = None

    def run(self, index: int) -> bool:
        table = _scratch.table
        table[:] = 0
        for chunk in self.chunks(index):
            count_codes(chunk.view(np.uint16), table)
        with self.lock:
            if self.counts is None:
                self.counts = table.astype(np.int64)
            else:
                self.counts += table
            self.n_left -= 1
            if self.n_left:
                return False
        self.summary = summarise_codes(
            self.counts,
            self.tensor.source.dtype,
            epsilon=self.measures.epsilon,
            n_bins=self.measures.n_bins,
        )
        self.counts = None
        return False


class _FloatJob(_Job):
    """32-bit weights, in two passes."""

    def __init__(
        self, tensor: MappedTensor, reader: RangeReader, measures: Measures
    ) -> None:
        super().__init__(tensor, reader, measures)
        self.first: list[list[FirstPass]] = [[] for _ in self.parts]
        self.second: list[list[SecondPass]] = [[] for _ in self.parts]
        self.norms: Norms | None = None

    def run(self, index: int) -> bool:
        for chunk in self.chunks(index):
            data = chunk.view(np.float32)
            if self.norms is None:
                self.first[index].append(first_pass(data))
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
            self.n_left = len(self.parts)
            return True
        self.summary = summarise_floats(
            self.norms, sum(self.second, []), epsilon=self.measures.epsilon
        )
        return False


def _job(tensor: MappedTensor, reader: RangeReader, measures: Measures) -> _Job:
    kind = _FloatJob if tensor.source.dtype == "F32" else _CodeJob
    return kind(tensor, reader, measures)


def _run(jobs: Iterable[_Job], n_threads: int, on_bytes: Callable[[int], None]) -> None:
    """Do every part of every job; in this thread if one is all there is."""
    waiting = ((job, index) for job in jobs for index in range(len(job.parts)))

    def work(job: _Job, index: int) -> tuple[_Job, int, bool]:
        return job, index, job.run(index)

    def done(job: _Job, index: int, again: bool) -> list[tuple[_Job, int]]:
        begin, end = job.parts[index]
        on_bytes(end - begin)
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


def _entry(tensor: MappedTensor, summary: Summary) -> TensorScan:
    return TensorScan(
        name=tensor.name,
        hf_names=(tensor.source.name,),
        role=role(tensor.name),
        layer_idx=layer_idx(tensor.name),
        shape=tensor.source.shape,
        dtype=tensor.source.dtype,
        **vars(summary),
    )


def _refuse_nonfinite(
    tensors: Iterable[MappedTensor], entries: Iterable[TensorScan], reader: RangeReader
) -> None:
    for tensor, entry in zip(tensors, entries, strict=True):
        if entry.n_nonfinite:
            index = _first_nonfinite(tensor, reader)
            raise InputError(
                "scan",
                tensor.shard.path,
                f"{tensor.source.name} holds {entry.n_nonfinite} NaN or infinite "
                f"weights, the first at index {index}",
                "repair the checkpoint, or measure the rest with --allow-nonfinite",
            )


def _first_nonfinite(tensor: MappedTensor, reader: RangeReader) -> int:
    source, position = tensor.source, 0
    for chunk in reader.chunks(
        tensor.shard.path, source.begin, source.end, _scratch.buffer
    ):
        if source.dtype == "F32":
            bad = ~np.isfinite(chunk.view(np.float32))
        else:
            bad = ~np.isfinite(code_values(source.dtype))[chunk.view(np.uint16)]
        if bad.any():
            return position + int(bad.argmax())
        position += bad.size
    raise AssertionError(f"{source.name} had a non-finite weight a moment ago")

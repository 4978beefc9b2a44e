"""One pass over the weights (two for 32-bit ones), with every core.

Tensors are cut into parts at fixed offsets; threads take parts in file order and a
tensor is summarised by whoever brings its last part. Counts add as integers and float
sums are combined in part order, so threads and shards cannot be seen in the result.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from enum import Enum, auto
from heapq import heappop, heappush
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.lattice import lattice_types
from ewq_gguf.checkpoint.mapping import (
    MappedTensor,
    Region,
    gguf_order,
    map_tensors,
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
from ewq_gguf.entropy.layers import layer_scans
from ewq_gguf.errors import InputError
from ewq_gguf.records import Layout, Measures, Scan, Statistics, TensorScan
from ewq_gguf.tensor_names import layer_idx, role


@dataclass(frozen=True)
class Work:
    """How a scan goes about its work.

    Attributes:
        n_threads: reading and counting threads.
        allow_nonfinite: count NaN and infinities instead of refusing them.
        part: (index from 1, count): measure only that part of the tensors.
        known: tensors that were measured before, by name; they are taken as they are.
        on_bytes: told how many bytes each finished piece of work had.
        on_tensor: told each tensor that was measured, as soon as it was.
    """

    n_threads: int = 1
    allow_nonfinite: bool = False
    part: tuple[int, int] | None = None
    known: Mapping[str, TensorScan] = field(default_factory=dict)
    on_bytes: Callable[[int], None] = lambda n_bytes: None
    on_tensor: Callable[[TensorScan], None] = lambda tensor: None


def scan_checkpoint(
    checkpoint: Checkpoint,
    measures: Measures | None = None,
    *,
    layout: Layout | None = None,
    work: Work | None = None,
) -> Scan:
    """Measure every tensor of a checkpoint, or one part of them.

    Args:
        checkpoint: opened by `open_checkpoint`.
        measures: parameters of the measures; the paper's by default.
        layout: the converter's, for a family that names alone do not map.
        work: how to go about it.

    Raises:
        InputError: a file is not what its header says, or holds NaN or infinity.
    """
    measures, work = measures or Measures(), work or Work()
    tensors, dropped = map_tensors(checkpoint, layout)
    if work.part is not None:
        tensors = part_of(tensors, *work.part)
    entries = {t.name: work.known[t.name] for t in tensors if t.name in work.known}
    left = [tensor for tensor in tensors if tensor.name not in entries]
    entries |= measure(checkpoint, left, measures, work)
    ordered = tuple(entries[tensor.name] for tensor in tensors)
    return Scan(
        model=checkpoint.identity,
        measures=measures,
        tensors=ordered,
        layers=() if work.part else layer_scans(ordered),
        dropped=dropped,
        part=work.part and f"{work.part[0]}/{work.part[1]}",
    )


def measure(
    checkpoint: Checkpoint,
    tensors: Sequence[MappedTensor],
    measures: Measures,
    work: Work,
) -> dict[str, TensorScan]:
    """Measure some tensors of a checkpoint.

    Args:
        checkpoint: opened by `open_checkpoint`.
        tensors: of its, in the order of the GGUF.
        measures: parameters of the measures.
        work: how to go about it; its part and what it knows do not matter here.

    Raises:
        InputError: a file is not what its header says, or holds NaN or infinity.
    """
    entries: dict[str, TensorScan] = {}
    bad: dict[str, _Job] = {}

    def on_job(job: _Job) -> None:
        entry = entries[job.tensor.name] = _entry(job)
        if entry.n_nonfinite and not work.allow_nonfinite:
            bad[entry.name] = job
        else:
            work.on_tensor(entry)

    with RangeReader() as reader:
        for shard in checkpoint.shards:
            reader.open(shard)
        jobs = [_job(tensor, reader, measures) for tensor in _in_file_order(tensors)]
        _run(jobs, work.n_threads, work.on_bytes, on_job)
        for tensor in tensors:
            if tensor.name in bad:
                raise _nonfinite_error(bad[tensor.name], entries[tensor.name])
    checkpoint.check_unchanged("scan")
    return entries


def part_of(
    tensors: Sequence[MappedTensor], index: int, count: int
) -> tuple[MappedTensor, ...]:
    """The tensors of one of `count` parts of about the same bytes.

    Args:
        tensors: all of them, in the order of the GGUF.
        index: of the part, from 1.
        count: of parts.
    """
    return deal(tensors, count)[index - 1]


def deal(tensors: Sequence[MappedTensor], count: int) -> list[tuple[MappedTensor, ...]]:
    """Tensors in `count` parts of about the same bytes, each in the order given.

    The largest tensors are dealt first, each to the part that has the fewest bytes, so
    the parts follow from the headers alone, whoever computes them.
    """
    totals = [(0, part) for part in range(count)]
    place = {}
    for tensor in sorted(tensors, key=lambda t: (-t.n_bytes, t.name)):
        n_bytes, part = heappop(totals)
        place[tensor.name] = part
        heappush(totals, (n_bytes + tensor.n_bytes, part))
    parts: list[list[MappedTensor]] = [[] for _ in range(count)]
    for tensor in tensors:
        parts[place[tensor.name]].append(tensor)
    return [tuple(part) for part in parts]


def merge_scans(scans: Sequence[Scan]) -> Scan:
    """One whole scan of all parts; the same record as a scan in one go.

    Raises:
        InputError: parts are missing or given twice, or are not of one scan.
    """
    first = scans[0]
    parts = sorted(scan.part or "" for scan in scans)
    count = int((first.part or "0/0").partition("/")[2])
    wanted = sorted(f"{i}/{count}" for i in range(1, count + 1))
    same = all(
        (scan.model, scan.measures, scan.dropped)
        == (first.model, first.measures, first.dropped)
        for scan in scans
    )
    if parts != wanted or not same:
        raise InputError(
            "scan",
            first.model.name,
            f"{', '.join(part or 'a whole scan' for part in parts)} do not make one "
            f"scan; needed is each of {', '.join(wanted) or 'some parts'} of the same "
            "model and measures",
            "give every part once",
        )
    tensors = sorted(
        (tensor for scan in scans for tensor in scan.tensors),
        key=lambda tensor: gguf_order(tensor.name),
    )
    return Scan(
        model=first.model,
        measures=first.measures,
        tensors=tuple(tensors),
        layers=layer_scans(tensors),
        dropped=first.dropped,
    )


def _in_file_order(tensors: Iterable[MappedTensor]) -> list[MappedTensor]:
    """So that a disk reads forward."""
    return sorted(
        tensors,
        key=lambda t: (t.regions[0].shard.path.name, t.regions[0].tensor.begin),
    )


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


class _Job(ABC):
    """One tensor: its parts, its passes, at the end its summary."""

    n_passes = 1
    summary: Statistics
    weights_crc32: int
    lattice: tuple[str, ...] = ()

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

    @abstractmethod
    def run(self, index: int) -> _State:
        """Do one part, and say how far the tensor is with it."""

    def finish(self) -> None:
        """Once the weights are summarised: are they quantised already?"""
        found = self.summary
        if not found.n_nonfinite and found.min < found.max:
            self.lattice = lattice_types(self.tensor, self.reader, _scratch.buffer)

    def pieces(self, index: int) -> Pieces:
        return self.parts[index].pieces(self.reader, _scratch.buffer)


class _CodeJob(_Job):
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
        found = CodeCounts.of(table if self.counts is None else self.counts)
        self.weights_crc32 = found.crc32
        self.summary = summarise_codes(
            found,
            dtype,
            epsilon=self.measures.epsilon,
            n_bins=self.measures.n_bins,
        )
        self.counts = None
        return _State.DONE


class _FloatJob(_Job):
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


def _job(tensor: MappedTensor, reader: RangeReader, measures: Measures) -> _Job:
    floats = tensor.dtype in ("F32", "F64") or tensor.regions[0].scales is not None
    kind = _FloatJob if floats else _CodeJob
    return kind(tensor, reader, measures)


def _run(
    jobs: Iterable[_Job],
    n_threads: int,
    on_bytes: Callable[[int], None],
    on_job: Callable[[_Job], None],
) -> None:
    """Do every part of every job; in this thread if one is all there is."""
    waiting = ((job, index) for job in jobs for index in range(len(job.parts)))

    def do(job: _Job, index: int) -> tuple[_Job, int, _State]:
        state = job.run(index)
        if state is _State.DONE:
            job.finish()
        return job, index, state

    def done(job: _Job, index: int, state: _State) -> list[tuple[_Job, int]]:
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
        running: set[Future[tuple[_Job, int, _State]]] = set()
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


def _entry(job: _Job) -> TensorScan:
    tensor = job.tensor
    return TensorScan(
        name=tensor.name,
        hf_names=tensor.hf_names,
        role=role(tensor.name),
        layer_idx=layer_idx(tensor.name),
        shape=tensor.shape,
        dtype=tensor.dtype,
        weights_crc32=job.weights_crc32,
        lattice=job.lattice,
        **job.summary.model_dump(),
    )


def _nonfinite_error(job: _Job, entry: TensorScan) -> InputError:
    region, index = _first_nonfinite(job)
    return InputError(
        "scan",
        region.shard.path,
        f"{region.tensor.name} holds {entry.n_nonfinite} NaN or infinite weights, the "
        f"first at index {index}",
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
                bad = ~(np.abs(data) <= MAX_WEIGHT)
            else:
                bad = ~np.isfinite(code_values(job.tensor.dtype))[data]
            if bad.any():
                return region, position + int(bad.argmax())
            position += bad.size
    raise AssertionError(f"{job.tensor.name} had a non-finite weight a moment ago")

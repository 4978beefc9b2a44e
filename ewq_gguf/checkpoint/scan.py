"""One pass over the weights (two for 32-bit ones), with every core.

However many threads and machines work on it, the result is the same record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.mapping import (
    MappedTensor,
    gguf_order,
    map_tensors,
)
from ewq_gguf.checkpoint.reader import RangeReader
from ewq_gguf.checkpoint.scan_jobs import Job, job_of, nonfinite_error, run_jobs
from ewq_gguf.entropy.layers import layer_scans
from ewq_gguf.errors import InputError
from ewq_gguf.records import Layout, Measures, Scan, TensorScan
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
        tensors: Some of its tensors, in the order of the GGUF.
        measures: parameters of the measures.
        work: how to go about it; its part and what it knows do not matter here.

    Raises:
        InputError: a file is not what its header says, or holds NaN or infinity.
    """
    entries: dict[str, TensorScan] = {}
    bad: dict[str, Job] = {}

    def on_job(job: Job) -> None:
        entry = entries[job.tensor.name] = _entry(job)
        if entry.n_nonfinite and not work.allow_nonfinite:
            bad[entry.name] = job
        else:
            work.on_tensor(entry)

    with RangeReader() as reader:
        for shard in checkpoint.shards:
            reader.open(shard)
        jobs = [job_of(tensor, reader, measures) for tensor in _in_file_order(tensors)]
        run_jobs(jobs, work.n_threads, work.on_bytes, on_job)
        for tensor in tensors:
            if tensor.name in bad:
                raise nonfinite_error(bad[tensor.name], entries[tensor.name])
    checkpoint.check_unchanged("scan")
    return entries


def part_of(
    tensors: Sequence[MappedTensor], index: int, count: int
) -> tuple[MappedTensor, ...]:
    """The tensors of one of `count` parts of about the same bytes.

    Args:
        tensors: all of them, in the order of the GGUF.
        index: The number of the part, from 1.
        count: The number of parts.
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
    needed = sorted(f"{i}/{count}" for i in range(1, count + 1))
    same = all(
        (scan.model, scan.measures, scan.dropped)
        == (first.model, first.measures, first.dropped)
        for scan in scans
    )
    if parts != needed or not same:
        raise InputError(
            "scan",
            first.model.name,
            f"{', '.join(part or 'a whole scan' for part in parts)} do not make one "
            f"scan; needed is each of {', '.join(needed) or 'some parts'} of the same "
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


def _entry(job: Job) -> TensorScan:
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

"""What each part of a model costs: a base moved a little, compared with itself.

The weights' error alone: nothing is quantised, so that activations are rounded as the
base rounds them, and a copy that is moved back and forth is all the disk has to hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.bench.children import OnProgress, run_job
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.files import identify
from ewq_gguf.bench.job import Job, ProbingRequest
from ewq_gguf.bench.runner import Request
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.llamacpp.verify import check_bindings
from ewq_gguf.records import read_journal
from ewq_gguf.records.probe import Probe, ProbePart


def check_room(base: Path) -> None:
    """Refuse early where the cache has no room for the copy that is moved.

    Raises:
        ResourceError: with the bytes.
    """
    folder = store.cache_dir("probes")
    size = base.stat().st_size
    store.check_free(folder, size, STAGE)


def probe(
    base: Path,
    probes: Sequence[Probe],
    request: Request,
    *,
    lib_dir: Path,
    imatrix: Path | None,
    on_progress: OnProgress,
) -> dict[str, ProbePart]:
    """Measure probes; those that are known are not measured again.

    Args:
        base: a 16- or 32-bit GGUF.
        probes: of its tensors.
        request: one text, how it is cut, and how models are loaded; without the base's
            reference of it the base runs along.
        lib_dir: holds ggml's quantisers.
        imatrix: that they weigh columns by, or None.
        on_progress: told how far it is.

    Returns:
        By the probes' names.

    Raises:
        ToolError: llama-cpp-python is missing, or the device asked for is.
        InputError: the reference is of something else.
        ChildError: the child crashed; what it had finished is kept.
        ResourceError: memory or the disk has no room.
    """
    check_bindings(STAGE)
    asked = replace(request, tasks=("kld",), base=base).parameters()
    weighed = store.sha256_file(imatrix) if imatrix else None
    made_by = f"{identify(base).sha256} {weighed} {LLAMA_CPP_COMMIT}"
    key = store.sha256_text(f"{made_by} {asked.model_dump_json()}")
    journal = store.cache_dir("probes") / f"{key}.journal"
    with store.locked(journal, stage=STAGE, wait=True):
        known = read_journal(journal, ProbePart)
        todo = tuple(one for one in probes if one.name not in known)
        if todo:
            check_room(base)
            with store.work_dir(journal, stage=STAGE) as folder:
                job = Job(
                    part="probing",
                    model=str(base.absolute()),
                    base=str((request.reference or base).absolute()),
                    texts=tuple(str(text.absolute()) for _, text in request.texts),
                    parameters=asked,
                    journal=str(journal),
                    failure=str(journal.with_suffix(".failure")),
                    probing=ProbingRequest(
                        probes=todo,
                        copy_path=str(folder / "moved.gguf"),
                        imatrix=str(imatrix.absolute()) if imatrix else None,
                        lib_dir=str(lib_dir.absolute()),
                    ),
                )
                run_job(job, on_progress)
            known = read_journal(journal, ProbePart)
    return {one.name: known[one.name] for one in probes}

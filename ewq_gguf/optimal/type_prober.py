"""Cost of a type for a group of tensors: the base beside a copy with their new values.

The weights' error alone: nothing is quantised, so that activations are rounded as the
base rounds them, and one copy, changed and restored, is all that the disk has to hold.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.bench.children import OnProgress, run_job
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.files import identify
from ewq_gguf.bench.job import Job, ProbingRequest
from ewq_gguf.bench.reference_run import cached_reference
from ewq_gguf.bench.runner import Request
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.llamacpp.verify import check_bindings
from ewq_gguf.optimal.sensitivity import Group
from ewq_gguf.optimal.settings import DEFAULT, SearchSettings
from ewq_gguf.records import read_journal
from ewq_gguf.records.probe import TypeProbe, TypeProbePart
from ewq_gguf.stages.options import Options, Progress


@dataclass
class TypeProber:
    """Gives groups of tensors the values that a type holds, and measures the cost.

    Attributes:
        base: base GGUF, 16- or 32-bit.
        request: text, how it is cut and how models are loaded; without the base's
            reference of the text, the base runs along.
        lib_dir: folder of ggml's quantisers.
        folder: folder of the base's copy, which stays between calls.
        options: settings of the run; its matrix weighs columns.
        progress: receiver of notes and of the share done.
        settings: constants of the search.
        n_probes: number of probes asked for.
        noise_nats: cost of any change, however small: the base's own 16-bit rounding
            comes out differently. It is subtracted from each probe's cost.
    """

    base: Path
    request: Request
    lib_dir: Path
    folder: Path
    options: Options
    progress: Progress
    settings: SearchSettings = DEFAULT
    n_probes: int = 0
    noise_nats: float = 0.0

    def __call__(
        self, cells: Iterable[tuple[Group, str]]
    ) -> dict[tuple[Group, str], float]:
        """Nats that each group of tensors costs in a type, all others as in the base.

        Raises:
            EwqError: as of `run_probes`.
        """
        costs = self.costs_with_noise(cells)
        return {cell: self.without_noise(cost) for cell, cost in costs.items()}

    def costs_with_noise(
        self, cells: Iterable[tuple[Group, str]]
    ) -> dict[tuple[Group, str], float]:
        """The same, with the cost of any change."""
        probes = {
            (group, ggml_type): TypeProbe(
                name=f"{ggml_type} {' '.join(group)}",
                tensors=group,
                ggml_type=ggml_type,
            )
            for group, ggml_type in cells
        }
        if not probes:
            return {}
        self.n_probes += len(probes)
        with self.progress.measure(f"{len(probes)} probes") as on_progress:
            parts = self.run_probes(list(probes.values()), on_progress)
        return {cell: parts[probe.name].kld_mean_nats for cell, probe in probes.items()}

    def without_noise(self, cost_nats: float) -> float:
        """A probe's own cost; never 0, so that no type is ever free."""
        least = self.settings.own_cost_share * cost_nats
        return max(cost_nats - self.noise_nats, least)

    def run_probes(
        self, probes: Sequence[TypeProbe], on_progress: OnProgress
    ) -> dict[str, TypeProbePart]:
        """Measure probes; those in the journal are not measured again.

        Args:
            probes: probes of the base's tensors.
            on_progress: receiver of the share done.

        Returns:
            The measured probes by name.

        Raises:
            ToolError: llama-cpp-python is missing, or the device asked for is.
            InputError: the reference is of something else.
            ChildError: the child crashed; what it had finished is kept.
            ResourceError: memory ran out, or the disk is full.
        """
        check_bindings(STAGE)
        request = replace(self.request, tasks=("kld",), base=self.base)
        parameters, matrix = request.parameters(), self.options.imatrix
        matrix_sha256 = store.sha256_file(matrix) if matrix else None
        key = store.cache_key(
            *(identify(self.base).sha256, matrix_sha256, LLAMA_CPP_COMMIT),
            parameters.model_dump_json(),
        )
        journal = store.cache_dir("probes") / f"{key}.journal"
        with store.locked(journal, stage=STAGE, wait=True):
            measured = read_journal(journal, TypeProbePart)
            todo = tuple(probe for probe in probes if probe.name not in measured)
            if todo:
                copy = self._copy()
                job = Job(
                    part="probing",
                    model=str(self.base.absolute()),
                    base=str((request.reference or self.base).absolute()),
                    texts=tuple(str(text.absolute()) for _, text in request.texts),
                    parameters=parameters,
                    journal=str(journal),
                    failure=str(journal.with_suffix(".failure")),
                    probing=ProbingRequest(
                        probes=todo,
                        copy_path=str(copy.absolute()),
                        imatrix=str(matrix.absolute()) if matrix else None,
                        lib_dir=str(self.lib_dir.absolute()),
                    ),
                )
                run_job(job, on_progress)
                self._keep_copy_if_space(copy)
                measured = read_journal(journal, TypeProbePart)
        return {probe.name: measured[probe.name] for probe in probes}

    def _copy(self) -> Path:
        """Path of the base's copy, which the child makes where it is missing.

        Raises:
            ResourceError: it is missing, and the disk is full.
        """
        copy = self.folder / "copy.gguf"
        if not copy.exists():
            check_disk_space(self.base)
        return copy

    def _keep_copy_if_space(self, copy: Path) -> None:
        """Remove the copy where a file of the base's size would not fit beside it."""
        if shutil.disk_usage(self.folder).free < self.base.stat().st_size:
            copy.unlink(missing_ok=True)


def check_disk_space(base: Path) -> None:
    """Refuse early where the cache has no space for a copy of the base.

    Raises:
        ResourceError: with the bytes.
    """
    store.check_free(store.cache_dir("probes"), base.stat().st_size, STAGE)


@contextmanager
def open_prober(
    request: Request,
    lib_dir: Path,
    *,
    options: Options,
    progress: Progress,
    settings: SearchSettings = DEFAULT,
) -> Iterator[TypeProber]:
    """A prober whose copy of the base is removed when the block ends.

    Args:
        request: text, base, and how models are loaded; the base's reference is made on
            first use, where it can have one.
        lib_dir: folder of ggml's quantisers.
        options: settings of the run.
        progress: receiver of notes and of the share done.
        settings: constants of the search.
    """
    base = request.base
    assert base is not None
    request = replace(request, tasks=("kld",), n_chunks=settings.n_probe_windows)
    reference = cached_reference(
        base, request, lambda: progress.measure(f"reference {base.name}")
    )
    request = replace(request, reference=reference)
    place = store.cache_dir("probes") / f"{identify(base).sha256[:16]}.gguf"
    with store.work_dir(place, stage=STAGE) as folder:
        yield TypeProber(base, request, lib_dir, folder, options, progress, settings)

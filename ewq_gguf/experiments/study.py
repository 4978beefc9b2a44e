"""Studies: many temporary files of one model, measured under the same conditions.

A study that was killed goes on where it was, and files that two of them share are
measured once (see `stages.candidate_files`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from ewq_gguf import store
from ewq_gguf._version import __version__
from ewq_gguf.bench.files import identify
from ewq_gguf.bench.runner import Request
from ewq_gguf.experiments.engine import ExperimentFile, existing, run_experiment
from ewq_gguf.experiments.study_record import Findings, Study, StudyFile
from ewq_gguf.fastewq.rows import trained_path
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.llamacpp.convertible import check_is_local
from ewq_gguf.records import Plan, StudyPart
from ewq_gguf.stages.candidate_files import measure_plans, types_sha256
from ewq_gguf.stages.run import Run

STAGE = "study"

Files = Mapping[str, StudyFile]


@dataclass(frozen=True)
class StudyDesign:
    """A study's files, and its findings.

    Attributes:
        plans: plans of the files, by their labels.
        findings: makes the findings of the measured files, by the same labels.
        run: the run whose options the files are made with.
    """

    plans: Mapping[str, Plan]
    findings: Callable[[Files], Findings]
    run: Run


class StudySpec(Protocol):
    """A study that is asked for, with its settings."""

    @property
    def name(self) -> str:
        """The study's name, that of its findings."""

    def design(self, run: Run) -> StudyDesign:
        """Plan the files.

        Raises:
            EwqError: a stage failed; the message says what to do.
        """


@dataclass(frozen=True)
class CacheFiles:
    """Files in the cache that are measured and removed.

    Attributes:
        run: the model and the options.
        request: the measurement of every file.
    """

    run: Run
    request: Request

    def check(self, files: Sequence[ExperimentFile]) -> None:
        """Nothing is replaced, and one file at a time is checked as it is made."""

    def measure(
        self, files: Sequence[ExperimentFile], request: Request
    ) -> list[StudyPart]:
        """Perplexity and divergence of every file."""
        plans = [file.plan for file in files if file.plan is not None]
        run = self.run
        parts = measure_plans(
            plans, request, run.toolchain, options=run.options, progress=run.progress
        )
        return [parts[types_sha256(made)] for made in plans]


def run_study(
    run: Run, spec: StudySpec, request: Request, out: Path | None = None
) -> tuple[Study, Path]:
    """Do a study, or find that it was done; an interrupted one goes on where it was.

    Args:
        run: the model and the options.
        spec: the study and its settings.
        request: the text and how it is cut; tasks and base are set here.
        out: path of the study; None for `results/NAME.STUDY.json` here.

    Returns:
        The study, and its file.

    Raises:
        UsageError: the file is there and was made from other inputs.
        EwqError: a stage failed; the message says what to do.
    """
    check_is_local(run.checkpoint)
    out = out or Path("results") / f"{run.identity.name}.{spec.name}.json"
    store.check_writable(out, STAGE)
    store.check_distinct(out, [s.path for s in run.checkpoint.shards], STAGE)
    # The base is made later; its name stands for it.
    base = Path(run.identity.name)
    request = replace(request, tasks=("perplexity", "kld"), base=base)
    key = _request_sha256(run, spec, request)
    with store.locked(out, stage=STAGE):
        study = existing(Study, out, STAGE, force=run.options.force)
        if study is not None and study.request_sha256 == key:
            run.progress.note(f"{out} was there already, still valid")
            return study, out
        if study is not None:
            raise store.already_exists(out, STAGE)
        design = spec.design(run)
        study = run_experiment(
            [ExperimentFile(label, made) for label, made in design.plans.items()],
            CacheFiles(design.run, request),
            partial(_study, run, design, key),
        )
        store.write_text(out, study.to_json(), stage=STAGE, force=True)
    run.progress.note(f"wrote {out}")
    return study, out


def _request_sha256(run: Run, spec: StudySpec, request: Request) -> str:
    """SHA-256 of everything that a study depends on; nothing is measured for it."""
    files = (run.options.imatrix, run.options.calibration, trained_path())
    parts = (
        __version__,
        LLAMA_CPP_COMMIT,
        run.toolchain.key,
        run.identity.fingerprint,
        request.parameters().model_dump_json(),
        *(f and f.exists() and store.sha256_file(f) for f in files),
        spec,
    )
    return store.sha256_text(repr(parts))


def _study(
    run: Run,
    design: StudyDesign,
    key: str,
    request: Request,
    parts: Sequence[StudyPart],
) -> Study:
    assert request.base is not None
    files = {
        label: _file(label, made, part)
        for (label, made), part in zip(design.plans.items(), parts, strict=True)
    }
    return Study(
        ewq_version=__version__,
        request_sha256=key,
        model=run.identity,
        base=identify(request.base),
        parameters=request.parameters(),
        engine=parts[0].engine,
        findings=design.findings(files),
    )


def _file(label: str, plan: Plan, part: StudyPart) -> StudyFile:
    return StudyFile(
        label=label,
        plan_sha256=plan.sha256,
        layer_types=tuple(layer.ggml_type for layer in plan.layers),
        size_bytes=plan.totals.file_size_bytes,
        bpw=plan.totals.bpw,
        quality=part.quality,
    )

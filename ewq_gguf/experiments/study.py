"""Studies: many temporary files of one model, measured under the same conditions.

A study that was killed goes on where it was, and files that two of them share are
measured once (see `stages.candidate_files`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ewq_gguf import store
from ewq_gguf._version import __version__
from ewq_gguf.bench.files import identify
from ewq_gguf.bench.runner import Request
from ewq_gguf.experiments.engine import (
    Design,
    ExperimentFile,
    Setting,
    existing,
    run_experiment,
)
from ewq_gguf.experiments.study_record import Findings, Study, StudyFile
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
    """

    run: Run

    def check(self, files: Sequence[ExperimentFile]) -> None:
        """Nothing is replaced, and one file at a time is checked as it is made."""

    def measure(
        self, files: Sequence[ExperimentFile], request: Request
    ) -> list[StudyPart]:
        """Perplexity and divergence of every file."""
        plans = [file.plan for file in files if file.plan is not None]
        parts = measure_plans(
            plans,
            request,
            self.run.toolchain,
            options=self.run.options,
            progress=self.run.progress,
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
    request = replace(
        request, tasks=("perplexity", "kld"), base=Path(run.identity.name)
    )
    setting = Setting(run, request)
    key = setting.sha256(spec)
    with store.locked(out, stage=STAGE):
        known = existing(Study, out, STAGE, force=run.options.force)
        if known is not None:
            if known.request_sha256 != key:
                raise store.already_exists(out, STAGE)
            run.progress.note(f"{out} was there already, still valid")
            return known, out
        planned = spec.design(run)

        def record(request: Request, parts: Sequence[StudyPart]) -> Study:
            assert request.base is not None
            files = {
                label: _file(label, made, part)
                for (label, made), part in zip(
                    planned.plans.items(), parts, strict=True
                )
            }
            return Study(
                ewq_version=__version__,
                request_sha256=key,
                model=run.identity,
                base=identify(request.base),
                parameters=request.parameters(),
                engine=parts[0].engine,
                findings=planned.findings(files),
            )

        files = [ExperimentFile(label, made) for label, made in planned.plans.items()]
        design = Design(files, record, STAGE)
        study = run_experiment(setting, design, CacheFiles(planned.run), out)
    run.progress.note(f"wrote {out}")
    return study, out


def _file(label: str, plan: Plan, part: StudyPart) -> StudyFile:
    return StudyFile(
        label=label,
        plan_sha256=plan.sha256,
        layer_types=tuple(layer.ggml_type for layer in plan.layers),
        size_bytes=plan.totals.file_size_bytes,
        bpw=plan.totals.bpw,
        quality=part.quality,
    )

"""A quantised transformers model on the disk: complete or not at all."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError, safe_open

from ewq_gguf import store
from ewq_gguf.bench.engines.precision import (
    SAVED_NAME,
    AppliedPlan,
    Precision,
    library_versions,
)
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.files import identify
from ewq_gguf.bench.job import Failure
from ewq_gguf.errors import ChildError
from ewq_gguf.llamacpp.logs import child_log
from ewq_gguf.process import python_argv, run
from ewq_gguf.records import BenchSetup
from ewq_gguf.records.base import Part


class SaveJob(Part):
    """The child's work; its paths are absolute.

    Attributes:
        model: the checkpoint's folder.
        precisions: by the names of the tensors that are quantised.
        setup: how it is loaded.
        out: an empty folder.
        metadata: for the header of the file.
        failure: gets the error that ended the child, where it is one of ours.
    """

    model: str
    precisions: dict[str, Precision]
    setup: BenchSetup
    out: str
    metadata: dict[str, str]
    failure: str


def save_quantised(
    folder: Path, plan: AppliedPlan, setup: BenchSetup, out: Path, *, force: bool
) -> bool:
    """Quantise a checkpoint and write it to a folder that `ewq bench` reads.

    Args:
        folder: the checkpoint.
        plan: precisions of its matrices.
        setup: how it is loaded.
        out: the new folder.
        force: replace one that was saved from something else.

    Returns:
        Whether it was written; False where it was there already, of the same.

    Raises:
        UsageError: something else is there.
        ToolError: a library is missing.
        EwqError: as of `TransformersModel`.
    """
    metadata = {
        "ewq.source.sha256": identify(folder, plan).sha256,
        "ewq.plan.sha256": plan.sha256,
        "ewq.libraries": library_versions(needs_bitsandbytes=True),
    }
    with store.locked(out, stage=STAGE):
        is_used = out.exists() and (not out.is_dir() or any(out.iterdir()))
        if is_used:
            existing = _metadata(out)
            if existing.items() >= metadata.items():
                return False
            if not existing or not force:
                raise store.already_exists(out, STAGE)
        with store.work_dir(out, stage=STAGE) as work:
            new = store.ensure_dir(work / out.name, STAGE)
            _run(folder, plan, setup, new, metadata)
            target = out.resolve()
            if target.exists():
                # Only what `--save` wrote comes here, or an empty folder; it goes with
                # the work folder, once the new one is in its place.
                target.rename(work / "old")
            new.rename(target)
    return True


def _run(
    folder: Path,
    plan: AppliedPlan,
    setup: BenchSetup,
    out: Path,
    metadata: dict[str, str],
) -> None:
    with TemporaryDirectory(prefix="ewq-save-") as work:
        failure, file = Path(work) / "failure.json", Path(work) / "job.json"
        job = SaveJob(
            model=str(folder.absolute()),
            precisions=dict(plan.precisions),
            setup=setup,
            out=str(out.absolute()),
            metadata=metadata,
            failure=str(failure),
        )
        file.write_text(job.model_dump_json(), encoding="utf-8")
        argv = python_argv("ewq_gguf.bench.engines.save_child", file)
        try:
            with child_log("save", out) as log_path:
                env = {"PYTHONSAFEPATH": "1"}  # the working folder may hold any code
                run(argv, stage=STAGE, log_path=log_path, env=env)
        except ChildError as error:
            if failure.exists():
                said = Failure.model_validate_json(failure.read_bytes())
                raise said.error() from error
            raise


def _metadata(out: Path) -> dict[str, str]:
    """Metadata that an earlier `--save` wrote there; empty where it is none."""
    try:
        with safe_open(out / SAVED_NAME, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}

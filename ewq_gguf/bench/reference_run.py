"""Making a base's reference file: a child that runs the base, a file put in place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.bench.children import OnProgress, run_job
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.files import identify
from ewq_gguf.bench.job import Job, ReferenceRequest
from ewq_gguf.bench.reference_file import is_made_of, read_reference
from ewq_gguf.bench.runner import Request
from ewq_gguf.errors import InputError, VerificationError
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.llamacpp.verify import check_bindings
from ewq_gguf.records import BenchParameters, Reference

#: Fields of BenchParameters that a reference depends on, as `is_made_of` compares them.
_MATTERS = {"setup", "texts", "n_ctx", "n_chunks", "is_lines"}


def make_reference(
    base: Path, out: Path, request: Request, on_progress: OnProgress
) -> Reference:
    """Run a base over texts and write what files are compared with in its place.

    Args:
        base: the base GGUF.
        out: the reference; replaced where it is there.
        request: the texts, and how they are cut and the base is loaded.
        on_progress: told how far it is.

    Raises:
        ToolError: llama-cpp-python is missing, or the device asked for is.
        InputError: a file is missing, or the base's logits cannot be recomputed.
        VerificationError: the base is no sound GGUF, or computes NaN.
        ChildError: the child crashed.
        ResourceError: memory or the disk is full.
    """
    check_bindings(STAGE)
    parameters, model = _asked(request), identify(base)
    with store.replacing(out, stage=STAGE) as temporary:
        job = Job(
            part="reference",
            model=str(base.absolute()),
            base=None,
            texts=tuple(str(text.absolute()) for _, text in request.texts),
            parameters=parameters,
            journal=str(temporary.absolute().with_suffix(".journal")),
            failure=str(temporary.absolute().with_suffix(".failure")),
            reference=ReferenceRequest(out=str(temporary.absolute()), model=model),
        )
        run_job(job, on_progress)
    return read_reference(out).record


def cached_reference(
    base: Path,
    request: Request,
    begin: Callable[[], AbstractContextManager[OnProgress]],
) -> Path | None:
    """The cache's reference of a base, made on first use: many files are compared.

    Args:
        base: the base GGUF.
        request: as of `make_reference`.
        begin: gives who is told how far it is, where it has to be made.

    Returns:
        None where the base's logits cannot be recomputed, and lockstep has to serve.

    Raises:
        EwqError: as of `make_reference`.
    """
    parameters, model = _asked(request), identify(base)
    # Only what the file depends on, so that every command finds the same one.
    matters = parameters.model_dump_json(include=_MATTERS)
    key = store.cache_key(model.sha256, LLAMA_CPP_COMMIT, matters)
    path = store.cache_dir("references") / f"{key[:32]}.gguf"
    with store.locked(path, stage=STAGE, wait=True):
        try:
            if path.exists() and is_made_of(
                read_reference(path).record, model, parameters
            ):
                return path
        except (InputError, VerificationError):
            pass  # damaged: made again
        refused = path.with_suffix(".refused")
        if refused.exists():
            return None
        try:
            with begin() as on_progress:
                make_reference(base, path, request, on_progress)
        except InputError as error:
            # Not asked again: it may have taken a whole pass to find out.
            refused.write_text(f"{error}\n", encoding="utf-8")
            return None
    return path


def existing_reference(out: Path, base: Path, request: Request) -> Reference | None:
    """The reference that is there already, where it was made of the same.

    Raises:
        UsageError: another file is there.
        InputError, VerificationError: the base is not sound.
    """
    if not out.exists():
        return None
    parameters, model = _asked(request), identify(base)
    try:
        record = read_reference(out).record
    except (InputError, VerificationError):
        raise store.already_exists(out, STAGE) from None
    if not is_made_of(record, model, parameters):
        raise store.already_exists(out, STAGE)
    return record


def _asked(request: Request) -> BenchParameters:
    """The texts matter, whichever task will read them."""
    return replace(request, tasks=("perplexity",)).parameters()

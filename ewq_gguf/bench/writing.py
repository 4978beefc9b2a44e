"""A text that a base writes itself, in the cache: made once, by a child."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.bench.children import OnProgress, run_job
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.files import identify
from ewq_gguf.bench.job import Job, WritingRequest
from ewq_gguf.bench.runner import Request
from ewq_gguf.checkpoint.gguf_file import GgufFile, read_gguf
from ewq_gguf.errors import InputError
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.llamacpp.verify import check_bindings
from ewq_gguf.records import BenchSetup

#: Tokens of a document, at most: a window's.
N_TOKENS = 512


def written_text(
    base: Path,
    setup: BenchSetup,
    begin: Callable[[], AbstractContextManager[OnProgress]],
    *,
    n_documents: int,
    seed: int,
) -> Path:
    """The cache's text of a base, written on first use.

    Args:
        base: the base GGUF.
        setup: how it is loaded.
        begin: gives who is told how far it is, where it has to be written.
        n_documents: documents of up to 512 tokens, or the model's context.
        seed: another text for each.

    Raises:
        InputError: the model is of those that write nothing.
        ToolError: llama-cpp-python is missing, or the device asked for is.
        VerificationError: the base is no sound GGUF.
        ChildError: the child crashed.
        ResourceError: memory ran out.
    """
    check_bindings(STAGE)
    header = read_gguf(base)
    _check_writes(base, header)
    n_tokens = header.window(N_TOKENS)
    settings = (n_documents, n_tokens, seed, LLAMA_CPP_COMMIT)
    key = store.cache_key(identify(base).sha256, *settings)
    path = store.cache_dir("texts") / f"self-{key[:32]}.txt"
    with store.locked(path, stage=STAGE, wait=True):
        if path.exists():
            return path
        with begin() as on_progress, store.replacing(path, stage=STAGE) as temporary:
            writing = WritingRequest(
                out=str(temporary.absolute()),
                n_documents=n_documents,
                n_tokens=n_tokens,
                seed=seed,
            )
            job = Job(
                part="writing",
                model=str(base.absolute()),
                texts=(),
                parameters=Request(tasks=("memory",), setup=setup).parameters(),
                journal=str(temporary.absolute().with_suffix(".journal")),
                failure=str(temporary.absolute().with_suffix(".failure")),
                writing=writing,
            )
            run_job(job, on_progress)
    return path


def _check_writes(base: Path, header: GgufFile) -> None:
    """Refuse encoders, with decoders or without: they do not go on with a text.

    Raises:
        InputError: naming the architecture.
    """
    if not header.is_writer:
        raise InputError(
            STAGE,
            base,
            f"{header.architecture} does not write one token after another",
            "give ewq imatrix a --calibration FILE; policy optimal is not for it",
        )

"""From a base GGUF and a text to its importance matrix, by llama-imatrix."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.errors import ChildError, InputError
from ewq_gguf.llamacpp.imatrix import read_imatrix
from ewq_gguf.llamacpp.loading import load_refusals
from ewq_gguf.llamacpp.logs import child_log, engine_reason
from ewq_gguf.llamacpp.self_test import explain_failure
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.plan.importance import Importance
from ewq_gguf.process import run

STAGE = "imatrix"
#: Tokens of a window, llama-imatrix's own; fewer where the model takes fewer.
N_CTX = 512

# Fixed relative names inside the work folder: no path can enter the file.
_BASE, _TEXT, _OUT = "base.gguf", "calibration.txt", "imatrix.gguf"
_PROGRESS = re.compile(r"\[(\d+)\]")
_CHUNKS = re.compile(r"over (\d+) chunks")
_TOO_SHORT = re.compile(
    r"you need at least (\d+) tokens.*tokenizes to only (\d+)", re.DOTALL
)


def calibrate(
    base: Path,
    text: Path,
    out: Path,
    toolchain: Toolchain,
    *,
    n_threads: int,
    n_chunks: int | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Importance:
    """Write the importance matrix of a model on a text.

    The output head is weighed too: llama-imatrix leaves it out by default, and a file's
    largest error is often there.

    Args:
        base: the 16- or 32-bit GGUF.
        text: what it reads.
        out: the matrix, a GGUF file; replaced when the new one is whole.
        toolchain: whose llama-imatrix to use.
        n_threads: of it.
        n_chunks: windows of 512 tokens, at most; None for all.
        on_progress: told the share done, 0 to 1.

    Raises:
        InputError: the text is shorter than two windows, or the model computes
            nothing that weighs.
        ChildError: llama-imatrix failed.
        ResourceError: memory or the disk is full.
    """
    tool = toolchain.tool("llama-imatrix")
    n_ctx = read_gguf(base).window(N_CTX)
    # Asked here too: llama-imatrix may end before its log has said why.
    if (n_bytes := text.stat().st_size) < n_ctx:
        problem = f"has {n_bytes} bytes, {2 * n_ctx} tokens are needed"
        raise InputError(STAGE, text, problem, "give a longer text")
    n_all = 0

    def line(said: str) -> None:
        nonlocal n_all
        if match := _CHUNKS.search(said):
            n_all = int(match[1])
        if n_all and (done := _PROGRESS.findall(said)):
            on_progress(int(done[-1]) / n_all)

    with store.work_dir(out, stage=STAGE) as inside:
        (inside / _BASE).symlink_to(base.resolve())
        (inside / _TEXT).symlink_to(text.resolve())
        argv = [str(tool), "-m", _BASE, "-f", _TEXT, "-o", _OUT, "-c", str(n_ctx)]
        argv += ["--process-output", "--no-ppl", "-t", str(n_threads)]
        # It ends itself where a tokenizer adds one to every text.
        argv += ["--override-kv", "tokenizer.ggml.add_eos_token=bool:false"]
        if n_chunks is not None:
            argv += ["--chunks", str(n_chunks)]
        try:
            with child_log(STAGE, out) as log_path:
                run(argv, stage=STAGE, log_path=log_path, cwd=inside, on_line=line)
        except ChildError as error:
            if match := _TOO_SHORT.search("\n".join(error.log_tail)):
                problem = f"has {match[2]} tokens, {match[1]} are needed"
                raise InputError(STAGE, text, problem, "give a longer text") from error
            # Its log is written by a thread that may not live to write the reason.
            if not engine_reason(error.output) and (why := load_refusals([base])[0]):
                error.problem += f": {why}"
            raise (explain_failure(error) if toolchain.lib_dir else error) from error
        found = read_imatrix(inside / _OUT)
        store.publish(inside / _OUT, out)
    return found

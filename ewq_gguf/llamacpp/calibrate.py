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
        base: The 16- or 32-bit GGUF.
        text: The calibration text.
        out: The matrix, a GGUF file; replaced when the new one is whole.
        toolchain: The llama.cpp whose llama-imatrix runs.
        n_threads: Threads of llama-imatrix.
        n_chunks: The largest number of windows of 512 tokens; None for all.
        on_progress: Called with the finished share, 0 to 1.

    Raises:
        InputError: the text is shorter than two windows, or the matrix is empty.
        ChildError: llama-imatrix failed.
        ResourceError: memory or the disk is full.
    """
    tool = toolchain.tool("llama-imatrix")
    n_ctx = read_gguf(base).window(N_CTX)
    # Asked here too: llama-imatrix may end before its log has said why.
    if (n_bytes := text.stat().st_size) < n_ctx:
        problem = f"has {n_bytes} bytes, {2 * n_ctx} tokens are needed"
        raise InputError(STAGE, text, problem, "give a longer text")
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
            _run_imatrix(argv, inside, out, on_progress)
        except ChildError as error:
            if match := _TOO_SHORT.search("\n".join(error.log_tail)):
                problem = f"has {match[2]} tokens, {match[1]} are needed"
                raise InputError(STAGE, text, problem, "give a longer text") from error
            # Its log is written by a thread that may not live to write the reason.
            if not engine_reason(error.output) and (why := load_refusals([base])[0]):
                error.problem += f": {why}"
            raise toolchain.explain(error) from error
        matrix = read_imatrix(inside / _OUT)
        store.publish(inside / _OUT, out)
    return matrix


def _run_imatrix(
    argv: list[str], folder: Path, out: Path, on_progress: Callable[[float], None]
) -> None:
    """Run llama-imatrix in a work folder, with a log beside `out` if it fails."""
    n_windows = 0

    def line(text: str) -> None:
        nonlocal n_windows
        if match := _CHUNKS.search(text):
            n_windows = int(match[1])
        if n_windows and (finished := _PROGRESS.findall(text)):
            on_progress(int(finished[-1]) / n_windows)

    with child_log(STAGE, out) as log_path:
        run(argv, stage=STAGE, log_path=log_path, cwd=folder, on_line=line)

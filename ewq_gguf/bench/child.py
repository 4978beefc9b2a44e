"""Child process: load a model, do one job, write each finished part to a journal.

python -m ewq_gguf.bench.child JOB
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

from ewq_gguf.bench.job import Failure, Job, progress_line
from ewq_gguf.bench.llama import Log
from ewq_gguf.bench.load import load
from ewq_gguf.bench.mmlu import mmlu_scores
from ewq_gguf.bench.quality import Named, check_comparable, score_text
from ewq_gguf.bench.questions import ask
from ewq_gguf.bench.speed import measure
from ewq_gguf.bench.texts import Windows, chunks_of, lines_of, read_text
from ewq_gguf.errors import EwqError
from ewq_gguf.records import ChunkPart, MmluPart, RunPart, TextPart, read_journal
from ewq_gguf.records.base import Part
from ewq_gguf.records.scores import MmluOutcome

#: The longest without progress: a forward pass of a large model on a slow machine.
_STALL_SECONDS = 1800
#: Tokens of context for MMLU: the longest prompt with five examples has 3024.
_MMLU_CTX = 4096


def main(path: Path) -> int:
    """Do the job that a file describes; 1 where it failed and said why."""
    job = Job.model_validate_json(path.read_bytes())
    try:
        _tell(0.0)
        with _journal(Path(job.journal)) as keep:
            log = Log()
            setup = job.parameters.setup
            model = load(Path(job.model), setup, log, job.precisions)
            if job.part == "speed":
                _speed(job, model, keep)
            elif job.part == "mmlu":
                _mmlu(job, model, keep)
            else:
                base = None if job.base is None else load(Path(job.base), setup, log)
                _texts(job, model, base, keep)
    except EwqError as error:
        Path(job.failure).write_text(Failure.of(error).model_dump_json())
        return 1
    return 0


def _speed(job: Job, model: Named, keep: Callable[[Part], None]) -> None:
    asked = job.parameters
    speed, memory = measure(
        model.model,
        asked.n_prompt,
        asked.n_generated,
        asked.n_repeats if "speed" in asked.tasks else 0,
        _tell,
    )
    engine = model.model.engine
    keep(RunPart(name="speed", engine=engine, speed=speed, memory=memory))


def _texts(
    job: Job, model: Named, base: Named | None, keep: Callable[[Part], None]
) -> None:
    done = read_journal(Path(job.journal), ChunkPart)
    asked = job.parameters
    # All texts are looked at before the first is scored.
    texts = [_windows(job, Path(path), model, base) for path in job.texts]
    n_all = sum(len(text.windows) for text in texts)
    n_done = 0
    for number, windows in enumerate(texts):
        n_batches = 0
        scored = score_text(
            model, base, windows, asked.n_ctx, _known(f"{number}/", done)
        )
        for i, part in scored:
            if part is not None:
                keep(part.model_copy(update={"name": f"{number}/{i}"}))
            n_batches += 1
            n_done += len((part or done[f"{number}/{i}"]).lengths)
            _tell(n_done / n_all)
        skipped = windows.n_skipped
        keep(TextPart(name=str(number), n_batches=n_batches, n_skipped=skipped))
    keep(RunPart(name="texts", engine=model.model.engine))


def _mmlu(job: Job, model: Named, keep: Callable[[Part], None]) -> None:
    assert job.mmlu is not None
    task = job.mmlu.task()
    known = read_journal(Path(job.journal), MmluPart)
    outcomes = {name: part.outcome for name, part in known.items()}
    skipped = []
    for one in ask(model.model, task, n_ctx=_MMLU_CTX, known=set(known)):
        if isinstance(one, MmluOutcome):
            outcomes[one.id] = one
            keep(MmluPart(name=one.id, outcome=one))
        else:
            skipped.append(one)
        _tell((len(outcomes) + len(skipped)) / len(task.prompts))
    asked = [outcomes[name] for name in task.ids if name in outcomes]
    scores = mmlu_scores(task, asked, skipped)
    keep(RunPart(name="mmlu", engine=model.model.engine, mmlu=scores))


def _known(prefix: str, done: dict[str, ChunkPart]) -> Callable[[int], bool]:
    return lambda i: f"{prefix}{i}" in done


def _windows(job: Job, path: Path, model: Named, base: Named | None) -> Windows:
    asked = job.parameters
    cut = lines_of if asked.is_lines else chunks_of
    text = read_text(path)
    windows = cut(model.model, text, asked.n_ctx, path)
    if base is not None:
        other = cut(base.model, text, asked.n_ctx, path)
        check_comparable(model, base, windows, other)
    return Windows(windows.windows[: asked.n_chunks], windows.n_skipped)


@contextmanager
def _journal(path: Path) -> Iterator[Callable[[Part], None]]:
    """A function that adds a part; what a killed run left half is left behind."""
    with path.open("a", encoding="utf-8") as file:
        file.write("\n")

        def keep(part: Part) -> None:
            _append(file, part)

        yield keep


def _append(file: IO[str], part: Part) -> None:
    file.write(f"{part.model_dump_json()}\n")
    file.flush()


def _tell(share: float) -> None:
    """Say how far it is; and end the process, should it never say so again."""
    faulthandler.dump_traceback_later(_STALL_SECONDS, exit=True)
    sys.stdout.write(progress_line(share, psutil.Process().memory_info().rss))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

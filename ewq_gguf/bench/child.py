"""Child process: load a model, do one job, write each finished part to a journal.

python -m ewq_gguf.bench.child JOB
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil

from ewq_gguf import store
from ewq_gguf.bench.answers.greedy import Texts, answer, texts_for, tokens_of
from ewq_gguf.bench.answers.scores import generation_scores
from ewq_gguf.bench.engines.llama import LlamaModel, Log
from ewq_gguf.bench.engines.load import load
from ewq_gguf.bench.engines.nvml import gpu_bytes
from ewq_gguf.bench.engines.scorer import Model
from ewq_gguf.bench.job import (
    Failure,
    Job,
    ProbingRequest,
    ReferenceRequest,
    WritingRequest,
    progress_line,
)
from ewq_gguf.bench.questions.datafile import read_text
from ewq_gguf.bench.questions.letters import ask
from ewq_gguf.bench.questions.mmlu_scores import mmlu_scores
from ewq_gguf.bench.reference import ReferenceModel
from ewq_gguf.bench.reference_writing import write_reference
from ewq_gguf.bench.tasks.speed import measure
from ewq_gguf.bench.texts.quality import (
    Named,
    another_tokenizer,
    check_comparable,
    check_stored,
    score_text,
)
from ewq_gguf.bench.texts.self_text import self_text
from ewq_gguf.bench.texts.summary import text_result
from ewq_gguf.bench.texts.windows import Windows, chunks_of, lines_of
from ewq_gguf.errors import EwqError, VerificationError, printable
from ewq_gguf.llamacpp.ggml import Ggml
from ewq_gguf.llamacpp.imatrix import importance_values
from ewq_gguf.llamacpp.perturb import Perturbed
from ewq_gguf.records import (
    AnswerPart,
    ChunkPart,
    MmluPart,
    RunPart,
    TextPart,
    open_journal,
    read_journal,
)
from ewq_gguf.records.base import Part
from ewq_gguf.records.probe import ProbePart
from ewq_gguf.records.scores import Answer, MmluOutcome, TooLong

#: The longest without progress: a forward pass of a large model on a slow machine.
_STALL_SECONDS = 1800
#: Tokens of context for MMLU: the longest prompt with five examples has 3024.
_MMLU_CTX = 4096
#: Tokens of context for answers: of a prompt with its own, and of a group's together.
_ANSWER_CTX = 4096


def main(path: Path) -> int:
    """Do the job that a file describes; 1 where it failed and said why."""
    job = Job.model_validate_json(path.read_bytes())
    try:
        _tell(0.0)
        with open_journal(Path(job.journal)) as keep:
            log = Log()
            setup = job.parameters.setup
            if job.reference is not None:
                _reference(job, job.reference, LlamaModel(Path(job.model), setup, log))
                return 0
            if job.probing is not None:
                assert job.base is not None
                base = load(Path(job.base), setup, log)
                _probe(job, job.probing, base, log, keep)
                return 0
            model = load(Path(job.model), setup, log, job.precisions)
            if job.writing is not None:
                _write(job.writing, model)
                return 0
            if job.part == "speed":
                _speed(job, model, keep)
            elif job.part == "mmlu":
                _mmlu(job, model, keep)
            elif job.part == "generation":
                _generation(job, model, lambda path: load(path, setup, log), keep)
            else:
                other = None if job.base is None else load(Path(job.base), setup, log)
                _texts(job, model, other, keep)
    except EwqError as error:
        Path(job.failure).write_text(Failure.of(error).model_dump_json())
        return 1
    return 0


def _probe(
    job: Job,
    asked: ProbingRequest,
    compared: Named,
    log: Log,
    keep: Callable[[Part], None],
) -> None:
    told = job.parameters
    if isinstance(compared.model, ReferenceModel):
        stored = compared.model.windows(told.texts[0].sha256)
        windows = Windows(stored.windows[: told.n_chunks])
    else:
        windows = _windows(job, 0, compared, None)
    importance = importance_values(Path(asked.imatrix)) if asked.imatrix else {}
    base = Perturbed(
        Path(job.model),
        Path(asked.copy_path),
        Ggml(Path(asked.lib_dir)),
        importance,
        told.setup.n_threads,
    )
    for i, one in enumerate(asked.probes):
        with (
            base.moved(one.tensors, one.ggml_type) as path,
            closing(LlamaModel(path, told.setup, log)) as model,
        ):
            scored = score_text(
                Named(path, model),
                compared,
                windows,
                told.n_ctx,
                lambda i: False,
            )
            parts = []
            try:
                for number, (_, part) in enumerate(scored, 1):
                    parts += [part] if part else []
                    done = min(number / len(windows.windows), 1.0)
                    _tell((i + done) / len(asked.probes))
            except VerificationError as error:
                if error.subject != printable(path):
                    raise  # the base itself
                keep(ProbePart(name=one.name, n_tokens=(), kld_nats=()))
                continue
            text = text_result("", parts, 0)
        keep(
            ProbePart(
                name=one.name,
                n_tokens=tuple(chunk.n_tokens for chunk in text.chunks),
                kld_nats=tuple(chunk.kld_nats or 0.0 for chunk in text.chunks),
            )
        )
        _tell((i + 1) / len(asked.probes))


def _write(asked: WritingRequest, model: Named) -> None:
    texts = self_text(model.model, asked.n_documents, asked.n_tokens, asked.seed, _tell)
    Path(asked.out).write_text("\n\n".join(texts), encoding="utf-8")


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
    texts = [_windows(job, i, model, base) for i in range(len(job.texts))]
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


def _reference(job: Job, asked: ReferenceRequest, model: LlamaModel) -> None:
    named = Named(model.path, model)
    texts = [_windows(job, i, named, None) for i in range(len(job.texts))]
    write_reference(model, asked, job.parameters, texts, _tell)


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


def _generation(
    job: Job,
    model: Named,
    load_other: Callable[[Path], Named],
    keep: Callable[[Part], None],
) -> None:
    assert job.prompts is not None
    prompts = job.prompts.prompts()
    texts = texts_for(model.model, prompts)
    known = read_journal(Path(job.journal), AnswerPart)
    n_models = 1 if job.base is None else 2
    answers, skipped = _answers(
        model.model, texts, job, known, keep, lambda share: _tell(share / n_models)
    )
    base = None
    if job.base is not None:
        ids = [one.id for one in answers]
        base = _base_answers(job, model, texts, ids, load_other)
        _tell(1.0)  # also where they were known
    scores = generation_scores(
        prompts,
        texts.texts,
        answers,
        skipped=skipped,
        base=base,
        has_chat_template=texts.has_chat_template,
    )
    keep(RunPart(name="generation", engine=model.model.engine, generation=scores))


def _base_answers(
    job: Job,
    model: Named,
    texts: Texts,
    ids: Collection[str],
    load_other: Callable[[Path], Named],
) -> list[Answer]:
    """The base's answers to the same texts; other files find them in a journal."""
    assert job.base is not None
    assert job.base_answers is not None
    tokens = tokens_of(model.model, texts)
    # The same texts are other tokens to another tokenizer, and then no answers to them.
    key = store.sha256_text(repr([some.tolist() for some in tokens]))
    journal = Path(job.base_answers) / f"{key}.journal"
    known = read_journal(journal, AnswerPart)
    if known.keys() >= set(ids):
        return [known[name].answer for name in ids]
    base = load_other(Path(job.base))
    others = tokens_of(base.model, texts)
    if not all(map(np.array_equal, tokens, others)):
        raise another_tokenizer(model, base)
    with open_journal(journal) as keep:
        answers, _ = _answers(
            base.model, texts, job, known, keep, lambda share: _tell((1 + share) / 2)
        )
    return answers


def _answers(
    model: Model,
    texts: Texts,
    job: Job,
    known: dict[str, AnswerPart],
    keep: Callable[[Part], None],
    tell: Callable[[float], None],
) -> tuple[list[Answer], list[TooLong]]:
    """A model's answers in order, those known among them; and what is too long."""
    assert job.prompts is not None
    found = {name: part.answer for name, part in known.items()}
    skipped: list[TooLong] = []
    n_all = len(texts.ids)
    answered = answer(
        model,
        texts,
        n_ctx=_ANSWER_CTX,
        max_tokens=job.prompts.max_tokens,
        known=set(known),
        on_step=lambda n: tell((len(found) + len(skipped) + n) / n_all),
    )
    for one in answered:
        if isinstance(one, TooLong):
            skipped.append(one)
        else:
            found[one.id] = one
            keep(AnswerPart(name=one.id, answer=one))
    tell(1.0)
    return [found[name] for name in texts.ids if name in found], skipped


def _known(prefix: str, done: dict[str, ChunkPart]) -> Callable[[int], bool]:
    return lambda i: f"{prefix}{i}" in done


def _windows(job: Job, number: int, model: Named, base: Named | None) -> Windows:
    asked, path = job.parameters, Path(job.texts[number])
    cut = lines_of if asked.is_lines else chunks_of
    text = read_text(path)
    whole = cut(model.model, text, asked.n_ctx, path)
    windows = Windows(whole.windows[: asked.n_chunks], whole.n_skipped)
    if base is not None and isinstance(base.model, ReferenceModel):
        stored = base.model.windows(asked.texts[number].sha256)
        check_stored(model, base, windows, stored)
    elif base is not None:
        other = cut(base.model, text, asked.n_ctx, path)
        check_comparable(model, base, whole, other)
    return windows


def _tell(share: float) -> None:
    """Say how far it is; and end the process, should it never say so again."""
    faulthandler.dump_traceback_later(_STALL_SECONDS, exit=True)
    rss_bytes = psutil.Process().memory_info().rss
    sys.stdout.write(progress_line(share, rss_bytes, gpu_bytes()))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

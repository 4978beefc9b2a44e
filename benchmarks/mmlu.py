"""MMLU beside llama-cpp-python's usual ways: same build, same questions, same run.

    EWQ_MMLU_DIR=FOLDER python -m benchmarks.mmlu [SUBJECT [QUESTIONS [FTYPE]]]

The built-in model with five examples. Each question is asked by `ask`, by `reset()` and
`create_completion`, and by `create_completion` on one live object, which keeps the
beginning that its last prompt shared. They take turns, because other work on a machine
slows whatever runs meanwhile. The usual ways get no `logprobs`, which would have them
keep the logits of every token: the letters' are read from the context afterwards.

The last line is the noise of the arithmetic: each question alone again, with one token
of another sequence before it in the cache. It is masked, and nothing but the order of
sums changes; activations that are then rounded another way do the rest.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from ewq_gguf.api import Run, base_file
from ewq_gguf.bench.engines.forward import prompt_tokens
from ewq_gguf.bench.engines.llama import LlamaModel, LlamaScorer
from ewq_gguf.bench.engines.llama_log import Log
from ewq_gguf.bench.engines.scorer import Batch
from ewq_gguf.bench.questions.letters import N_PARALLEL, ask, letter_tokens
from ewq_gguf.bench.questions.mmlu_data import (
    MmluTask,
    Prompt,
    load_task,
)
from ewq_gguf.bench.questions.mmlu_scores import score_question
from ewq_gguf.bench.runner import CPU_SETUP
from ewq_gguf.llamacpp.toolchain import find_toolchain
from ewq_gguf.process import N_CPUS, run
from ewq_gguf.records.scores import MmluOutcome

_N_CTX = 2048
#: Nats between the likeliest letters from which no other may be chosen.
_MARGIN = 0.1


@dataclass
class Way:
    """How questions are asked, and what came of it."""

    name: str
    seconds: float = 0.0
    n_tokens: int = 0
    outcomes: list[MmluOutcome] = field(default_factory=list)


def main(subject: str, n_questions: int, ftype: str) -> None:
    """Ask, and print a table."""
    task = load_task(
        Path(os.environ["EWQ_MMLU_DIR"]), subjects=[subject], limit=n_questions
    )
    toolchain = find_toolchain()
    file = base_file(Run("demo"))
    with tempfile.TemporaryDirectory() as name:
        if ftype != "BF16":
            base, file = file, Path(name, f"{ftype}.gguf")
            tool = toolchain.tool("llama-quantize")
            log_path = Path(name, "quantize.log")
            run([tool, base, file, ftype], stage="benchmark", log_path=log_path)
        ways = [Way("ask"), Way("reset() each time"), Way("one live object")]
        counted = counting(LlamaScorer.evaluate, ways[0])
        with patch.object(LlamaScorer, "evaluate", counted):
            n_all = take_turns(file, task, ways)
        ways.append(shifted(file, task))
    print(
        f"{subject}, {len(task.prompts)} questions, {task.n_shots} examples, "
        f"{file.name}, {N_CPUS} threads, {N_PARALLEL} side by side"
    )
    table(ways, n_all)


def take_turns(file: Path, task: MmluTask, ways: list[Way]) -> int:
    """Ask every question every way; the tokens of all prompts."""
    model = bench_model(file)
    letters = letter_tokens(lambda text: model.tokenize(text).tolist())
    usual = [usual_model(file, way) for way in ways[1:]]
    n_all = 0
    asked = ask(model, task, n_ctx=_N_CTX)
    for prompt in task.prompts:
        # Its groups are read when their first question is due.
        started = time.perf_counter()
        outcome = next(asked)
        ways[0].seconds += time.perf_counter() - started
        assert isinstance(outcome, MmluOutcome), "no subject with long prompts"
        ways[0].outcomes.append(outcome)
        n_all += len(prompt_tokens(model, prompt.text))
        usual[0].reset()
        for way, llm in zip(ways[1:], usual, strict=True):
            complete(way, llm, prompt, letters)
    return n_all


def shifted(file: Path, task: MmluTask) -> Way:
    """Each question alone, one place further back in the cache."""
    way = Way("alone, shifted")
    model = bench_model(file)
    letters = letter_tokens(lambda text: model.tokenize(text).tolist())
    with model.scorer(_N_CTX, n_sequences=2) as scorer:
        for prompt in task.prompts:
            tokens = prompt_tokens(model, prompt.text)
            started = time.perf_counter()
            scorer.clear()
            scorer.evaluate(Batch.of(tokens[:1], 0, sequence=1, n_outputs=0))
            (logits,) = scorer.evaluate(Batch.of(tokens, 0))
            way.seconds += time.perf_counter() - started
            way.n_tokens += len(tokens) + 1
            way.outcomes.append(score_question(prompt.question, logits, letters))
    return way


def bench_model(file: Path) -> LlamaModel:
    """The model of the bench, on the CPU."""
    return LlamaModel(file, CPU_SETUP, Log())


def counting(evaluate: Callable[..., Any], way: Way) -> Callable[..., Any]:
    """The same, with the tokens counted that it is given last."""

    def counted(*arguments: Any) -> Any:
        way.n_tokens += len(arguments[-1])
        return evaluate(*arguments)

    return counted


def usual_model(file: Path, way: Way) -> Any:
    """llama-cpp-python's high-level object, with the same threads."""
    import llama_cpp  # not before ewq_gguf has named the libraries

    llm: Any = llama_cpp.Llama(
        str(file),
        n_ctx=_N_CTX,
        n_threads=N_CPUS,
        n_threads_batch=N_CPUS,
        flash_attn=True,  # as the bench has it on CPUs
        verbose=False,
    )
    llm.eval = counting(llm.eval, way)
    return llm


def complete(way: Way, llm: Any, prompt: Prompt, letters: tuple[int, ...]) -> None:
    """Ask one question the usual way."""
    import llama_cpp

    started = time.perf_counter()
    llm.create_completion(prompt.text, max_tokens=1, temperature=0.0)
    way.seconds += time.perf_counter() - started
    pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    logits = np.ctypeslib.as_array(pointer, (llm.n_vocab(),)).copy()
    way.outcomes.append(score_question(prompt.question, logits, letters))


def table(ways: list[Way], n_all: int) -> None:
    """A line for each way; differences are those from `reset()` each time."""
    print(
        f"{'':18} {'questions/s':>12} {'ask is':>9} {'tokens':>8} {'share':>7}"
        f" {'max nats':>9} {'flips':>6} {'flips above':>12}"
    )
    for way in ways:
        pairs = list(zip(way.outcomes, ways[1].outcomes, strict=True))
        nats = max(
            abs(a - b)
            for one, other in pairs
            for a, b in zip(
                one.letter_logprobs_nats, other.letter_logprobs_nats, strict=True
            )
        )
        margins = [
            float(np.diff(sorted(other.letter_logprobs_nats))[-1])
            for one, other in pairs
            if one.chosen != other.chosen
        ]
        print(
            f"{way.name:18} {len(pairs) / way.seconds:12.2f}"
            f" {way.seconds / ways[0].seconds:8.2f}x {way.n_tokens:8}"
            f" {way.n_tokens / n_all:7.1%} {nats:9.4f} {len(margins):6}"
            f" {sum(margin >= _MARGIN for margin in margins):12}"
        )
    print(f"flips above: with a margin of {_MARGIN} nats or more in the sequential run")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(
        arguments[0] if arguments else "marketing",
        int(arguments[1]) if len(arguments) > 1 else 50,
        arguments[2] if len(arguments) > 2 else "BF16",
    )

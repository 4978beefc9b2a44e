"""Tokens per second as llama-bench counts them, and the memory meanwhile."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

import numpy as np

from ewq_gguf.bench.engines.nvml import gpu_bytes
from ewq_gguf.bench.engines.scorer import Batch, IntArray, Model, Scorer
from ewq_gguf.bench.task import ResultTable, TaskOption, TaskRun
from ewq_gguf.bench.task import Task as _Task
from ewq_gguf.records import Memory, Result, Speed
from ewq_gguf.size_text import size_text

if TYPE_CHECKING:
    from ewq_gguf.bench.runner import Request

_STATUS = Path("/proc/self/status")
_SEED = 0


class Task(_Task):
    """Speed and memory; the process holds nothing but the model."""

    name = "speed"
    names = ("speed", "memory")
    options = (
        TaskOption(
            "--repeats",
            "Repeats of the speed test, after a warm-up.",
            default=5,
            minimum=1,
            maximum=1000,
        ),
    )

    def parameters(self, request: Request) -> dict[str, object]:
        """Nothing besides what every request has."""
        return {}

    def measure(self, run: TaskRun) -> dict[str, object]:
        """Time prompts and answers where that is asked for, and read the memory."""
        parameters = run.job.parameters
        n_repeats = parameters.n_repeats if "speed" in parameters.tasks else 0
        speed, memory = measure(
            run.model.model,
            parameters.n_prompt,
            parameters.n_generated,
            n_repeats,
            run.tell,
        )
        fields: dict[str, object] = {}
        if speed is not None:
            fields |= {
                "speed": speed,
                "prompt_tps": speed.prompt_tps,
                "generation_tps": speed.generation_tps,
                "ttft_seconds": speed.ttft_seconds,
            }
        if "memory" in parameters.tasks:
            fields |= {
                "memory": memory,
                "peak_rss_bytes": memory.peak_rss_bytes,
                "device_bytes": memory.device_bytes,
            }
        return fields

    def tables(self, results: Sequence[Result]) -> list[ResultTable]:
        """A row for each file."""
        if not any(result.speed or result.memory for result in results):
            return []
        columns = ("file", "prompt t/s", "answer t/s", "first", "peak RSS", "weights")
        return [ResultTable((*columns, "KV"), [_cells(one) for one in results])]


def _cells(result: Result) -> list[str]:
    cells = [result.file.name, *["·"] * 6]
    if (speed := result.speed) is not None:
        cells[1:4] = [
            f"{speed.prompt_tps:.1f} ±{speed.prompt_tps_std:.1f}",
            f"{speed.generation_tps:.1f} ±{speed.generation_tps_std:.1f}",
            f"{speed.ttft_seconds:.2f} s",
        ]
    if (memory := result.memory) is not None:
        sizes = (memory.peak_rss_bytes, memory.weights_bytes, memory.kv_bytes)
        cells[4:7] = map(size_text, sizes)
    return cells


def measure(
    model: Model,
    n_prompt: int,
    n_generated: int,
    n_repeats: int,
    on_progress: Callable[[float], None],
) -> tuple[Speed | None, Memory]:
    """Prompts and answers of random tokens, each after a warm-up.

    As llama-bench's pp512 and tg128: the prompt in one batch with the logits of its
    last token, then single tokens in an empty context; which ones is all the same.

    Args:
        model: any.
        n_prompt: tokens of the prompt.
        n_generated: tokens of the answer.
        n_repeats: repeats of each test; 0 for the memory alone.
        on_progress: told the share done, 0 to 1.

    Returns:
        The speed, None without repeats; and the memory with prompt and answer held.
    """
    started = time.perf_counter()
    with model.scorer(n_prompt + n_generated) as scorer:
        load_seconds = model.load_seconds + time.perf_counter() - started
        random = np.random.default_rng(_SEED)
        tokens = random.integers(
            scorer.n_vocab, size=max(n_prompt, n_generated), dtype=np.int32
        )
        if model.add_bos:
            tokens[0] = model.bos
        _prompt(scorer, tokens[:n_prompt])
        _generate(scorer, tokens[:n_generated], n_prompt)
        memory = _memory(scorer)
        prompts, answers = [], []
        for i in range(n_repeats):
            scorer.clear()
            prompts.append(_prompt(scorer, tokens[:n_prompt]))
            on_progress((2 * i + 1) / (2 * n_repeats))
            scorer.clear()
            answers.append(_generate(scorer, tokens[:n_generated], 0))
            on_progress((i + 1) / n_repeats)
    if not n_repeats:
        return None, memory
    prompt_tps = [n_prompt / seconds for seconds, _ in prompts]
    generation_tps = [n_generated / seconds for seconds in answers]
    ttft = [seconds for _, seconds in prompts]
    return Speed(
        prompt_tps=mean(prompt_tps),
        prompt_tps_std=_deviation(prompt_tps),
        generation_tps=mean(generation_tps),
        generation_tps_std=_deviation(generation_tps),
        ttft_seconds=mean(ttft),
        ttft_seconds_std=_deviation(ttft),
        load_seconds=load_seconds,
    ), memory


def combined(turns: Sequence[Speed]) -> Speed:
    """Several measurements of one file as one, each counting the same.

    Args:
        turns: measurements of one repeat each; at least one.
    """
    prompt, generation, ttft = (
        [turn.prompt_tps for turn in turns],
        [turn.generation_tps for turn in turns],
        [turn.ttft_seconds for turn in turns],
    )
    return Speed(
        prompt_tps=mean(prompt),
        prompt_tps_std=_deviation(prompt),
        generation_tps=mean(generation),
        generation_tps_std=_deviation(generation),
        ttft_seconds=mean(ttft),
        ttft_seconds_std=_deviation(ttft),
        load_seconds=mean([turn.load_seconds for turn in turns]),
    )


def peak_rss_bytes() -> int:
    """The most memory this process has had, pages of mapped files included."""
    if _STATUS.exists():
        # Not getrusage, which counts what the parent had before this program began.
        lines = _STATUS.read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _prompt(scorer: Scorer, tokens: IntArray) -> tuple[float, float]:
    """Seconds until the prompt is evaluated, and until the answer's first token."""
    started = time.perf_counter()
    logits = scorer.evaluate(Batch.of(tokens, 0))
    evaluated = time.perf_counter()
    logits.argmax()
    return evaluated - started, time.perf_counter() - started


def _generate(scorer: Scorer, tokens: IntArray, begin: int) -> float:
    """Seconds for one token after another."""
    started = time.perf_counter()
    for i in range(len(tokens)):
        scorer.evaluate(Batch.of(tokens[i : i + 1], begin + i))
    return time.perf_counter() - started


def _memory(scorer: Scorer) -> Memory:
    buffers = scorer.buffers()
    return Memory(
        peak_rss_bytes=peak_rss_bytes(),
        device_bytes=buffers.device_bytes,
        nvml_bytes=gpu_bytes(),
        weights_bytes=buffers.weights_bytes,
        kv_bytes=buffers.kv_bytes,
        compute_bytes=buffers.compute_bytes,
        n_ctx=scorer.n_ctx,
    )


def _deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0

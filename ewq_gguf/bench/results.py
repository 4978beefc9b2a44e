"""A journal as a Result: what the children of a run found, together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ewq_gguf.bench.texts.summary import Tokens, kld, perplexity, text_result
from ewq_gguf.records import (
    BenchedFile,
    BenchParameters,
    ChunkPart,
    Result,
    RunPart,
    Task,
    TextPart,
    read_journal,
)
from ewq_gguf.records.scores import GenerationScores


def result_of(
    file: BenchedFile,
    base: BenchedFile | None,
    asked: BenchParameters,
    journal: Path,
) -> Result:
    """What the finished children of a journal found, as one Result.

    Args:
        file: the model.
        base: what it was compared with.
        asked: what was asked.
        journal: with all that it needs.
    """
    runs = read_journal(journal, RunPart)
    engine = next(iter(runs.values())).engine
    result = Result(
        file=file,
        base=base,
        parameters=asked,
        engine=engine,
        size_bytes=engine.weights_bytes or file.size_bytes,
    )
    update: dict[str, object] = {}
    if timed := runs.get("speed"):
        update |= _timed(timed, asked.tasks)
    if "texts" in runs:
        update |= _scored(asked, journal)
    if (answered := runs.get("mmlu")) and (mmlu := answered.mmlu):
        update |= {
            "mmlu": mmlu,
            "accuracy": mmlu.accuracy,
            "accuracy_stderr": mmlu.accuracy_stderr,
            "mmlu_perplexity": mmlu.mmlu_perplexity,
        }
    if (answered := runs.get("generation")) and (generation := answered.generation):
        update |= _generated(generation)
    return result.model_copy(update=update)


def _timed(part: RunPart, tasks: Sequence[Task]) -> dict[str, object]:
    found: dict[str, object] = {}
    if (speed := part.speed) is not None:
        found |= {
            "speed": speed,
            "prompt_tps": speed.prompt_tps,
            "generation_tps": speed.generation_tps,
            "ttft_seconds": speed.ttft_seconds,
        }
    if (memory := part.memory) is not None and "memory" in tasks:
        found |= {
            "memory": memory,
            "peak_rss_bytes": memory.peak_rss_bytes,
            "device_bytes": memory.device_bytes,
        }
    return found


def _generated(scores: GenerationScores) -> dict[str, object]:
    found: dict[str, object] = {"generation": scores}
    if (beside := scores.references) is not None:
        found |= {"bleu": beside.bleu, "rouge_l": beside.rouge_l}
    if (fidelity := scores.fidelity) is not None:
        found |= {
            "fidelity_rouge_l": fidelity.scores.rouge_l,
            "common_prefix_share": fidelity.common_prefix_share,
        }
    return found


def _scored(asked: BenchParameters, journal: Path) -> dict[str, object]:
    """The texts' numbers, and those of all of them together."""
    chunks = read_journal(journal, ChunkPart)
    ends = read_journal(journal, TextPart)
    texts = [
        [chunks[f"{number}/{i}"] for i in range(ends[str(number)].n_batches)]
        for number in range(len(asked.texts))
    ]
    results = tuple(
        text_result(text.name, parts, ends[str(number)].n_skipped)
        for number, (text, parts) in enumerate(zip(asked.texts, texts, strict=True))
    )
    together = Tokens.of([part for parts in texts for part in parts])
    ppl, ppl_stderr = perplexity(together.nll_nats)
    found: dict[str, object] = {"texts": results, "ppl": ppl, "ppl_stderr": ppl_stderr}
    if len(together.kld_nats):
        divergence = kld(together) if len(results) > 1 else results[0].kld
        assert divergence is not None
        found |= {
            "kld_mean_nats": divergence.kld_mean_nats,
            "kld_p99_nats": divergence.kld_p99_nats,
            "top1_agreement": divergence.top1_agreement,
        }
    return found

"""Text: perplexity as llama-perplexity's, and the divergence from a base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ewq_gguf import store
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.questions.datafile import read_text
from ewq_gguf.bench.task import ResultTable, TaskRun
from ewq_gguf.bench.task import Task as _Task
from ewq_gguf.bench.texts.quality import (
    Named,
    check_comparable,
    check_stored,
    score_text,
)
from ewq_gguf.bench.texts.summary import Tokens, kld, perplexity, text_result
from ewq_gguf.bench.texts.windows import Windows, chunks_of, lines_of
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.records import (
    BenchedFile,
    BenchParameters,
    BenchText,
    ChunkPart,
    Result,
    TextResult,
)
from ewq_gguf.size_text import size_text

if TYPE_CHECKING:
    from ewq_gguf.bench.job import Job
    from ewq_gguf.bench.runner import Request


class Task(_Task):
    """Texts read window by window; the base reads them in lockstep."""

    name = "texts"
    names = ("perplexity", "kld")
    compared = frozenset({"kld"})

    def default_names(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """The divergence only with a base."""
        return self.names if values["base"] is not None else ("perplexity",)

    def parameters(self, request: Request) -> dict[str, object]:
        """The texts' names and hashes."""
        if not request.texts:
            raise UsageError(
                STAGE, "--text", "is missing", "give one with --text NAME=FILE"
            )
        texts = [
            BenchText(name=name, sha256=_text_hash(path))
            for name, path in request.texts
        ]
        return {"texts": tuple(texts)}

    def job_fields(
        self, request: Request, base: BenchedFile | None, parameters: BenchParameters
    ) -> dict[str, object]:
        """The base, or its reference, where the divergence is asked for."""
        compared = (
            (request.reference or request.base) if "kld" in parameters.tasks else None
        )
        return {"base": str(compared.absolute()) if compared else None}

    def measure(self, run: TaskRun) -> dict[str, object]:
        """Score all windows of all texts that are not in the journal."""
        job, model = run.job, run.model
        base = None if job.base is None else run.load(Path(job.base))
        parts = run.finished(ChunkPart)
        # All texts are looked at before the first is scored.
        texts = [windows_of(job, i, model, base) for i in range(len(job.texts))]
        n_all, n_done = sum(len(text.windows) for text in texts), 0
        results: list[TextResult] = []
        everything: list[ChunkPart] = []
        for number, windows in enumerate(texts):
            own: list[ChunkPart] = []
            scored = score_text(
                model, base, windows, job.parameters.n_ctx,
                lambda i, number=number: f"{number}/{i}" in parts,  # type: ignore[misc]
            )  # fmt: skip
            for i, part in scored:
                name = f"{number}/{i}"
                if part is not None:
                    parts[name] = part.model_copy(update={"name": name})
                    run.keep(parts[name])
                own.append(parts[name])
                n_done += len(parts[name].lengths)
                run.tell(n_done / n_all)
            name = job.parameters.texts[number].name
            results.append(text_result(name, own, windows.n_skipped))
            everything += own
        return _fields(tuple(results), everything)

    def tables(self, results: Sequence[Result]) -> list[ResultTable]:
        """A table for each text."""
        names = dict.fromkeys(text.name for r in results for text in r.texts)
        return [
            _table([(r, t) for r in results for t in r.texts if t.name == name])
            for name in names
        ]


def windows_of(job: Job, number: int, model: Named, base: Named | None) -> Windows:
    """A job's text as a model reads it; a base has to read it alike.

    Args:
        job: with the texts.
        number: index of the text.
        model: its tokenizer is used.
        base: a model or reference that is compared with; None for none.

    Raises:
        InputError: the text cannot be read or is too short, or the base's tokens are
            others.
    """
    # With llama.cpp, which only children load.
    from ewq_gguf.bench.reference import ReferenceModel

    parameters, path = job.parameters, Path(job.texts[number])
    cut = lines_of if parameters.is_lines else chunks_of
    text = read_text(path)
    whole = cut(model.model, text, parameters.n_ctx, path)
    windows = Windows(whole.windows[: parameters.n_chunks], whole.n_skipped)
    if base is not None and isinstance(base.model, ReferenceModel):
        stored = base.model.windows(parameters.texts[number].sha256)
        check_stored(model, base, windows, stored)
    elif base is not None:
        other = cut(base.model, text, parameters.n_ctx, path)
        check_comparable(model, base, whole, other)
    return windows


def _fields(
    results: tuple[TextResult, ...], parts: Sequence[ChunkPart]
) -> dict[str, object]:
    """The texts' numbers, and those of all of them together."""
    together = Tokens.of(parts)
    ppl, ppl_stderr = perplexity(together.nll_nats)
    fields: dict[str, object] = {"texts": results, "ppl": ppl, "ppl_stderr": ppl_stderr}
    if len(together.kld_nats):
        divergence = kld(together) if len(results) > 1 else results[0].kld
        assert divergence is not None
        fields |= {
            "kld_mean_nats": divergence.kld_mean_nats,
            "kld_p99_nats": divergence.kld_p99_nats,
            "top1_agreement": divergence.top1_agreement,
        }
    return fields


def _table(rows: Sequence[tuple[Result, TextResult]]) -> ResultTable:
    has_kld = any(text.kld for _, text in rows)
    kld_names = ("KLD mean", "99 %", "same top") if has_kld else ()
    return ResultTable(
        columns=("file", "size", "perplexity", *kld_names),
        rows=[
            [
                result.file.name,
                size_text(result.size_bytes),
                f"{text.ppl:.3f} ±{text.ppl_stderr:.3f}",
                *(_kld_cells(text) if has_kld else ()),
            ]
            for result, text in rows
        ],
        notes=[_about(*rows[0])],
    )


def _kld_cells(text: TextResult) -> list[str]:
    if (found := text.kld) is None:
        return ["·"] * 3
    error = found.stderr.get("kld_mean_nats")
    top_error = found.stderr.get("top1_agreement")
    margin = "" if error is None else f" ±{error:.5f}"
    top_margin = "" if top_error is None else f" ±{100 * top_error:.1f}"
    return [
        f"{found.kld_mean_nats:.5f}{margin}",
        f"{found.kld_p99_nats:.3f}",
        f"{100 * found.top1_agreement:.1f}{top_margin} %",
    ]


def _about(result: Result, text: TextResult) -> str:
    parameters = result.parameters
    units = "lines" if parameters.is_lines else f"windows of {parameters.n_ctx}"
    skipped = f", {text.n_skipped} longer left out" if text.n_skipped else ""
    against = ""
    if text.kld and result.base:
        against = f"; KLD in nats against {result.base.name}"
    return (
        f"{text.name}: {text.n_tokens:,} tokens scored in {len(text.chunks)} "
        f"{units}{skipped}{against}"
    )


def _text_hash(path: Path) -> str:
    try:
        return store.sha256_file(path)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise InputError(STAGE, path, problem, "check the path") from error

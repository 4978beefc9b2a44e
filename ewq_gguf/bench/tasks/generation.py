"""Generation: greedy answers to prompts, beside references and the base's answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ewq_gguf import data, store
from ewq_gguf.bench.answers.greedy import Texts, answer, texts_for, tokens_of
from ewq_gguf.bench.answers.scores import (
    GenerationPrompt,
    check_libraries,
    generation_scores,
    load_prompts,
    prompts_hash,
)
from ewq_gguf.bench.engines.precision import engine_key
from ewq_gguf.bench.engines.scorer import STAGE, Model
from ewq_gguf.bench.questions.notes import too_long_notes
from ewq_gguf.bench.task import ResultTable, TaskOption, TaskRun
from ewq_gguf.bench.task import Settings as _Settings
from ewq_gguf.bench.task import Task as _Task
from ewq_gguf.bench.texts.quality import another_tokenizer
from ewq_gguf.checkpoint.hub_data import billsum_file
from ewq_gguf.records import (
    AnswerPart,
    BenchedFile,
    BenchParameters,
    Result,
    open_journal,
    read_journal,
)
from ewq_gguf.records.base import Part
from ewq_gguf.records.generation import Answer, Fidelity, GenerationScores, TextScores
from ewq_gguf.records.scores import TooLong

if TYPE_CHECKING:
    from ewq_gguf.bench.runner import Request

#: Tokens of context: of a prompt with its answer, and of a group's together.
_N_CTX = 4096
_MEASURES = ("BLEU (95 %)", "ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum")


class Settings(_Settings):
    """Prompts that are answered, and the longest answer.

    Attributes:
        path: file of the prompts; absolute.
        limit: prompts, the first of them; None is all.
        max_tokens: longest answer.
    """

    path: str
    limit: int | None
    max_tokens: int

    def prompts(self) -> tuple[GenerationPrompt, ...]:
        """Read them.

        Raises:
            InputError, ToolError: as of `load_prompts`.
        """
        return load_prompts(Path(self.path), self.limit)

    def parameters(self) -> dict[str, object]:
        """The prompts' hash and the longest answer."""
        check_libraries()
        sha256 = prompts_hash(self.prompts())
        return {"prompts_sha256": sha256, "max_tokens": self.max_tokens}


class Task(_Task):
    """Answers, compared by BLEU and ROUGE."""

    name = "generation"
    names = ("generation",)
    compared = frozenset({"generation"})
    options = (
        TaskOption(
            "--prompts",
            "Prompts to answer, JSONL with references or without; or bills from the "
            "Hub.  [default: 20 of ours]",
            metavar="FILE|billsum",
        ),
        TaskOption(
            "--prompt-limit",
            "Prompts, the first of the file; 0 is all.",
            default=100,
            minimum=0,
        ),
        TaskOption(
            "--max-tokens",
            "Longest answer to a prompt, in tokens.",
            default=64,
            minimum=1,
            maximum=2048,
        ),
    )
    remedy = "name a file of prompts"

    def settings_of(self, values: Mapping[str, Any]) -> Settings:
        """The prompts' file, from the Hub where that is said."""
        named = self.source(values) or data.PROMPTS
        path = billsum_file(STAGE) if named == "billsum" else Path(named)
        return Settings(
            path=str(path.absolute()),
            limit=values["prompt_limit"] or None,
            max_tokens=values["max_tokens"],
        )

    def job_fields(
        self, request: Request, base: BenchedFile | None, parameters: BenchParameters
    ) -> dict[str, object]:
        """The base, and the folder of its answers, which other files find there."""
        # A reference gives no answers.
        if request.base is None or base is None or base.reference_of is not None:
            return {}
        setup = parameters.setup.model_dump_json()
        hashes = f"{base.sha256} {engine_key(request.base)} {parameters.prompts_sha256}"
        key = store.cache_key(hashes, parameters.max_tokens, setup)
        folder = store.cache_dir("bench", "answers", key)
        return {"base": str(request.base.absolute()), "base_answers": str(folder)}

    def measure(self, run: TaskRun) -> dict[str, object]:
        """Answer the prompts, and let the base answer them, where that is not known."""
        settings = Settings.model_validate(run.job.settings)
        prompts = settings.prompts()
        texts = texts_for(run.model.model, prompts)
        n_models = 1 if run.job.base is None else 2
        answers, skipped = _answers(
            run.model.model, texts, settings.max_tokens, run.finished(AnswerPart),
            run.keep, lambda share: run.tell(share / n_models),
        )  # fmt: skip
        base = None
        if run.job.base is not None:
            ids = [one.id for one in answers]
            base = _base_answers(run, texts, ids, settings.max_tokens)
            run.tell(1.0)  # also where they were known
        scores = generation_scores(
            prompts,
            texts.texts,
            answers,
            skipped=skipped,
            base=base,
            has_chat_template=texts.has_chat_template,
        )
        fields: dict[str, object] = {"generation": scores}
        if (beside := scores.references) is not None:
            fields |= {"bleu": beside.bleu, "rouge_l": beside.rouge_l}
        if (fidelity := scores.fidelity) is not None:
            fields |= {
                "fidelity_rouge_l": fidelity.scores.rouge_l,
                "common_prefix_share": fidelity.common_prefix_share,
            }
        return fields

    def tables(self, results: Sequence[Result]) -> list[ResultTable]:
        """A table for each file."""
        return [
            generation_table(result.generation, result.file.name)
            for result in results
            if result.generation
        ]


def _base_answers(
    run: TaskRun, texts: Texts, ids: Collection[str], max_tokens: int
) -> list[Answer]:
    """The base's answers to the same texts; other files find them in a journal."""
    assert run.job.base is not None
    assert run.job.base_answers is not None
    tokens = tokens_of(run.model.model, texts)
    # The same texts are other tokens to another tokenizer, and then no answers to them.
    key = store.sha256_text(repr([some.tolist() for some in tokens]))
    journal = Path(run.job.base_answers) / f"{key}.journal"
    finished = read_journal(journal, AnswerPart)
    if finished.keys() >= set(ids):
        return [finished[name].answer for name in ids]
    base = run.load(Path(run.job.base))
    others = tokens_of(base.model, texts)
    if not all(map(np.array_equal, tokens, others)):
        raise another_tokenizer(run.model, base)
    with open_journal(journal) as keep:
        answers, _ = _answers(
            base.model, texts, max_tokens, finished, keep,
            lambda share: run.tell((1 + share) / 2),
        )  # fmt: skip
    return answers


def _answers(
    model: Model,
    texts: Texts,
    max_tokens: int,
    finished: dict[str, AnswerPart],
    keep: Callable[[Part], None],
    tell: Callable[[float], None],
) -> tuple[list[Answer], list[TooLong]]:
    """A model's answers in order, those known among them; and what is too long."""
    answers = {name: part.answer for name, part in finished.items()}
    skipped: list[TooLong] = []
    n_all = len(texts.ids)
    answered = answer(
        model,
        texts,
        n_ctx=_N_CTX,
        max_tokens=max_tokens,
        finished=set(finished),
        on_step=lambda n: tell((len(answers) + len(skipped) + n) / n_all),
    )
    for one in answered:
        if isinstance(one, TooLong):
            skipped.append(one)
        else:
            answers[one.id] = one
            keep(AnswerPart(name=one.id, answer=one))
    tell(1.0)
    return [answers[name] for name in texts.ids if name in answers], skipped


def generation_table(scores: GenerationScores, file: str = "") -> ResultTable:
    """BLEU and ROUGE beside references and the base model's answers."""
    notes = too_long_notes(scores.too_long)
    if scores.references is None and scores.fidelity is None:
        what = f"{len(scores.answers)} prompts were answered, and compared with nothing"
        remedy = "there is neither a reference nor a --base. The answers are in --json."
        return ResultTable((), (), above=file, notes=[f"{what}: {remedy}", *notes])
    headings, columns = [""], [list(_MEASURES)]
    if scores.references:
        headings.append("beside references")
        columns.append(_cells(scores.references))
        notes += _notes(scores.references)
    if scores.fidelity:
        headings.append("beside the base model's")
        columns.append(_cells(scores.fidelity.scores))
        notes.append(_fidelity_note(scores.fidelity))
    return ResultTable(
        columns=headings,
        rows=list(zip(*columns, strict=True)),
        title=f"Answers to {len(scores.answers)} prompts",
        above=file,
        notes=notes,
    )


def _cells(scores: TextScores) -> list[str]:
    """One per line of _MEASURES."""
    bleu = f"{scores.bleu:.1f}"
    if scores.bleu_low is not None and scores.bleu_high is not None:
        bleu += f" ({scores.bleu_low:.1f} - {scores.bleu_high:.1f})"
    rouges = (
        (scores.rouge_1, scores.rouge_1_stderr),
        (scores.rouge_2, scores.rouge_2_stderr),
        (scores.rouge_l, scores.rouge_l_stderr),
        (scores.rouge_lsum, scores.rouge_lsum_stderr),
    )
    return [
        bleu,
        *(
            f"{mean:.4f}" + (f" ± {error:.4f}" if error is not None else "")
            for mean, error in rouges
        ),
    ]


def _notes(scores: TextScores) -> list[str]:
    counts = (
        (scores.n_empty_answers, "answers are empty and score 0."),
        (scores.n_empty_references, "references are empty; their pairs score 0."),
        (scores.n_wordless, "pairs have a side without a-z and 0-9: ROUGE 0."),
    )
    return [f"{n} {what}" for n, what in counts if n]


def _fidelity_note(fidelity: Fidelity) -> str:
    error = fidelity.common_prefix_share_stderr
    margin = "" if error is None else f" ± {100 * error:.0f}"
    return (
        f"{fidelity.n_identical} answers are the base model's; the mean answer leaves "
        f"it after {fidelity.common_prefix_mean:.1f} tokens, "
        f"{100 * fidelity.common_prefix_share:.0f}{margin} % of its length."
    )

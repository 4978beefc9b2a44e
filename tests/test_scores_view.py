"""Scores as people read them: complete, and in 80 columns."""

from __future__ import annotations

import pytest
from rich.console import Console

from ewq_gguf.bench.answers.scores import GenerationPrompt, generation_scores
from ewq_gguf.bench.questions.mmlu_data import load_task
from ewq_gguf.bench.questions.mmlu_scores import mmlu_scores
from ewq_gguf.bench.tasks.generation import generation_table
from ewq_gguf.bench.tasks.mmlu import mmlu_table
from ewq_gguf.records.generation import Answer
from ewq_gguf.records.scores import MmluOutcome, TooLong
from ewq_gguf.report.bench_view import table_view

SUBJECT = "high_school_government_and_politics"


def shown(view) -> list[str]:
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(table_view(view))
    return [line.rstrip() for line in capture.get().splitlines()]


def outcome(row: int, chosen: str, nll: float, n_in_top: int = 4) -> MmluOutcome:
    return MmluOutcome.model_validate(
        {
            "id": f"{SUBJECT}/{row}", "answer": "A", "chosen": chosen,
            "letter_logprobs_nats": (-1.0, -2.0, -3.0, -4.0),
            "n_in_top": n_in_top, "nll_nats": nll,
        }
    )  # fmt: skip


def test_mmlu_in_80_columns(tmp_path):
    rows = [f"Question {n}?,w,x,y,z,A\n" for n in range(20)]
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / f"{SUBJECT}_test.csv").write_text(
        "".join([*rows, *rows[:7], "Why?,a,b,c,d,E\n"])
    )
    task = load_task(tmp_path, n_shots=0, limit=None)
    outcomes = [outcome(n, "AB"[n % 2], 10.0 * n, n) for n in range(8)]
    skipped = [TooLong(id=f"{SUBJECT}/9", n_tokens=3024, n_ctx=2048)]

    lines = shown(mmlu_table(mmlu_scores(task, outcomes, skipped)))

    numbers = ["8", "50.0", "21.5", "-", "78.5", "1.59e+15", "±1.4e+16"]
    assert [line.split() for line in lines[2:4]] == [
        [*SUBJECT.split("_"), *numbers],
        ["all", "questions", *numbers],
    ]
    assert lines[4:9] == [
        "8 of 27 questions were asked.",
        "The accuracy is at chance (25 %); always A would be 100.0 %.",
        "1 questions have no letter among the 100 likeliest tokens: 1/4 each in the",
        "perplexity.",
        "1 prompts were not asked: they need up to 3,024 tokens of context, there are",
    ]
    assert "1 rows of the files were left out:" in lines
    assert "7 rows of the files were repeated, and kept:" in lines
    assert lines[-1] == "  and 2 more, in --json"


def test_answers_in_80_columns():
    pytest.importorskip("sacrebleu")
    prompts = [GenerationPrompt(f"line {n}", "Why?", "a b c d e") for n in range(3)]
    answers = [
        Answer(id=f"line {n}", text=text, tokens=tokens)
        for n, (text, tokens) in enumerate(
            [("a b c d e", (1, 2)), ("a b x", (1, 3)), ("", ())]
        )
    ]

    scores = generation_scores(prompts, ["Why?"] * 3, answers, base=answers)
    lines = shown(generation_table(scores))

    # F1 of words beside the references: 1, 2 * 2 / (3 + 5), and 0.
    assert lines[1].split() == "beside references beside the base model's".split()
    assert lines[2].startswith("BLEU (95 %)")
    assert lines[3].split() == "ROUGE-1 0.5000 ± 0.2887 0.6667 ± 0.3333".split()
    assert "1 answers are empty and score 0." in lines
    assert " ".join(lines[-2:]) == (
        "3 answers are the base model's; the mean answer leaves it after 1.3 tokens, "
        "100 ± 0 % of its length."
    )

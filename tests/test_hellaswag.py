"""HellaSwag beside llama-perplexity's, on the same questions."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ewq_gguf.api import Run, base_file
from ewq_gguf.bench.job import MemoryUse
from ewq_gguf.bench.questions.choices import ChoiceQuestion, ChoiceSettings
from ewq_gguf.bench.questions.continuations import Likelihoods, likelihoods
from ewq_gguf.bench.runner import Request, bench_file
from ewq_gguf.bench.tasks.hellaswag import Task
from ewq_gguf.cli import main
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.process import run
from ewq_gguf.records.scores import TaskScores, TooLong
from tests.bench_models import Table

pytest_plugins = ["tests.toolchain_fixtures"]

#: Our own: a text, and endings of which the first is the sensible one.
QUESTIONS = [
    ("Making tea: A woman fills a kettle with water and puts it on the stove. She",
     "waits until the water boils and pours it over the tea leaves.",
     "waits until the car arrives.", "paints the kettle with a brush and jumps.",
     "tea the over it pours and boils leaves."),
    ("Washing a car: Two boys carry a bucket and a hose out of the garage. They",
     "spray the car with water and scrub it with a sponge.",
     "read the newspaper to the hose.", "spray the moon.",
     "are eaten by the bucket while it sings a song about the car."),
    ("Playing chess: An old man sits at a table in the park. He moves a pawn and",
     "presses the clock.", "eats the board with a spoon.", "the the the.",
     "flies to the city of numbers to buy a green idea."),
    ("How to sharpen a pencil. Put the tip of the pencil into the sharpener. Then",
     "turn the pencil until the tip is sharp.", "turn the sharpener into soup.",
     "turn.", "sleep for eight hours on the pencil's roof."),
    ("Baking bread: She kneads the dough on a floured table. After an hour",
     "the dough has doubled in size.", "the dough has a driving licence.",
     "table flour the on dough.", "she puts the loaf in a hot oven."),
    ("Fixing a bicycle: He turns the bicycle upside down and takes off the wheel. He",
     "pulls out the tube and looks for the hole.", "pulls out a dragon.",
     "looks.", "puts the wheel into his pocket and takes the train to Monday."),
]  # fmt: skip


def write(path: Path, label: int) -> Path:
    """A file for llama-perplexity; the labels say that ending `label` is right."""
    lines = [
        line for text, *endings in QUESTIONS for line in (text, str(label), *endings)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def silent(_share: float, _use: MemoryUse) -> None:
    pass


def scores_of(file: Path, questions: Path) -> TaskScores:
    settings = ChoiceSettings(task="hellaswag", path=str(questions), limit=None)
    request = Request(tasks=("hellaswag",), settings={"hellaswag": settings})
    return bench_file(file, request, silent).scores["hellaswag"]


def check_parity(toolchain, base: Path, folder: Path, labels: Sequence[int]) -> None:
    """As many questions right as llama-perplexity has, whichever ending is right."""
    tool = toolchain.tool("llama-perplexity")
    total = 0
    for label in labels:
        questions = write(folder / f"{label}.txt", label)
        scores = scores_of(base, questions)
        for _ in range(10):  # its log's last lines are lost at times
            log = run(
                [tool, "-m", base, "-f", questions, "--hellaswag", "-t", "2", "-c",
                 "512"],
                stage="test", log_path=folder / "log", timeout_seconds=300,
            )  # fmt: skip
            pattern = rf"^{len(QUESTIONS)}\t([\d.]+)%\t\[([\d.]+)%, ([\d.]+)%\]"
            if found := re.search(pattern, log, re.MULTILINE):
                break
        assert found, log[-2000:]
        measure = scores.measures["acc_norm"]
        ours = [measure.value, measure.low, measure.high]
        assert ours == pytest.approx([float(x) / 100 for x in found.groups()], abs=1e-6)
        total += round(measure.value * scores.n)
    assert total <= len(QUESTIONS)  # each question has one likeliest ending
    if len(labels) == 4:
        assert total == len(QUESTIONS)


@pytest.mark.llamacpp
@pytest.mark.usefixtures("own_cache")
def test_the_tiny_model_scores_as_llama_perplexity(tiny, toolchain, tmp_path):
    check_parity(toolchain, tiny.base, tmp_path, (0, 3))


@pytest.mark.slow
@pytest.mark.llamacpp
@pytest.mark.usefixtures("own_cache")
def test_the_built_in_model_scores_as_llama_perplexity(toolchain, tmp_path):
    base = base_file(Run("demo"))
    check_parity(toolchain, base, tmp_path, range(4))


@pytest.mark.llamacpp
@pytest.mark.usefixtures("own_cache")
def test_the_command_shows_and_keeps_it(tiny, tmp_path, capsys):
    questions, out = write(tmp_path / "q.txt", 0), tmp_path / "result.json"
    argv = ["bench", str(tiny.base), "--hellaswag", str(questions), "--tasks",
            "hellaswag", "-o", str(out)]  # fmt: skip

    assert main(argv) == 0
    assert "HellaSwag, 0 shots" in capsys.readouterr().out
    saved = json.loads(out.read_text())
    assert saved["scores"]["hellaswag"]["n"] == len(QUESTIONS)
    # The same again is nothing to do, other questions are another result.
    assert main([*argv, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == saved
    assert "was there already" in printed.err
    write(questions, 1)
    assert main(argv) == 2


def table_nats(table: Table, question: ChoiceQuestion) -> list[list[float]]:
    """Each ending's scored tokens, straight from the table, one after the other."""
    rows = table.logits.astype(np.float64)
    logp = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    found = []
    task = Task().tokenize(table, question)
    for tokens in task.tokens:
        scored = range(task.n_given, len(tokens))
        found.append([float(logp[tokens[i - 1], tokens[i]]) for i in scored])
    return found


@pytest.mark.parametrize("add_bos", [True, False])
def test_likelihoods_are_the_tables_whatever_is_shared(add_bos):
    table = Table(add_bos=add_bos)
    choices = [
        ("abc", "abd", "x", "ab"),
        ("one", "two", "three", "four"),
        ("same start a", "same start b", "same start c", "same start dd"),
    ]
    questions = [
        ChoiceQuestion(n, "Once upon a time", texts, 0)
        for n, texts in enumerate(choices * 5, 1)
    ]
    tokens = [Task().tokenize(table, question) for question in questions]

    found = list(likelihoods(table, tokens, n_ctx=1500))

    for question, one in zip(questions, found, strict=True):
        assert isinstance(one, Likelihoods)
        expected = table_nats(table, question)
        assert one.nats == pytest.approx([sum(nats) for nats in expected], abs=1e-9)
        assert one.n_scored.tolist() == [len(nats) for nats in expected]
    # What is known is passed over, and the others come out the same.
    finished = {question.id for question in questions[:7]}
    rest = list(likelihoods(table, tokens, n_ctx=1500, finished=finished))
    assert [one.id for one in rest] == [one.id for one in found[7:]]


def test_what_is_longer_than_the_context_is_not_asked():
    question = ChoiceQuestion(1, "x" * 90, ("a", "b", "c", "d"), 0)
    tokens = Task().tokenize(Table(), question)

    assert list(likelihoods(Table(), [tokens], n_ctx=64)) == [
        TooLong(id="row 1", n_tokens=92 + 4, n_ctx=64)
    ]


def test_rows_are_cleaned_as_the_harness_does(tmp_path):
    row = {
        "activity_label": "How to bake",
        "ctx": "unused",
        "ctx_a": "Heat the oven [title] Mix",
        "ctx_b": "then you",
        "endings": ["wait.", "[substeps] go  on.", "stop.", "sing."],
        "label": "2",
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "label": ""}))

    sound, fault = Task().read(path)

    assert isinstance(sound, ChoiceQuestion)
    assert sound.prompt == "How to bake: Heat the oven. Mix Then you"
    assert sound.choices == ("wait.", " go on.", "stop.", "sing.")
    assert sound.answer == 2
    assert not isinstance(fault, ChoiceQuestion)
    assert fault.is_left_out


def test_files_that_hold_no_questions_are_refused(tmp_path):
    path = tmp_path / "cut.txt"
    path.write_text("text\n0\na\nb\nc\n")
    settings = ChoiceSettings(task="hellaswag", path=str(path), limit=None)
    with pytest.raises(InputError, match="has 5 lines, not six"):
        settings.parameters()
    path.write_text("text\n7\na\nb\nc\nd\n")
    with pytest.raises(InputError, match="no sound question; row 1"):
        settings.parameters()
    with pytest.raises(UsageError, match="--hellaswag: is missing"):
        Request(tasks=("hellaswag",)).parameters()


def test_a_lower_limit_asks_some_of_a_higher_ones(tmp_path):
    path = write(tmp_path / "q.txt", 0)

    def asked(limit: int | None, seed: int = 0) -> list[int]:
        settings = ChoiceSettings(
            task="hellaswag", path=str(path), limit=limit, seed=seed
        )
        return [question.row for question in Task().questions(settings)[0]]

    assert asked(None) == list(range(1, len(QUESTIONS) + 1))
    assert set(asked(2)) < set(asked(4))
    assert len({tuple(asked(3, seed)) for seed in range(8)}) > 1

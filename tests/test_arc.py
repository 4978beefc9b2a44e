"""ARC-Challenge beside a slow reference: transformers in float64, choice by choice."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from ewq_gguf.api import Run, base_file
from ewq_gguf.bench.job import MemoryUse
from ewq_gguf.bench.questions.choices import ChoiceQuestion, ChoiceSettings
from ewq_gguf.bench.runner import Request, bench_file
from ewq_gguf.bench.tasks.arc import Task
from ewq_gguf.checkpoint.demo import demo_checkpoint
from ewq_gguf.errors import InputError
from ewq_gguf.records.scores import RowFault

pytest_plugins = ["tests.toolchain_fixtures"]

#: Our own: a question, its choices, the label of the right one.
QUESTIONS = [
    ("Which of these gives off its own light?",
     ("the Moon", "the Sun", "a mirror", "a window pane"), "B"),
    ("A puddle disappears on a sunny day. What happened to the water?",
     ("It evaporated.", "It froze.", "It burned.", "It rusted."), "A"),
    ("Which tool measures the mass of a stone?",
     ("a ruler", "a thermometer", "a balance", "a stopwatch"), "C"),
    ("What do plants take in from the air to make sugar?",
     ("carbon dioxide", "iron", "salt", "sand", "helium"), "A"),
    ("Which force pulls a dropped ball to the ground?",
     ("friction", "magnetism", "gravity"), "C"),
    ("Which animal lays eggs?", ("a dog", "a horse", "a cat", "a hen"), "D"),
]  # fmt: skip


def silent(_share: float, _use: MemoryUse) -> None:
    pass


def hub_row(text: str, choices: tuple[str, ...], answer: str) -> dict[str, object]:
    labels = list("ABCDE"[: len(choices)])
    return {
        "id": "1",
        "question": text,
        "choices": {"text": list(choices), "label": labels},
        "answerKey": answer,
    }


@pytest.fixture
def questions(tmp_path) -> Path:
    path: Path = tmp_path / "arc.jsonl"
    path.write_text("\n".join(json.dumps(hub_row(*one)) for one in QUESTIONS))
    return path


def reference_nats(folder: Path) -> list[list[float]]:
    """Each choice's log-likelihood, as lm-evaluation-harness's hf backend has it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64
    )
    nats: list[list[float]] = []
    for text, choices, _ in QUESTIONS:
        context = f"Question: {text}\nAnswer:"
        n_given = len(tokenizer(context).input_ids)
        nats.append([])
        for choice in choices:
            ids = tokenizer(f"{context} {choice}", return_tensors="pt").input_ids
            with torch.no_grad():
                logp = torch.log_softmax(model(ids).logits[0], dim=-1)
            places = range(n_given, ids.shape[1])
            nats[-1].append(sum(float(logp[i - 1, ids[0, i]]) for i in places))
    return nats


@pytest.mark.slow
@pytest.mark.llamacpp
@pytest.mark.usefixtures("own_cache")
@pytest.mark.filterwarnings("default")
def test_the_built_in_model_scores_as_transformers_in_float64(questions):
    base = base_file(Run("demo"))
    settings = ChoiceSettings(task="arc", path=str(questions), limit=None)

    request = Request(tasks=("arc",), settings={"arc": settings})
    scores = bench_file(base, request, silent).scores["arc"]

    expected = reference_nats(demo_checkpoint())
    for item, nats in zip(scores.items, expected, strict=True):
        # llama.cpp multiplies BF16 weights by rounded activations.
        assert item.nats == pytest.approx(nats, abs=0.15)
    answers = ["ABCDE".index(answer) for _, _, answer in QUESTIONS]
    n_chars = [[len(choice) for choice in choices] for _, choices, _ in QUESTIONS]
    by_sum = [int(np.argmax(nats)) for nats in expected]
    by_char = [
        int(np.argmax(np.array(nats) / chars))
        for nats, chars in zip(expected, n_chars, strict=True)
    ]
    for name, chosen in (("acc", by_sum), ("acc_norm", by_char)):
        right = [a == b for a, b in zip(chosen, answers, strict=True)]
        assert scores.measures[name].value == pytest.approx(np.mean(right))
    assert scores.chance == pytest.approx((4 / 4 + 1 / 5 + 1 / 3) / 6)


def test_all_formats_hold_the_same_questions(tmp_path, questions):
    paths = [questions]
    authors = [
        {
            "id": "1",
            "question": {
                "stem": text,
                "choices": [
                    {"text": choice, "label": label}
                    for choice, label in zip(choices, "ABCDE", strict=False)
                ],
            },
            "answerKey": answer,
        }
        for text, choices, answer in QUESTIONS
    ]
    paths.append(tmp_path / "authors.jsonl")
    paths[-1].write_text("\n".join(map(json.dumps, authors)))
    paths.append(tmp_path / "table.csv")
    with paths[-1].open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", *"ABCDE", "answerKey"])
        writer.writeheader()
        for text, choices, answer in QUESTIONS:
            row = dict(zip("ABCDE", choices, strict=False))
            writer.writerow({"question": text, **row, "answerKey": answer})
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    paths.append(tmp_path / "hub.parquet")
    rows = [hub_row(*one) for one in QUESTIONS]
    parquet.write_table(pyarrow.Table.from_pylist(rows), paths[-1])

    first, *others = (list(Task().read(path)) for path in paths)

    assert all(found == first for found in others)
    assert isinstance(first[4], ChoiceQuestion)
    assert first[4].prompt.endswith("to the ground?\nAnswer:")
    assert first[4].answer == 2


def test_rows_with_faults_are_counted_and_other_files_refused(tmp_path):
    path = tmp_path / "arc.jsonl"
    sound = hub_row(*QUESTIONS[0])
    rows = [sound, {**sound, "answerKey": "X"}, {**sound, "question": " "}, {}]
    path.write_text("\n".join(map(json.dumps, rows)))

    settings = ChoiceSettings(task="arc", path=str(path), limit=None)
    asked, faults, n_available = Task().questions(settings)

    assert [question.row for question in asked] == [1]
    assert [fault.row for fault in faults] == [2, 3, 4]
    assert all(isinstance(fault, RowFault) for fault in faults)
    assert n_available == 1
    for text, message in (("[1]", "not a JSON object"), ("{}", "no sound question")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            settings.parameters()

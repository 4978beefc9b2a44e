"""Questions and answers side by side: by hand on a table, and on llama.cpp."""

from __future__ import annotations

import os
from contextlib import contextmanager
from math import e, log
from pathlib import Path

import numpy as np
import pytest

from ewq_gguf.api import Run, base_file
from ewq_gguf.bench.answers.greedy import Texts, answer, chat_tokens, texts_for
from ewq_gguf.bench.answers.scores import GenerationPrompt
from ewq_gguf.bench.engines.forward import forward, groups_of, prompt_tokens
from ewq_gguf.bench.engines.scorer import Batch
from ewq_gguf.bench.questions.letters import ask, letter_tokens
from ewq_gguf.bench.questions.mmlu_data import (
    MmluTask,
    Prompt,
    Question,
    load_task,
)
from ewq_gguf.bench.questions.mmlu_files import LETTERS
from ewq_gguf.bench.questions.mmlu_scores import score_question
from ewq_gguf.errors import InputError, VerificationError
from ewq_gguf.records import BenchSetup
from ewq_gguf.records.generation import Answer
from ewq_gguf.records.scores import MmluOutcome, TooLong
from tests.bench_models import BOS, N_VOCAB, Table, TableScorer

pytest_plugins = ["tests.toolchain_fixtures"]

#: Tokens of more than one character; the last one joins a seam.
JOINED = {" A": "\1", " B": "\2", " C": "\3", " D": "\4", "\n\nQ": "\5"}


class Sums(Table):
    """What follows depends on all tokens: row `sum % 128`, which prefers a letter."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.logits = np.zeros((N_VOCAB, N_VOCAB), np.float32)
        rows = np.arange(N_VOCAB)
        self.logits[rows, 1 + rows % 4] = 1.0
        self.n_batch = 1000

    def tokenize(self, text, *, special=False):
        for characters, token in JOINED.items():
            text = text.replace(characters, token)
        return super().tokenize(text)

    @contextmanager
    def scorer(self, n_ctx, *, n_sequences=1, n_batch=None, is_shared=True):
        yield SumsScorer(self, n_ctx, n_sequences, min(self.n_batch, n_ctx))


class SumsScorer(TableScorer):
    """Sequences are lists of cells; a cell that some share takes room once."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.cells: dict[int, list[tuple[int, int]]] = {}

    def evaluate(self, batch):
        assert 0 < len(batch) <= self.n_batch
        rows = []
        for i, (token, position, sequence) in enumerate(
            zip(batch.tokens, batch.positions, batch.sequences, strict=True)
        ):
            held = self.cells.setdefault(int(sequence), [])
            assert position == len(held)
            held.append((self.table.evaluated, int(token)))
            self.table.evaluated += 1
            if batch.is_output[i]:
                rows.append(sum(token for _, token in held) % N_VOCAB)
        assert len(self.cells) <= self.n_sequences
        assert len({cell for held in self.cells.values() for cell in held}) <= (
            self.n_ctx
        )
        return self.table.logits[rows]

    def copy(self, source, target):
        self.cells[target] = list(self.cells[source])

    def remove(self, sequence, begin=0):
        del self.cells[sequence][begin:]

    def clear(self):
        self.cells.clear()


def prompt(subject: str, row: int, suffix: str, prefix: str = "") -> Prompt:
    question = Question(subject, row, suffix, ("w", "x", "y", "z"), "B")
    return Prompt(question, prefix or f"About {subject}.\n\n", f"{suffix}\nAnswer:")


def task_of(*prompts: Prompt) -> MmluTask:
    return MmluTask(prompts, 0, None, 0, len(prompts), ())


TASK = task_of(
    *(prompt("maths", n, f"{'QR'[n % 2]}uestion{n * '?'}") for n in range(1, 8)),
    *(prompt("music", n, f"Question {n}") for n in range(1, 4)),
)


def outcomes_of(model: Sums, task: MmluTask, **options) -> list[MmluOutcome]:
    """Of a task whose prompts all fit."""
    found = list(ask(model, task, **options))
    outcomes = [one for one in found if isinstance(one, MmluOutcome)]
    assert outcomes == found
    return outcomes


def expected(model: Sums, one: Prompt) -> tuple[str, int]:
    """The letter after a prompt and the prompt's tokens, by hand."""
    tokens = [BOS, *(ord(c) for c in _joined(one.text))]
    return LETTERS[sum(tokens) % 4], len(tokens)


def _joined(text: str) -> str:
    for characters, token in JOINED.items():
        text = text.replace(characters, token)
    return text


@pytest.mark.parametrize("n_batch", [1000, 7])
@pytest.mark.parametrize("n_parallel", [1, 2, 5, 16])
@pytest.mark.parametrize("n_ctx", [1000, 60])
def test_each_question_is_answered_as_if_alone(n_ctx, n_parallel, n_batch):
    model = Sums()
    model.n_batch = n_batch

    outcomes = outcomes_of(model, TASK, n_ctx=n_ctx, n_parallel=n_parallel)

    assert [one.id for one in outcomes] == TASK.ids
    letters = [expected(model, one)[0] for one in TASK.prompts]
    assert [one.chosen for one in outcomes] == letters
    assert len(set(letters)) > 1
    for one in outcomes:
        likeliest = max(one.letter_logprobs_nats)
        assert likeliest == pytest.approx(log(e / (e + N_VOCAB - 1)), abs=1e-6)


def test_a_subjects_beginning_is_evaluated_once():
    model = Sums()

    list(ask(model, TASK, n_ctx=1000))

    n_all = [expected(model, one)[1] for one in TASK.prompts]
    # Of maths, half the prompts join "\n\nQ" into a token; of music, all do.
    maths, music = len("\0About maths."), len("\0About music.\5uestion ")
    assert model.evaluated == sum(n_all) - 6 * maths - 2 * music


@pytest.mark.fault(68)
def test_prompts_longer_than_the_context_are_named_and_never_cut():
    model = Sums()
    lengths = [expected(model, one)[1] for one in TASK.prompts]
    n_ctx = sorted(lengths)[-3]

    found = list(ask(model, TASK, n_ctx=n_ctx))

    long = [i for i, length in enumerate(lengths) if length > n_ctx]
    assert [one for one in found if isinstance(one, TooLong)] == [
        TooLong(id=TASK.ids[i], n_tokens=lengths[i], n_ctx=n_ctx) for i in long
    ]
    asked = [one.id for one in found if isinstance(one, MmluOutcome)]
    assert asked == [id_ for i, id_ in enumerate(TASK.ids) if i not in long]
    assert list(ask(model, TASK, n_ctx=n_ctx, finished=TASK.ids)) == []
    assert all(isinstance(one, TooLong) for one in ask(model, TASK, n_ctx=5))


def test_an_interrupted_run_goes_on_where_it_was():
    whole = list(ask(Sums(), TASK, n_ctx=1000, n_parallel=3))
    model = Sums()
    begun = ask(model, TASK, n_ctx=1000, n_parallel=3)
    first = [next(begun) for _ in range(4)]
    del begun

    rest = list(
        ask(model, TASK, n_ctx=1000, n_parallel=3, finished={o.id for o in first})
    )

    assert first + rest == whole
    model.evaluated = 0
    assert list(ask(model, TASK, n_ctx=1000, finished=TASK.ids)) == []
    assert model.evaluated == 0


def test_prompts_that_share_nothing_are_asked_too():
    model = Sums(add_bos=False)
    task = task_of(prompt("a", 1, "x", "1"), prompt("a", 2, "y", "2"))

    outcomes = outcomes_of(model, task, n_ctx=100)

    sums = [sum(map(ord, one.text)) for one in task.prompts]
    assert [one.chosen for one in outcomes] == [LETTERS[s % 4] for s in sums]


def test_logits_that_are_no_numbers_are_refused():
    model = Sums()
    model.logits[:] = np.nan

    with pytest.raises(
        VerificationError, match="maths/1: the model's logits are not finite"
    ):
        list(ask(model, TASK, n_ctx=1000))
    with pytest.raises(VerificationError, match="is numerically broken"):
        answers(model, ["a"])


def test_groups_keep_to_the_room_and_the_number():
    assert list(groups_of([3, 3, 4, 9, 1, 1, 1], 6, 2)) == [
        range(2), range(2, 3), range(3, 4), range(4, 6), range(6, 7)
    ]  # fmt: skip
    assert list(groups_of([], 6, 2)) == []


# Answers.


def chain(**follows: str) -> Table:
    """A table where one character follows another; all others end the answer."""
    table = Table()
    table.logits[:] = 0.0
    table.logits[:, BOS] = 1.0
    for one, other in follows.items():
        table.logits[ord(one), ord(other)] = 2.0
    return table


def prompts_of(texts: list[str]) -> list[GenerationPrompt]:
    return [
        GenerationPrompt(f"line {n}", text, None) for n, text in enumerate(texts, 1)
    ]


def answers(model, texts, *, n_ctx=50, max_tokens=4, **options):
    ids = tuple(prompt.id for prompt in prompts_of(texts))
    given = Texts(ids, tuple(texts), has_chat_template=False)
    return list(
        answer(
            model,
            given,
            n_ctx=n_ctx,
            max_tokens=max_tokens,
            **options,
        )
    )


@pytest.mark.parametrize("n_parallel", [1, 2, 8])
@pytest.mark.parametrize("n_ctx", [50, 9])
def test_answers_take_the_likeliest_token_to_the_end(n_parallel, n_ctx):
    model = chain(a="b", b="c", c="d", x="x")

    found = answers(model, ["za", "x", "zzc", "d"], n_ctx=n_ctx, n_parallel=n_parallel)

    assert [(one.id, one.text) for one in found] == [
        ("line 1", "bcd"), ("line 2", "xxxx"), ("line 3", "d"), ("line 4", "")
    ]  # fmt: skip
    assert found[0].tokens == (ord("b"), ord("c"), ord("d"))


@pytest.mark.fault(68)
def test_prompts_without_room_for_an_answer_are_named():
    model = chain(a="b")

    found = answers(model, ["za", "zzzza", "a"], n_ctx=8, finished=["line 3"])

    assert found == [
        TooLong(id="line 2", n_tokens=10, n_ctx=8),
        Answer(id="line 1", text="b", tokens=(ord("b"),)),
    ]


def test_a_models_own_chat_template_is_applied():
    pytest.importorskip("jinja2")
    model = chain(**{"$": "y"})
    model.chat_template = "{{ bos_token }}<{{ messages[0].content }}>{{ eos_token }}"
    prompts = prompts_of(["a", "b"])

    given = texts_for(model, prompts)

    assert given == Texts(
        ("line 1", "line 2"), ("\0<a>$", "\0<b>$"), has_chat_template=True
    )
    (first, _) = answer(model, given, n_ctx=50, max_tokens=4)
    assert isinstance(first, Answer)
    assert first.text == "y"
    assert model.evaluated == 2 * len("\0<a>$y")  # no second BOS
    empty = Texts(("line 1",), ("",), has_chat_template=True)
    with pytest.raises(InputError, match="makes an empty text"):
        list(answer(model, empty, n_ctx=50, max_tokens=4))


@pytest.mark.parametrize(
    ("add_bos", "add_eos", "text", "read"),
    [
        (True, False, "<a>", "\0<a>"),
        (True, False, "\0<a>$", "\0<a>$"),
        (True, False, "\0\0<a>", "\0\0<a>"),
        (False, False, "\0<a>", "\0<a>"),
        (False, False, "<a>", "<a>"),
        (True, True, "<a>", "\0<a>$"),
        (False, True, "<a>$", "<a>$"),
    ],
)
def test_a_chat_has_the_one_bos_and_eos_that_llama_server_gives(
    add_bos, add_eos, text, read
):
    model = Table(add_bos=add_bos)
    model.add_eos = add_eos
    assert model.detokenize(chat_tokens(model, text)) == read


def test_a_model_without_a_template_gets_the_prompts_as_they_are():
    given = texts_for(Table(), prompts_of(["a"]))

    assert given == Texts(("line 1",), ("a",), has_chat_template=False)


# llama.cpp.


def loaded(path: Path):
    from ewq_gguf.bench.engines.llama import LlamaModel
    from ewq_gguf.bench.engines.llama_log import Log

    setup = BenchSetup(
        device="cpu",
        n_gpu_layers=None,
        tensor_split=(),
        rpc=(),
        n_threads=2,
        cache_type_k="f16",
        cache_type_v="f16",
    )
    return LlamaModel(path, setup, Log())


def one_by_one(model, task, letters) -> list[MmluOutcome]:
    """Whole prompts, each in an empty context."""
    outcomes = []
    with model.scorer(2048) as scorer:
        for one in task.prompts:
            scorer.clear()
            batch = Batch.of(prompt_tokens(model, one.text), 0)
            (row,) = forward(scorer, batch)
            outcomes.append(score_question(one.question, row, letters))
    return outcomes


def check_same(found, alone, nats: float) -> None:
    assert [one.id for one in found] == [one.id for one in alone]
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(
            one.letter_logprobs_nats, other.letter_logprobs_nats, atol=nats, rtol=0
        )
        last, first = sorted(other.letter_logprobs_nats)[-2:]
        assert one.chosen == other.chosen or first - last < 0.1


@pytest.mark.llamacpp
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("text", ["user: hi", "<s>user: hi</s> <s>"])
def test_a_chats_tokens_are_those_of_llama_cpp(tiny, text):
    import llama_cpp

    model = loaded(tiny.base)
    data = text.removeprefix("<s>").encode()
    room = (llama_cpp.llama_token * 64)()
    n = llama_cpp.llama_tokenize(model._vocab, data, len(data), room, 64, True, True)

    assert model.add_bos
    assert chat_tokens(model, text).tolist() == room[:n]


@pytest.mark.llamacpp
@pytest.mark.usefixtures("own_cache")
def test_llama_cpp_shares_and_forgets_as_it_should(tiny, monkeypatch):
    letters = (5, 6, 7, 8)  # the tiny tokenizer has none
    monkeypatch.setattr(
        "ewq_gguf.bench.questions.letters.letter_tokens", lambda _: letters
    )
    model = loaded(tiny.base)

    for n_parallel in (1, 3):
        found = list(ask(model, TASK, n_ctx=256, n_parallel=n_parallel))
        check_same(found, one_by_one(model, TASK, letters), 0.05)


@pytest.mark.llamacpp
@pytest.mark.usefixtures("own_cache")
def test_llama_cpp_answers_side_by_side_as_alone(tiny):
    model = loaded(tiny.base)
    texts = ["the quick", "brown fox jumps over", "a"]

    alone, together = (
        answers(model, texts, n_ctx=256, max_tokens=8, n_parallel=n) for n in (1, 3)
    )

    assert [one.tokens[:1] for one in together] == [one.tokens[:1] for one in alone]


@pytest.mark.slow
@pytest.mark.llamacpp
@pytest.mark.usefixtures("own_cache")
def test_mmlu_on_the_built_in_model_is_as_one_by_one(toolchain, monkeypatch):
    folder = os.environ.get("EWQ_MMLU_DIR")
    if not folder:
        pytest.skip("EWQ_MMLU_DIR names no folder with MMLU's files")
    model = loaded(base_file(Run("demo")))
    letters = letter_tokens(lambda text: model.tokenize(text).tolist())
    task = load_task(Path(folder), subjects=["marketing"], limit=50)
    n_evaluated = []
    with model.scorer(8) as scorer:
        kind = type(scorer)
    evaluate = kind.evaluate

    def counted(scorer, batch):
        n_evaluated.append(len(batch))
        return evaluate(scorer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "evaluate", counted)
        found = list(ask(model, task, n_ctx=2048))

    n_all = sum(len(prompt_tokens(model, one.text)) for one in task.prompts)
    assert sum(n_evaluated) <= n_all / 5
    few = task_of(*task.prompts[:8])  # the others take minutes
    check_same(found[:8], one_by_one(model, few, letters), 0.05)

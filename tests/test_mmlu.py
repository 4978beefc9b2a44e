"""MMLU: rows, prompts, scores; its published files where EWQ_MMLU_DIR names them."""

from __future__ import annotations

import os
from collections import Counter
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ewq_gguf.bench.questions.letters import letter_tokens
from ewq_gguf.bench.questions.mmlu_data import (
    Question,
    choose,
    load_task,
)
from ewq_gguf.bench.questions.mmlu_scores import (
    compare_mmlu,
    mmlu_scores,
    score_question,
)
from ewq_gguf.bench.questions.tokens import common_prefix, n_shared_tokens, too_long
from ewq_gguf.errors import InputError, UsageError, VerificationError
from ewq_gguf.records.scores import MmluOutcome

SOUND = "What is 2 + 2?,3,4,5,6,B\n"
LETTERS = (10, 20, 30, 40)


def write(folder: Path, **files: str | bytes) -> Path:
    """A folder of MMLU files; `test_maths` becomes test/maths_test.csv."""
    for key, content in files.items():
        split, _, subject = key.partition("_")
        path = folder / split / f"{subject}_{split}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def question(row: int = 1, answer: str = "B", subject: str = "maths") -> Question:
    return Question(subject, row, f"Question {row}?", ("w", "x", "y", "z"), answer)  # type: ignore[arg-type]


def problems(folder: Path, **options) -> dict[tuple[str, int], str]:
    faults = load_task(folder, **{"n_shots": 0, **options}).faults
    return {(fault.file, fault.row): fault.problem for fault in faults}


def test_the_prompt_is_the_standard_one(tmp_path):
    write(
        tmp_path,
        test_us_history='"  Who,\nthen? ",me , you,"he, she",they,C\n',
        dev_us_history="First?,a,b,c,d,A\nSecond?,e,f,g,h,D\nThird?,i,j,k,l,B\n",
    )

    (prompt,) = load_task(tmp_path, n_shots=2).prompts

    assert prompt.prefix == (
        "The following are multiple choice questions (with answers) about us history."
        "\n\nFirst?\nA. a\nB. b\nC. c\nD. d\nAnswer: A"
        "\n\nSecond?\nA. e\nB. f\nC. g\nD. h\nAnswer: D\n\n"
    )
    # The question is stripped, the choices are not.
    assert prompt.suffix == "Who,\nthen?\nA. me \nB.  you\nC. he, she\nD. they\nAnswer:"
    assert prompt.text == prompt.prefix + prompt.suffix
    assert prompt.question.id == "us_history/1"


def test_without_shots_dev_is_not_needed(tmp_path):
    (prompt,) = load_task(write(tmp_path, test_maths=SOUND), n_shots=0).prompts

    assert prompt.prefix.endswith("about maths.\n\n")


@pytest.mark.fault(65)
@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("Why?,a,b,c,A", "has 5 fields, not question, four choices and answer"),
        ("Why?,a,,c,d,A", "has no choice B"),
        (" ,a,b,c,d,A", "has no question"),
        ("Why?,a,b,c,d,E", "has the answer 'E', not A, B, C or D"),
        ("Why?,a,b,c,d,", "has the answer '', not A, B, C or D"),
        ("question,A,B,C,D,answer", "has the answer 'answer', not A, B, C or D"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named_and_left_out(tmp_path, row, problem):
    write(tmp_path, test_maths=f"{SOUND}{row}\nNext?,a,b,c,d,A\n")

    task = load_task(tmp_path, n_shots=0)

    assert problems(tmp_path) == {("test/maths_test.csv", 2): problem}
    assert [p.question.row for p in task.prompts] == [1, 3]
    assert task.n_available == 2
    assert task.faults[0].is_left_out


@pytest.mark.fault(65)
def test_a_repeated_row_is_named_and_asked(tmp_path):
    other = SOUND.replace(",B", ",C")
    write(tmp_path, test_maths=SOUND + SOUND + other, test_art=SOUND)

    task = load_task(tmp_path, n_shots=0)

    assert problems(tmp_path) == {
        ("test/maths_test.csv", 2): "repeats row 1",
        ("test/maths_test.csv", 3): "repeats row 1 with another answer",
    }
    assert not any(fault.is_left_out for fault in task.faults)
    assert len(task.prompts) == 4


@pytest.mark.fault(65)
def test_a_subject_without_sound_rows_or_a_name_is_named(tmp_path):
    write(tmp_path, test_maths=SOUND, test_art="Why?,a,b,c,d,E\n", test_=SOUND)

    assert problems(tmp_path) == {
        ("test/_test.csv", 0): "has no subject in its name",
        ("test/art_test.csv", 1): "has the answer 'E', not A, B, C or D",
        ("test/art_test.csv", 0): "has no sound question",
    }
    with pytest.raises(InputError, match="none of its 1 subjects has a sound question"):
        load_task(tmp_path, n_shots=0, subjects=["art"])


@pytest.mark.fault(66)
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\xef\xbb\xbf" + SOUND.encode(), "begins with a byte order mark"),
        (SOUND.encode("utf-16"), "has a NUL at byte 3"),
        (b"a\0" + SOUND.encode(), "has a NUL at byte 1"),
        ("Était-ce?,a,b,c,d,A\n".encode("latin-1"), "is not UTF-8 at byte 0"),
        (b'"One\r\ntwo",a,b,c,d,A\r\n', "line 2: has a carriage return in a field"),
        (b'"One,a,b,c,d,A\n', "is not CSV"),
        (b'"One"x,a,b,c,d,A\n', "line 1: is not CSV"),
    ],
)
def test_a_file_whose_characters_are_in_doubt_is_refused(tmp_path, content, problem):
    write(tmp_path, test_art=SOUND, test_maths=content)

    with pytest.raises(InputError, match=problem) as caught:
        load_task(tmp_path, n_shots=0)

    assert "maths_test.csv" in str(caught.value)


def test_rows_may_end_with_crlf(tmp_path):
    lf = load_task(write(tmp_path, test_maths=SOUND * 2), n_shots=0)
    crlf = SOUND.replace("\n", "\r\n")

    assert load_task(write(tmp_path, test_maths=crlf * 2), n_shots=0) == lf


@pytest.mark.fault(66)
def test_a_folder_without_files_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no test/SUBJECT_test.csv"):
        load_task(tmp_path)
    write(tmp_path, test_maths=SOUND)
    with pytest.raises(InputError, match="has no dev/SUBJECT_dev.csv"):
        load_task(tmp_path)
    write(tmp_path, dev_maths=SOUND)
    with pytest.raises(InputError, match="maths: dev has 1 sound examples, 5 are"):
        load_task(tmp_path)
    assert load_task(tmp_path, n_shots=1).n_shots == 1


def test_numbers_out_of_range_and_unknown_subjects_are_usage_errors(tmp_path):
    write(tmp_path, test_maths=SOUND)
    for n_shots, limit in ((6, 1), (-1, 1), (0, 0)):
        with pytest.raises(UsageError, match="0 to 5 shots"):
            load_task(tmp_path, n_shots=n_shots, limit=limit)
    with pytest.raises(UsageError, match="math: is not a subject here; .* maths"):
        load_task(tmp_path, n_shots=0, subjects=["math"])


def test_the_hubs_layout_gives_the_same_prompts(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [
        {"question": "What is 2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1}
    ]
    for name in ("maths", "all"):
        (tmp_path / "hub" / name).mkdir(parents=True)
        for split in ("test", "dev"):
            path = tmp_path / "hub" / name / f"{split}-00000-of-00001.parquet"
            pq.write_table(pyarrow.Table.from_pylist(rows), path)

    csv = load_task(write(tmp_path, test_maths=SOUND, dev_maths=SOUND), n_shots=1)

    assert load_task(tmp_path / "hub", n_shots=1) == csv


@pytest.mark.fault(65, 66)
def test_odd_and_cut_parquet_files(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [
        {"question": "Why?", "choices": ["a", "b", "c", "d"], "answer": 7},
        {"question": "Why?", "choices": ["a", "b"], "answer": 0},
        {"question": "Why?", "choices": ["a", "b", "c", "d"], "answer": 0},
    ]
    path = tmp_path / "maths" / "test-00000-of-00001.parquet"
    path.parent.mkdir()
    pq.write_table(pyarrow.Table.from_pylist(rows), path)
    assert list(problems(tmp_path).values()) == [
        "has the answer '7', not A, B, C or D",
        "has 4 fields, not question, four choices and answer",
    ]
    whole = path.read_bytes()
    for cut in (whole[:-50], whole[:100], b"PAR1" * 10, b""):
        path.write_bytes(cut)
        with pytest.raises(InputError, match="is not a sound parquet file"):
            load_task(tmp_path, n_shots=0)
    pq.write_table(pyarrow.table({"question": ["Why?"]}), path)
    with pytest.raises(InputError, match="has no column answer or choices"):
        load_task(tmp_path, n_shots=0)


def test_the_choice_is_seeded_nested_and_in_order():
    questions = [question(row) for row in range(1, 101)]

    ten, twenty = choose(questions, 10, 0), choose(questions, 20, 0)

    # Of SHA-256: the same on every machine and version.
    assert [q.row for q in choose(questions, 4, 0)] == [25, 72, 88, 99]
    assert set(ten) < set(twenty)
    assert [q.row for q in twenty] == sorted(q.row for q in twenty)
    assert choose(questions, 10, 1) != ten
    assert choose(questions, None, 0) == choose(questions, 100, 0) == questions


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=6))
def test_shared_tokens_are_those_all_prompts_begin_with(prompts):
    n = n_shared_tokens(prompts)

    assert all(tokens[:n] == prompts[0][:n] for tokens in prompts)
    room = max(min(map(len, prompts)) - 1, 0)
    assert n == room or len({tokens[n] for tokens in prompts}) > 1


def test_common_prefix():
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == 0


def test_letters_are_single_tokens_after_the_answer():
    words = {"Answer:": 1, " A": 2, " B": 3, " C": 4, " D": 5}

    def tokenize(text):
        return [words["Answer:"], *([words[text[7:]]] if text[7:] else [])]

    assert letter_tokens(tokenize) == (2, 3, 4, 5)
    # A tokenizer of bytes: a space, then the letter.
    with pytest.raises(InputError, match="no single tokens"):
        letter_tokens(lambda text: list(text.encode()))
    with pytest.raises(InputError, match="no single tokens"):
        letter_tokens(lambda text: [1] if text == "Answer:" else [1, 0])


def logits_of(probabilities: dict[int, float], n_vocab: int = 1000) -> np.ndarray:
    """Logits whose softmax gives these; the other tokens share the rest."""
    rest = (1 - sum(probabilities.values())) / (n_vocab - len(probabilities))
    values = np.full(n_vocab, rest)
    values[list(probabilities)] = list(probabilities.values())
    return np.asarray(np.log(values) + 7, np.float32)


def test_letters_are_scored_by_hand():
    found = score_question(
        question(), logits_of({10: 0.1, 20: 0.4, 30: 0.2, 40: 0.1}), LETTERS
    )

    assert (found.chosen, found.n_in_top) == ("B", 4)
    assert found.letter_logprobs_nats == pytest.approx(np.log([0.1, 0.4, 0.2, 0.1]))
    # Among the four: 0.4 / 0.8.
    assert found.nll_nats == pytest.approx(log(2), abs=1e-6)


def test_a_letter_outside_the_top_100_counts_as_minus_100():
    # 99 tokens of 0.005 and A at 0.3 are the top 100; B, C and D are not.
    likelier = dict.fromkeys(range(100, 199), 0.005)
    logits = logits_of({10: 0.3, 20: 0.004, 30: 0.003, 40: 0.002, **likelier})

    right, wrong = (
        score_question(question(answer=answer), logits, LETTERS) for answer in "AB"
    )

    assert (right.n_in_top, wrong.n_in_top) == (1, 1)
    assert right.nll_nats == pytest.approx(0, abs=1e-12)
    assert wrong.nll_nats == pytest.approx(100 + log(0.3), abs=1e-5)
    # The record keeps what the model said.
    assert wrong.letter_logprobs_nats[1] == pytest.approx(log(0.004), abs=1e-5)


def test_the_hundredth_token_is_in_and_the_next_is_not():
    for n_likelier, n_in_top in ((99, 1), (100, 0)):
        likelier = dict.fromkeys(range(100, 100 + n_likelier), 0.005)
        small = {20: 1e-6, 30: 1e-6, 40: 1e-6}
        logits = logits_of({10: 0.004, **small, **likelier})
        assert score_question(question(), logits, LETTERS).n_in_top == n_in_top


def test_without_any_letter_each_gets_a_quarter_and_the_likeliest_is_still_chosen():
    likelier = dict.fromkeys(range(100, 200), 0.005)
    logits = logits_of({10: 1e-5, 20: 1e-5, 30: 2e-5, 40: 1e-5, **likelier})

    found = score_question(question(), logits, LETTERS)

    assert (found.n_in_top, found.chosen) == (0, "C")
    assert found.nll_nats == pytest.approx(log(4))


@given(st.integers(0, 2**32 - 1))
def test_log_probabilities_are_those_of_the_whole_vocabulary(seed):
    logits = np.random.default_rng(seed).normal(0, 5, 500).astype(np.float32)

    found = score_question(question(), logits, LETTERS)

    shares = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum()
    assert np.exp(found.letter_logprobs_nats) == pytest.approx(shares[list(LETTERS)])
    shifted = score_question(question(), logits + np.float32(64), LETTERS)
    assert shifted.nll_nats == pytest.approx(found.nll_nats, abs=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_an_error_with_the_questions_name(bad):
    logits = np.zeros(100, np.float32)
    logits[3] = bad
    with pytest.raises(
        VerificationError, match="maths/1: the model's logits are not finite"
    ):
        score_question(question(), logits, LETTERS)


def outcome(id_: str, answer: str, chosen: str, nll: float = 1.0) -> MmluOutcome:
    return MmluOutcome.model_validate(
        {
            "id": id_,
            "answer": answer,
            "chosen": chosen,
            "letter_logprobs_nats": (-1.0, -2.0, -3.0, -4.0),
            "n_in_top": 4,
            "nll_nats": nll,
        }
    )


@pytest.fixture
def task(tmp_path):
    write(tmp_path, test_art=SOUND, test_maths=SOUND + "Why?,a,b,c,d,A\n" * 2)
    return load_task(tmp_path, n_shots=0)


def test_scores_by_hand(task):
    outcomes = [
        outcome("art/1", "B", "B", log(2)),
        outcome("maths/1", "B", "A", log(4)),
        outcome("maths/2", "A", "A", log(8)),
    ]

    scores = mmlu_scores(task, outcomes, [])

    art, maths = scores.subjects
    assert (art.subject, art.n, art.accuracy) == ("art", 1, 1)
    assert art.accuracy_stderr is art.mmlu_perplexity_stderr is None
    assert maths.mmlu_perplexity == pytest.approx(exp(2.5 * log(2)))
    assert (scores.n, scores.n_right) == (3, 2)
    # Each question counts the same: ln 2 + ln 4 + ln 8 is 6 ln 2, over 3.
    assert scores.nll_mean_nats == pytest.approx(2 * log(2))
    assert scores.mmlu_perplexity == pytest.approx(4)
    # The deviation of 1, 2, 3 is 1.
    assert scores.mmlu_perplexity_stderr == pytest.approx(4 * log(2) / 3**0.5)
    assert scores.accuracy_stderr == pytest.approx((2 / 9 / 2) ** 0.5)
    assert (scores.constant_letter, scores.constant_accuracy) == ("B", 2 / 3)
    assert [fault.problem for fault in scores.faults] == ["repeats row 2"]
    assert scores.prompts_sha256 == task.sha256


@pytest.mark.parametrize(
    ("n_right", "is_at_chance"), [(142, True), (162, True), (172, False), (100, False)]
)
def test_chance_is_inside_the_interval_or_not(task, n_right, is_at_chance):
    # 570 questions: 142.5 by guessing, give or take 20.
    outcomes = [
        outcome(f"art/{n}", "A", "A" if n < n_right else "B") for n in range(570)
    ]
    assert mmlu_scores(task, outcomes, []).is_at_chance == is_at_chance


@pytest.mark.fault(68)
def test_prompts_longer_than_the_context_are_counted_not_cut(task):
    skipped = too_long(task.ids, [5, 99, 100, 101], 100)

    assert [(one.id, one.n_tokens, one.n_ctx) for one in skipped] == [
        ("maths/3", 101, 100)
    ]
    scores = mmlu_scores(task, [outcome("art/1", "B", "B")], skipped)
    assert (scores.n, scores.too_long) == (1, tuple(skipped))
    with pytest.raises(InputError, match="all 1 prompts are longer than the context"):
        mmlu_scores(task, [], skipped)


def test_two_models_are_compared_on_what_both_were_asked():
    first = [outcome(f"art/{n}", "A", "A") for n in range(8)]
    second = [outcome(f"art/{n}", "A", "B" if n < 6 else "A") for n in range(1, 9)]

    test = compare_mmlu(first, second)

    assert (test.n, test.n_unpaired) == (7, 2)
    assert (test.n_only_first, test.n_only_second) == (5, 0)
    assert test.p == 2 / 2**5
    with pytest.raises(InputError, match="share no question"):
        compare_mmlu(first[:1], second)


# The published files.


@pytest.fixture
def published() -> Path:
    folder = os.environ.get("EWQ_MMLU_DIR")
    if not folder:
        pytest.skip("MMLU is not here: set EWQ_MMLU_DIR to a folder of test/ and dev/")
    return Path(folder)


def test_all_of_mmlu(published):
    task = load_task(published, limit=None)

    assert len(task.prompts) == task.n_available == 14_042
    by_subject = Counter(prompt.question.subject for prompt in task.prompts)
    assert len(by_subject) == 57
    # The published test set repeats 27 of its questions, and dev one.
    assert Counter(fault.file[:4] for fault in task.faults) == {"test": 27, "dev/": 1}
    assert all(fault.problem.startswith("repeats row") for fault in task.faults)
    prefixes = {p.question.subject: p.prefix for p in task.prompts}
    assert all(prefix.count("\nAnswer: ") == 5 for prefix in prefixes.values())
    one = task.prompts[0]
    assert one.suffix.startswith("Find the degree for the given field extension")
    assert one.question.answer == "B"


def test_the_default_is_ten_of_each_subject(published):
    task = load_task(published)

    assert len(task.prompts) == 570
    assert set(Counter(p.question.subject for p in task.prompts).values()) == {10}
    assert task.sha256 == load_task(published).sha256


def test_prompts_are_those_of_the_harness_template(published):
    """Its template and its joining of texts, rendered by jinja2."""
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment().from_string(
        "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\n"
        "C. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
    )
    task = load_task(published, limit=3)

    for prompt in task.prompts:
        asked = prompt.question
        theirs = template.render(question=asked.text, choices=asked.choices)
        assert prompt.suffix == theirs

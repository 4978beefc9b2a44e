"""Generated answers: prompts' files, BLEU and ROUGE by hand, chat templates."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from math import exp, log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ewq_gguf import data
from ewq_gguf.bench.answers.chat import apply_chat_template
from ewq_gguf.bench.answers.scores import (
    GenerationPrompt,
    fidelity,
    generation_scores,
    load_prompts,
    prompts_hash,
    text_scores,
)
from ewq_gguf.errors import InputError, ToolError
from ewq_gguf.records.generation import Answer
from ewq_gguf.records.scores import TooLong

pytest.importorskip("rouge_score")
sacrebleu = pytest.importorskip("sacrebleu")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def answer(line: int, text: str, *tokens: int) -> Answer:
    return Answer(id=f"line {line}", text=text, tokens=tokens)


# Prompts.


def test_prompts_are_the_lines_of_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "One\\ntwo", "reference": "a"}\r\n\n'
        '{"prompt": "Three\u2028four", "reference": ""}\n'
    )

    assert load_prompts(path) == (
        GenerationPrompt("line 1", "One\ntwo", "a"),
        GenerationPrompt("line 3", "Three\u2028four", ""),
    )
    assert load_prompts(path, 1)[-1].id == "line 1"
    path.write_text('{"prompt": "One"}')
    assert load_prompts(path)[0].reference is None


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2: Invalid JSON"),
        ("[]", "line 2: Input should be an object"),
        ('"Hello"', "line 2: Input should be an object"),
        ('{"reference": "a"}', "line 2: prompt: Field required"),
        ('{"prompt": 3, "reference": "a"}', "line 2: prompt: .* string"),
        ('{"prompt": " ", "reference": "a"}', "line 2: the prompt is empty"),
        ('{"prompt": "a", "reference": "b", "x": 1}', "line 2: x: Extra inputs"),
        ('{"prompt": "\\ud800", "reference": "a"}', "line 2: "),
        ('{"prompt": "a"}', "line 1 and line 2: only one has a reference"),
        ("[" * 100_000, "line 2: Invalid JSON"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, line, problem):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a", "reference": "b"}}\n{line}\n')

    with pytest.raises(InputError, match=problem):
        load_prompts(path)


@pytest.mark.fault(66)
@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b'\xef\xbb\xbf{"prompt": "a"}', b"\0", b'{"prompt": "\xe9"}'],
)
def test_a_file_whose_characters_are_in_doubt_is_refused(tmp_path, content):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)

    with pytest.raises(InputError, match=r"empty|byte order|NUL|UTF-8"):
        load_prompts(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_prompts(tmp_path / "none.jsonl")


def test_the_hash_of_prompts_is_that_of_ids_texts_and_references():
    one, other = (GenerationPrompt("line 1", "One", r) for r in ("a", None))
    moved = replace(one, id="line 9")  # answers are kept by their ids
    all_of_them: tuple[list[GenerationPrompt], ...] = (
        [one],
        [other],
        [moved],
        [one, one],
        [],
    )

    assert prompts_hash([one]) == prompts_hash([replace(one)])
    assert len({prompts_hash(some) for some in all_of_them}) == 5


def test_the_packages_own_prompts_have_references():
    prompts = load_prompts(data.PROMPTS)

    assert len({prompt.text for prompt in prompts}) == 20
    assert all(prompt.reference for prompt in prompts)


# Scores.


def test_bleu_by_hand():
    # Found of those there: 4 of 5 words, 2 of 4, 1 of 3, 0 of 2; the last is smoothed
    # to 1 / (2 * 2). The answer is 5 words, its reference 6.
    found = text_scores([("line 1", "the cat sat a mat", "the cat sat on a hat mat")])
    counts = sacrebleu.corpus_bleu(
        ["the cat sat a mat"], [["the cat sat on a hat mat"]]
    )
    assert (counts.counts, counts.totals) == ([5, 2, 1, 0], [5, 4, 3, 2])

    precisions = [5 / 5, 2 / 4, 1 / 3, 1 / 4]
    bleu = 100 * exp(sum(map(log, precisions)) / 4) * exp(1 - 7 / 5)
    assert found.bleu == pytest.approx(bleu)
    assert found.bleu_low is None
    assert found.bleu_signature == (
        f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    )


def test_rouge_by_hand():
    # Words: 5 of 5 found, 5 of 7 there. Pairs: 2 of 4, 2 of 6. The longest common
    # subsequence is all 5.
    found = text_scores([("line 1", "the cat sat a mat", "the cat sat on a hat mat")])

    assert found.rouge_1 == pytest.approx(2 * 5 / (5 + 7))
    assert found.rouge_2 == pytest.approx(2 * 2 / (4 + 6))
    assert found.rouge_l == pytest.approx(2 * 5 / (5 + 7))
    assert found.rouge_l_stderr is None
    # Line by line, in another order: all words are found, no long subsequence is.
    turned = text_scores([("line 1", "c d\na b", "a b\nc d")])
    assert (turned.rouge_l, turned.rouge_lsum) == (0.5, 1)
    assert "rouge-score" in found.rouge_signature


def test_means_have_their_errors():
    found = text_scores([("line 1", "a b", "a b"), ("line 2", "a b", "c d")])

    assert (found.rouge_1, found.rouge_1_stderr) == (0.5, 0.5)
    assert [one.rouge_1 for one in found.outcomes] == [1, 0]


words = st.lists(st.sampled_from("a b c d e .".split()), max_size=8).map(" ".join)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=6))
def test_bleu_of_all_answers_is_sacrebleus(pairs):
    answers, references = zip(*pairs, strict=True)

    found = text_scores([(f"line {n}", *pair) for n, pair in enumerate(pairs)])

    theirs = sacrebleu.corpus_bleu(list(answers), [list(references)])
    assert found.bleu == pytest.approx(theirs.score)
    if found.bleu_low is not None and found.bleu_high is not None:
        assert 0 <= found.bleu_low <= found.bleu_high <= 100 + 1e-9


def test_bleus_interval_is_sacrebleus_bootstrap():
    rng = np.random.default_rng(0)
    answers, references = (
        [" ".join(rng.choice(list("abc"), rng.integers(5, 15))) for _ in range(200)]
        for _ in range(2)
    )
    pairs = zip(answers, references, strict=True)
    found = text_scores([(f"line {n}", *pair) for n, pair in enumerate(pairs)])

    metric = sacrebleu.metrics.BLEU()
    theirs = metric.corpus_score(answers, [references], n_bootstrap=1000)
    described = json.loads(
        theirs.format(signature=str(metric.get_signature()), is_json=True)
    )
    assert found.bleu_low is not None
    assert found.bleu_high is not None
    half = (found.bleu_high - found.bleu_low) / 2
    assert half == pytest.approx(described["confidence_var"], rel=0.1)


@pytest.mark.fault(70)
@pytest.mark.parametrize(
    ("text", "reference"), [("", "a b"), ("a b", ""), ("", ""), (" \n", "a")]
)
def test_an_empty_side_scores_0_and_is_counted(text, reference):
    found = text_scores([("line 1", text, reference), ("line 2", "a b", "a b")])

    assert found.n_empty_answers == (not text.strip())
    assert found.n_empty_references == (not reference.strip())
    empty = found.outcomes[0]
    assert {empty.rouge_1, empty.rouge_2, empty.rouge_l, empty.rouge_lsum} == {0}
    assert found.rouge_l == 0.5
    alone = text_scores([("line 1", text, reference)])
    assert (alone.bleu, alone.rouge_lsum) == (0, 0)


def test_texts_without_words_of_rouge_are_counted():
    found = text_scores([("line 1", "Привет", "Привет"), ("line 2", "a", "a")])

    assert (found.n_wordless, found.n_empty_answers) == (1, 0)
    assert found.outcomes[0].rouge_1 == 0


def test_fidelity_needs_no_references():
    ours = [
        answer(1, "a b", 1, 2),
        answer(2, "a c d", 1, 3, 4),
        answer(
            3,
            "",
        ),
    ]
    theirs = [
        answer(1, "a b", 1, 2),
        answer(2, "a e", 1, 5),
        answer(3, ""),
        answer(4, "x", 9),
    ]

    found = fidelity(ours, theirs)

    assert found.common_prefix_tokens == (2, 1, 0)
    assert found.common_prefix_mean == 1
    # All of it, a third of the longer, and all of nothing.
    assert found.common_prefix_share == pytest.approx((1 + 1 / 3 + 1) / 3)
    assert found.common_prefix_share_stderr == pytest.approx(2 / 3 / 3)
    assert found.n_identical == 2
    assert found.scores.n_empty_answers == 1
    with pytest.raises(InputError, match="answered none of the prompts"):
        fidelity(ours, [])


def test_scores_of_a_run():
    prompts = [
        GenerationPrompt("line 1", "One", "a b"),
        GenerationPrompt("line 2", "Two", "c"),
    ]
    skipped = [TooLong(id="line 2", n_tokens=99, n_ctx=64)]

    found = generation_scores(
        prompts, ["One", "Two"], [answer(1, "a b", 1)], skipped=skipped
    )

    assert (found.n_prompts, len(found.too_long)) == (2, 1)
    assert found.fidelity is None
    assert found.references is not None
    assert (found.references.n, found.references.rouge_l) == (1, 1)
    plain = [GenerationPrompt("line 1", "One", None)]
    against = generation_scores(
        plain, ["One"], [answer(1, "a", 1)], base=[answer(1, "a", 1)]
    )
    assert against.references is None
    assert against.fidelity is not None
    assert against.fidelity.n_identical == 1
    with pytest.raises(
        InputError, match="all 1 are longer than the context of 64 tokens"
    ):
        generation_scores(prompts, ["One", "Two"], [], skipped=skipped)


def test_a_missing_library_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr("ewq_gguf.bench.answers.scores.find_spec", lambda _: None)

    with pytest.raises(
        ToolError, match=r"rouge_score.* pip install 'ewq-gguf\[eval\]'"
    ):
        text_scores([("line 1", "a", "a")])


# Chat templates.


def test_a_template_is_applied_to_each_prompt():
    assert apply_chat_template(CHATML, ["Hi", "{{ 1 + 1 }}"]) == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        # What users say is no template.
        "<|im_start|>user\n{{ 1 + 1 }}<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_templates_have_what_transformers_gives_them():
    template = (
        "{{ bos_token }}{%- for m in messages -%}{%- if loop.index > 1 -%}{%- break -%}"
        "{%- endif -%}{% generation %}{{ m | tojson }}{% endgeneration %}"
        "{%- endfor -%}{{ strftime_now('%d %b %Y') }}{{ eos_token }}{{ tools is none }}"
    )

    (text,) = apply_chat_template(template, ["é<"], bos_token="<s>", eos_token="</s>")

    assert text == '<s>{"role": "user", "content": "é<"}26 Jul 2024</s>True'


@pytest.mark.parametrize("prompt", ["Hello", "  two\nlines  ", "日本 <|im_end|>"])
def test_the_result_is_that_of_transformers(prompt):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": "user", "content": prompt}]

    theirs, _ = utils.render_jinja_template(
        conversations=[messages], chat_template=CHATML, add_generation_prompt=True
    )

    assert apply_chat_template(CHATML, [prompt]) == list(theirs)


@pytest.mark.fault(39)
@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('touch x') }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "cannot be rendered"),
        ("{% import 'os' as os %}", "cannot be rendered"),
        ("{{ raise_exception('no system role') }}", "TemplateError: no system role"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('x' * 10**7) }}", "TemplateError: xxx"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError"),
        ("{{ 'x' * 10**10 }}", "wants more than 1024 MiB of memory"),
        ("{{ '\\ud800' }}", "UnicodeEncodeError"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "cannot be rendered"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_a_hostile_template_does_nothing(template, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=problem) as caught:
        apply_chat_template(template, ["Hi"])

    assert len(str(caught.value)) < 1000
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(39)
@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
    ],
)
def test_a_template_cannot_hang(template):
    started = time.monotonic()
    with pytest.raises(InputError, match="took longer than 2 s"):
        apply_chat_template(template, ["Hi"], timeout_seconds=2)

    assert time.monotonic() - started < 9


@pytest.mark.fault(39)
def test_a_template_cannot_fill_the_disk():
    template = "{% for i in range(9999) %}{{ 'x' * 999 }}{% endfor %}"

    with pytest.raises(InputError, match="more than 1,000,000 characters"):
        apply_chat_template(template, ["Hi"], max_chars=1_000_000)
    assert len(apply_chat_template("{{ 'x' * 500 }}", ["a"] * 2, max_chars=1000)) == 2


def test_jinja2_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    with pytest.raises(ToolError, match=r"jinja2: is not installed"):
        apply_chat_template(CHATML, ["Hi"])


def test_standard_errors_shrink_with_answers():
    pairs = [(f"line {n}", "a b", "a b" if n % 2 else "c d") for n in range(100)]

    assert text_scores(pairs).rouge_1_stderr == pytest.approx(sqrt(0.25 / 99))

"""Greedy answers to prompts, several side by side."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ewq_gguf.bench.answers.chat import apply_chat_template
from ewq_gguf.bench.answers.scores import GenerationPrompt
from ewq_gguf.bench.engines.forward import forward, groups_of, prompt_tokens
from ewq_gguf.bench.engines.scorer import STAGE, Batch, IntArray, Model, Scorer
from ewq_gguf.bench.questions.tokens import too_long
from ewq_gguf.errors import InputError, VerificationError
from ewq_gguf.records.generation import Answer
from ewq_gguf.records.scores import TooLong

#: Answers side by side.
N_PARALLEL = 8


@dataclass(frozen=True)
class Texts:
    """Prompts as a model gets them.

    Attributes:
        ids: one of each prompt.
        texts: one of each prompt.
        has_chat_template: whether they come from one, special tokens included.
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    has_chat_template: bool


@dataclass
class _Open:
    """An answer that grows."""

    id: str
    n_prompt: int
    sequence: int
    tokens: list[int] = field(default_factory=list)


def texts_for(model: Model, prompts: Sequence[GenerationPrompt]) -> Texts:
    """Prompts through a model's own chat template, where it has one.

    Args:
        model: any.
        prompts: messages of users.

    Raises:
        InputError: the template is broken, refuses, takes too long or too much.
        ToolError: jinja2 is missing.
        ChildError: the sandbox could not be run.
    """
    ids = tuple(prompt.id for prompt in prompts)
    said = [prompt.text for prompt in prompts]
    if not model.chat_template.strip():
        return Texts(ids, tuple(said), has_chat_template=False)
    texts = apply_chat_template(
        model.chat_template,
        said,
        bos_token=_name(model, model.bos),
        eos_token=_name(model, model.eos),
    )
    return Texts(ids, tuple(texts), has_chat_template=True)


def tokens_of(model: Model, texts: Texts) -> list[IntArray]:
    """The texts as a model reads them.

    Raises:
        InputError: a template made an empty text.
    """
    return [_tokens(model, text, texts.has_chat_template) for text in texts.texts]


def answer(
    model: Model,
    texts: Texts,
    *,
    n_ctx: int,
    max_tokens: int,
    n_parallel: int = N_PARALLEL,
    finished: Collection[str] = (),
    on_step: Callable[[float], None] = lambda _n_answers: None,
) -> Iterator[Answer | TooLong]:
    """The likeliest token after the likeliest token, to the end of each answer.

    Groups are the same whatever is finished, and whatever is answered.

    Args:
        model: any.
        texts: the prompts.
        n_ctx: tokens of context: of a prompt with its answer, and of a group's
            together.
        max_tokens: longest answer; at least 1.
        n_parallel: answers of a group, at most.
        finished: ids of prompts that are passed over.
        on_step: told after each token how many answers those of the group that grows
            amount to; a group may take long.

    Yields:
        First the prompts that do not fit the context; then answers in their order.

    Raises:
        InputError: a template made an empty text.
        VerificationError: logits are not finite.
        ResourceError: memory ran out.
    """
    tokens = tokens_of(model, texts)
    lengths = [len(some) + max_tokens for some in tokens]
    skipped = too_long(texts.ids, lengths, n_ctx)
    yield from (one for one in skipped if one.id not in finished)
    fitting = [i for i, length in enumerate(lengths) if length <= n_ctx]
    with model.scorer(n_ctx, n_sequences=n_parallel) as scorer:
        for members in groups_of([lengths[i] for i in fitting], n_ctx, n_parallel):
            group = [
                (texts.ids[i], tokens[i])
                for i in (fitting[member] for member in members)
                if texts.ids[i] not in finished
            ]
            if group:
                yield from _answer_group(model, scorer, group, max_tokens, on_step)


def _answer_group(
    model: Model,
    scorer: Scorer,
    group: Sequence[tuple[str, IntArray]],
    max_tokens: int,
    on_step: Callable[[float], None],
) -> Iterator[Answer]:
    scorer.clear()
    all_open = [
        _Open(id_, len(tokens), sequence)
        for sequence, (id_, tokens) in enumerate(group)
    ]
    growing = all_open
    batch = Batch.join(
        [Batch.of(tokens, 0, sequence) for sequence, (_, tokens) in enumerate(group)]
    )
    while growing:
        rows = forward(scorer, batch)
        goes_on = []
        for one, row in zip(growing, rows, strict=True):
            token = int(row.argmax())
            if not np.isfinite(row[token]):  # argmax finds NaN, too
                problem = "is numerically broken: its logits hold NaN or infinity"
                raise VerificationError(STAGE, "the model", problem, "do not use it")
            if model.is_end(token):
                continue
            one.tokens.append(token)
            if len(one.tokens) < max_tokens:
                goes_on.append(one)
        growing = goes_on
        on_step(sum(len(one.tokens) for one in all_open) / max_tokens)
        if growing:
            batch = Batch.join([_last(one) for one in growing])
    for one in all_open:
        text = model.detokenize(np.array(one.tokens, np.int32))
        yield Answer(id=one.id, text=text, tokens=tuple(one.tokens))


def _last(one: _Open) -> Batch:
    """The token that an answer has got last."""
    position = one.n_prompt + len(one.tokens) - 1
    return Batch.of(np.array(one.tokens[-1:], np.int32), position, one.sequence)


def _tokens(model: Model, text: str, has_chat_template: bool) -> IntArray:
    return (chat_tokens if has_chat_template else prompt_tokens)(model, text)


def chat_tokens(model: Model, text: str) -> IntArray:
    """A chat template's text as the tokens that llama-server gives the model.

    Where the model's texts begin with BOS, there is one BOS, whether the template
    writes it or not; likewise with EOS at their end.

    Raises:
        InputError: the text is empty.

    Source: llama.cpp common/chat.cpp, common_chat_template_direct_apply_impl.
    """
    begin = [model.bos] if model.add_bos else []
    end = [model.eos] if model.add_eos else []
    if begin:
        text = text.removeprefix(_name(model, model.bos))
    if end:
        text = text.removesuffix(_name(model, model.eos))
    tokens = model.tokenize(text, special=True)
    if not len(tokens):
        remedy = "give prompts without it, or a file with a sound one"
        raise InputError(STAGE, "chat template", "makes an empty text", remedy)
    return np.array([*begin, *tokens, *end], np.int32)


def _name(model: Model, token: int) -> str:
    """A special token as text."""
    return model.detokenize(np.array([token], np.int32)) if token >= 0 else ""

"""MMLU's questions put to a model: a subject's examples are read once, not each time.

All prompts of a subject begin with the same tokens. They are evaluated once; then
groups of questions continue copies of them side by side, a group in one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby

from ewq_gguf.bench.engines.forward import forward, groups_of, prompt_tokens
from ewq_gguf.bench.engines.scorer import STAGE, Batch, IntArray, Model, Scorer
from ewq_gguf.bench.questions.mmlu_data import MmluTask, Prompt, Question
from ewq_gguf.bench.questions.mmlu_files import LETTERS
from ewq_gguf.bench.questions.mmlu_scores import score_question
from ewq_gguf.bench.questions.tokens import n_shared_tokens, too_long
from ewq_gguf.errors import InputError
from ewq_gguf.records.scores import MmluOutcome, TooLong

#: Questions side by side. Each also computes, and masks, what the others hold.
N_PARALLEL = 16

_Tokenized = tuple[Question, IntArray]


def ask(
    model: Model,
    task: MmluTask,
    *,
    n_ctx: int,
    n_parallel: int = N_PARALLEL,
    finished: Collection[str] = (),
) -> Iterator[MmluOutcome | TooLong]:
    """Ask all questions, one subject after the other.

    Groups are the same whatever is finished, so that a run that was interrupted between
    two of them gives the numbers of one that was not.

    Args:
        model: any.
        task: the prompts.
        n_ctx: tokens of context: of the longest prompt, and of a group's together.
        n_parallel: questions of a group, at most.
        finished: ids of questions that are passed over.

    Yields:
        The outcome of each question, in the task's order; those that do not fit the
        context come first in their subject, and are not asked.

    Raises:
        InputError: the tokenizer has no letters.
        VerificationError: logits are not finite.
        ResourceError: memory ran out.
    """
    letters = letter_tokens(lambda text: model.tokenize(text).tolist())
    with model.scorer(n_ctx, n_sequences=n_parallel + 1) as scorer:
        for _, prompts in groupby(task.prompts, lambda prompt: prompt.question.subject):
            tokenized, skipped = _tokenized(model, list(prompts), n_ctx)
            yield from (prompt for prompt in skipped if prompt.id not in finished)
            yield from _ask_subject(scorer, tokenized, letters, finished)


def _tokenized(
    model: Model, prompts: Sequence[Prompt], n_ctx: int
) -> tuple[list[_Tokenized], list[TooLong]]:
    """The questions that fit, with their prompts' tokens; and those that do not."""
    tokenized = [(p.question, prompt_tokens(model, p.text)) for p in prompts]
    ids = [question.id for question, _ in tokenized]
    skipped = too_long(ids, [len(tokens) for _, tokens in tokenized], n_ctx)
    left_out = {prompt.id for prompt in skipped}
    return [prompt for prompt in tokenized if prompt[0].id not in left_out], skipped


def _ask_subject(
    scorer: Scorer,
    tokenized: Sequence[_Tokenized],
    letters: Sequence[int],
    finished: Collection[str],
) -> Iterator[MmluOutcome]:
    n_shared = _n_shared([tokens for _, tokens in tokenized])
    lengths = [len(tokens) - n_shared for _, tokens in tokenized]
    # One pass holds a group, and the context all of it beside what is shared.
    n_fitting = min(scorer.n_batch, scorer.n_ctx - n_shared)
    is_read = False
    for members in groups_of(lengths, n_fitting, scorer.n_sequences - 1):
        group = [tokenized[i] for i in members if tokenized[i][0].id not in finished]
        if not group:
            continue
        if not is_read:
            scorer.clear()
            if n_shared:
                forward(scorer, Batch.of(group[0][1][:n_shared], 0, n_outputs=0))
            is_read = True
        yield from _ask_group(scorer, group, n_shared, letters)


def _ask_group(
    scorer: Scorer, group: Sequence[_Tokenized], n_shared: int, letters: Sequence[int]
) -> list[MmluOutcome]:
    """Sequence 0 holds what is shared; each question continues a copy of it."""
    sequences = range(1, len(group) + 1)
    if n_shared:
        for sequence in sequences:
            scorer.copy(0, sequence)
    batch = Batch.join(
        [
            Batch.of(tokens[n_shared:], n_shared, sequence)
            for sequence, (_, tokens) in zip(sequences, group, strict=True)
        ]
    )
    rows = forward(scorer, batch)
    for sequence in sequences:
        scorer.remove(sequence)
    return [
        score_question(question, row, letters)
        for (question, _), row in zip(group, rows, strict=True)
    ]


def _n_shared(prompts: Sequence[IntArray]) -> int:
    # In pairs: a subject's tokens as Python numbers would take a hundred megabytes.
    return min(
        (n_shared_tokens([prompts[0].tolist(), tokens.tolist()]) for tokens in prompts),
        default=0,
    )


def letter_tokens(tokenize: Callable[[str], Sequence[int]]) -> tuple[int, ...]:
    """The tokens that ` A` to ` D` are after `Answer:`.

    Args:
        tokenize: a text without special tokens before or after it.

    Raises:
        InputError: the tokenizer needs more than one token for a letter, or the same.
    """
    before = list(tokenize("Answer:"))
    tokenized = [list(tokenize(f"Answer: {letter}")) for letter in LETTERS]
    tokens = tuple(with_letter[-1] for with_letter in tokenized)
    if any(some[:-1] != before for some in tokenized) or len(set(tokens)) < len(
        LETTERS
    ):
        raise InputError(
            STAGE,
            "tokenizer",
            "has no single tokens ` A` to ` D` after `Answer:`",
            "leave mmlu out of --tasks",
        )
    return tokens

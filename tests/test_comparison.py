"""What a comparison computes and says, from results made by hand."""

from __future__ import annotations

import re
from io import StringIO
from math import exp, log
from statistics import fmean, pvariance, stdev

import numpy as np
import pytest
from rich.console import Console, RenderableType

from ewq_gguf import data
from ewq_gguf.bench.questions.mmlu_data import MmluTask
from ewq_gguf.bench.questions.mmlu_scores import mmlu_scores
from ewq_gguf.bench.runner import Request
from ewq_gguf.bench.statistics import paired_bootstrap
from ewq_gguf.bench.tasks.speed import combined
from ewq_gguf.cli.compare import parse_plans
from ewq_gguf.errors import UsageError
from ewq_gguf.experiments.across_models import across_models, across_view
from ewq_gguf.experiments.compare import bracketing
from ewq_gguf.experiments.comparison import estimates, pairs_of
from ewq_gguf.experiments.comparison_record import (
    ComparedFile,
    Comparison,
    Estimate,
    Kind,
)
from ewq_gguf.experiments.comparison_view import (
    comparison_view,
    notes,
    verdicts,
)
from ewq_gguf.records import (
    BenchedFile,
    Chunk,
    Engine,
    EwqPolicy,
    ModelIdentity,
    Result,
    Speed,
    TextResult,
)
from ewq_gguf.records.scores import ItemScore, Measure, MmluScores, TaskScores
from tests.test_mmlu import outcome

N_CHUNKS, N_TOKENS = 40, 100
SEED = np.random.default_rng(5).uniform(250, 350, N_CHUNKS)


def chunks(extra_nats: float, kld_nats: float | None, n: int = N_CHUNKS):
    """Windows of one difficulty each, and a file's own part on top of it."""
    return tuple(
        Chunk(
            n_tokens=N_TOKENS + i,
            nll_nats=float(SEED[i]) + extra_nats * (1 + i % 3),
            base_nll_nats=None if kld_nats is None else float(SEED[i]),
            kld_nats=None if kld_nats is None else kld_nats * (1 + i % 5),
            n_same_top=None if kld_nats is None else 90,
        )
        for i in range(n)
    )


def result(
    name: str,
    size: int,
    extra_nats: float = 0.0,
    kld_nats: float | None = None,
    mmlu: MmluScores | None = None,
    n_chunks: int = N_CHUNKS,
) -> Result:
    found = chunks(extra_nats, kld_nats, n_chunks)
    n_tokens = sum(chunk.n_tokens for chunk in found)
    ppl = exp(sum(chunk.nll_nats for chunk in found) / n_tokens) if found else None
    text = TextResult(
        name="text", n_tokens=n_tokens, n_skipped=0, ppl=ppl or 1.0, ppl_stderr=0.1,
        kld=None, chunks=found,
    )  # fmt: skip
    return Result(
        file=BenchedFile(name=f"{name}.gguf", size_bytes=size, sha256=name),
        base=None,
        parameters=Request(("speed",)).parameters(),
        engine=Engine(
            name="table", version="1", commit="none", system="", devices={},
            n_layers_offloaded=0,
        ),
        size_bytes=size,
        ppl=ppl,
        kld_mean_nats=None
        if kld_nats is None
        else sum(chunk.kld_nats or 0 for chunk in found) / n_tokens,
        top1_agreement=None if kld_nats is None else 90 * len(found) / n_tokens,
        texts=(text,) if found else (),
        mmlu=mmlu,
    )  # fmt: skip


def row(kind: Kind, found: Result, *brackets: str) -> ComparedFile:
    return ComparedFile(
        name=found.file.sha256,
        kind=kind,
        plan_sha256=None,
        bpw=8.0,
        brackets=brackets,
        result=found,
        **estimates(found),
    )


def comparison(*rows: ComparedFile, model: str = "model", n_turns: int = 0):
    identity = ModelIdentity(
        name=model, hub_id=None, revision=None, hf_architecture="L", n_layers=1,
        files_sha256={"a": model}, shards=(),
    )  # fmt: skip
    return Comparison(
        model=identity, imatrix_sha256=None, n_turns=n_turns, rows=rows,
        pairs=pairs_of(rows),
    )  # fmt: skip


def scores(rights: list[bool], nlls: list[float]) -> MmluScores:
    """Two subjects, question by question in turn."""
    names = ["art", "maths"]
    outcomes = [
        outcome(f"{subject}/{i}", "A", "A" if rights[i] else "B", nlls[i])
        for k, subject in enumerate(names)
        for i in range(k, len(rights), 2)
    ]
    task = MmluTask(prompts=(), n_shots=0, limit=None, seed=0, n_available=9, faults=())
    return mmlu_scores(task, outcomes, [])


def said(found: Comparison) -> str:
    return "\n".join(
        [*notes(found), *(line for part in verdicts(found) for line in part)]
    )


def printed(view: RenderableType, width: int) -> str:
    file = StringIO()
    Console(file=file, width=width).print(view)
    return file.getvalue()


# Numbers


def test_differences_are_those_of_the_chunks():
    ours, theirs = result("ewq", 300, 0.5, 2.0), result("Q8_0", 200, 0.2, 1.0)
    (pair,) = comparison(row("preset", theirs, "ewq"), row("plan", ours)).pairs

    a, b = ours.texts[0].chunks, theirs.texts[0].chunks
    n_tokens = sum(chunk.n_tokens for chunk in a)
    assert pair.kld_nats is not None
    assert pair.nll_nats is not None
    assert pair.kld_nats.n == N_CHUNKS
    assert pair.kld_nats.difference == pytest.approx(
        sum((x.kld_nats or 0) - (y.kld_nats or 0) for x, y in zip(a, b, strict=True))
        / n_tokens
    )
    assert pair.nll_nats == paired_bootstrap(
        [chunk.nll_nats / chunk.n_tokens for chunk in a],
        [chunk.nll_nats / chunk.n_tokens for chunk in b],
        [chunk.n_tokens for chunk in a],
    )
    assert (pair.nll_nats.difference_low or 0) > 0
    assert ours.ppl is not None
    assert theirs.ppl is not None
    assert exp(pair.nll_nats.difference) == pytest.approx(ours.ppl / theirs.ppl)


def test_intervals_hold_their_numbers():
    found = estimates(result("ewq", 300, 0.5, 2.0))

    assert set(found) == {"ppl", "kld_mean_nats", "top1_agreement"}
    for estimate in found.values():
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low < estimate.value < estimate.high
    one = estimates(result("ewq", 300, 0.5, 2.0, n_chunks=1))
    assert one["ppl"].low is one["ppl"].high is None


def test_the_composite_score_is_the_papers_and_a_mean_of_questions():
    rights = [i % 3 > 0 for i in range(60)]
    nlls = [0.5 + (7 * i % 11) / 10 for i in range(60)]
    found = estimates(result("ewq", 300, mmlu=scores(rights, nlls), n_chunks=0))

    score = found["composite_score"]
    assert score.high is not None
    parts = [nll - right for nll, right in zip(nlls, rights, strict=True)]
    assert score.value == pytest.approx(
        log(found["mmlu_perplexity"].value) - found["accuracy"].value
    )
    assert score.value == pytest.approx(fmean(parts))
    assert score.high - score.value == pytest.approx(
        1.96 * stdev(parts) / 60**0.5, 1e-3
    )
    assert "ppl" not in found


def test_two_files_are_paired_by_question_and_by_subject():
    rights = [i % 2 == 0 for i in range(40)]
    ours = scores([True] * 40, [0.5 + i % 2 / 10 for i in range(40)])
    theirs = scores(rights, [1.0] * 40)
    rows = (
        row("preset", result("Q8_0", 200, mmlu=theirs, n_chunks=0), "ewq"),
        row("plan", result("ewq", 300, mmlu=ours, n_chunks=0)),
    )
    (pair,) = comparison(*rows).pairs

    assert pair.accuracy is not None
    assert (pair.accuracy.n_only_first, pair.accuracy.n_only_second) == (20, 0)
    assert pair.composite_score is not None
    # art: 0.5 - 1 beside 1 - 1; maths: 0.6 - 1 beside 1 - 0.
    assert pair.composite_score.difference == pytest.approx((-0.5 - 1.4) / 2)
    assert pair.subjects is not None
    assert pair.subjects.mean == pytest.approx(-0.95)
    pooled = (pvariance([-0.5, -0.4]) + pvariance([0.0, 1.0])) / 2
    assert pair.subjects.cohens_d == pytest.approx(-0.95 / pooled**0.5)
    assert pair.nll_nats is pair.kld_nats is None


def test_turns_of_speed_become_a_mean_and_a_deviation():
    turns = [
        Speed(
            prompt_tps=100 + 10 * i, prompt_tps_std=0, generation_tps=10 + i,
            generation_tps_std=0, ttft_seconds=1.0, ttft_seconds_std=0, load_seconds=i,
        )
        for i in range(3)
    ]  # fmt: skip
    found = combined(turns)
    assert (found.prompt_tps, found.prompt_tps_std) == (110, 10)
    assert (found.generation_tps, found.generation_tps_std) == (11, 1)
    assert (found.ttft_seconds_std, found.load_seconds) == (0, 1)
    assert combined(turns[:1]).generation_tps_std == 0


def choices(name: str, rights: list[bool]) -> dict[str, TaskScores]:
    """A task of choices that only its name is known of."""
    n = len(rights)
    share = sum(rights) / n
    items = tuple(
        ItemScore(id=str(i), answer=0, nats=(0.0,), values={"acc": float(right)})
        for i, right in enumerate(rights)
    )
    measure = Measure(value=share, stderr=0.1, low=share - 0.1, high=share + 0.1)
    return {
        name: TaskScores(
            n=n, n_available=n, limit=None, seed=0, data_sha256="d", chance=0.25,
            measures={"acc": measure}, items=items, too_long=(), faults=(),
        )
    }  # fmt: skip


def test_a_task_that_nothing_here_names_has_its_column_its_pair_and_its_sentence():
    half, whole = [True] * 20 + [False] * 20, [True] * 40
    preset, plan = (
        result(name, size, n_chunks=0).model_copy(
            update={"scores": choices("riddles", rights)}
        )
        for name, size, rights in (("Q8_0", 200, half), ("ewq", 300, whole))
    )
    found = comparison(row("preset", preset, "ewq"), row("plan", plan))
    (pair,) = found.pairs

    assert pair.scores["riddles acc"].difference == 0.5
    assert (pair.scores["riddles acc"].difference_low or 0) > 0.3
    text = printed(comparison_view(found), 80)
    assert "riddles acc" in text
    assert "0.500 ±0.100" in text
    assert "ewq has a higher riddles acc than Q8_0" in said(found)
    update = {"model": comparison(model="other").model}
    over = across_models([found, found.model_copy(update=update)])
    assert [each.measure for each in over] == ["riddles acc"]


# Which files


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (50_000, ("Q4",)),
        (100_000, ("Q4",)),  # of the same size
        (99_950, ("Q4",)),
        (100_050, ("Q4",)),
        (100_200, ("Q4", "Q5")),
        (110_000, ("Q4", "Q5")),
        (150_000, ("Q5",)),
        (200_000, ("Q5", "base")),
        (900_000, ("base",)),
    ],
)
def test_the_nearest_below_and_above_bracket_a_file(size, names):
    sizes = {"base": 300_000, "Q5": 150_000, "other Q5": 150_000, "Q4": 100_000}
    assert bracketing(size, sizes) == names


def test_plans_are_spelt_as_policies_are():
    (wanted,) = parse_plans(["ewq:tensor:x0.8"])
    policy = EwqPolicy(granularity="tensor", factor=0.8)
    assert (wanted.source, wanted.budget) == (policy, None)


def test_budgets_follow_an_at_sign():
    share, bits = parse_plans(["ewq@80%,fastewq@4.5bpw", ""])
    assert share.budget is not None
    assert bits.budget is not None
    assert (share.budget.share, bits.budget.bpw) == (0.8, 4.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("best", "--plans: unknown policy 'best'"),
        ("ewq:low2", "'low2' of 'ewq:low2' is no parameter of it"),
        ("probe:layers:Q4_0", "policy probe tells where types came from"),
        ("Q4_K_M", "is a preset; use --presets"),
        ("ewq@big", "--budget: 'big' is no size"),
    ],
)
def test_plans_that_cannot_be_made_are_refused(text, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        parse_plans([text])


# Words


def test_a_smaller_preset_that_is_better_is_said():
    found = comparison(
        row("base", result("base", 320), "ewq"),
        row("plan", result("ewq", 300, 0.5, 2.0)),
        row("preset", result("Q8_0", 150, 0.2, 1.0), "ewq"),
    )
    text = said(found)
    assert (
        "A file that is no larger is better: Q8_0, 150 B, 50 % smaller, has the lower "
        "KLD." in text
    )
    assert "ewq has a higher KLD than Q8_0 (difference +0.02" in text
    assert "Beside it in size: base, 320 B, 6.67 % larger." in text
    assert "better than a larger file" not in text


def test_a_plan_that_is_better_than_a_larger_preset_is_said():
    found = comparison(
        row("preset", result("Q5_K_M", 330, 0.5, 2.0), "ewq"),
        row("plan", result("ewq", 300, 0.1, 1.0)),
    )
    assert (
        "It is better than a larger file: Q5_K_M, 330 B, 10 % larger, has the higher "
        "KLD." in said(found)
    )


def test_equal_files_cannot_be_told_apart():
    mmlu = scores([True, False] * 20, [1.0] * 40)
    found = comparison(
        row("preset", result("Q8_0", 300, 0.2, 1.0, mmlu), "twin"),
        row("plan", result("twin", 300, 0.2, 1.0, mmlu)),
    )
    (pair,) = found.pairs
    for test in (pair.kld_nats, pair.nll_nats, pair.composite_score):
        assert test is not None
        assert test.difference == test.difference_low == test.difference_high == 0.0
    text = said(found)
    for name in ("KLD", "log perplexity", "accuracy", "composite score"):
        assert f"twin and Q8_0 cannot be told apart by {name}" in text
    assert "its perplexity is 1.0000 times" in text
    assert "better" not in text


def test_what_little_data_cannot_say_is_said():
    guesses = scores([i % 4 == 0 for i in range(40)], [1.4] * 40)
    found = comparison(
        row("base", result("base", 320, mmlu=guesses, n_chunks=8), "ewq"),
        row("plan", result("ewq", 300, 0.5, 2.0, guesses, n_chunks=8)),
    )
    text = said(found)
    assert "MMLU is at chance (25 %) for every version" in text
    assert "fewer than 20 are too narrow" in text
    alone = comparison(row("base", result("base", 320)), row("preset", result("Q", 1)))
    assert "nothing is said of mixed precision" in said(alone)
    assert alone.pairs == ()
    timed = comparison(
        row("base", result("base", 320, n_chunks=0), "ewq"),
        row("plan", result("ewq", 300, n_chunks=0)),
        n_turns=3,
    )
    assert "of 3 turns, in each of which every file was timed once" in said(timed)
    assert "stands alone" not in said(timed)


def test_the_tables_fit_a_narrow_terminal_and_leave_out_what_was_not_measured():
    found = comparison(
        row("base", result("base", 320), "ewq-tensor-histogram-x0.8"),
        row("plan", result("ewq-tensor-histogram-x0.8", 300, 0.5, 2.0)),
    )
    for width in (60, 80, 100):
        lines = printed(comparison_view(found), width).splitlines()
        assert max(len(line.rstrip()) for line in lines) <= width
        text = "\n".join(lines)
        assert "KLD" in text
        assert "MMLU" not in text
        assert "tokens/s" not in text
        assert "±" in text


# Across models


def paper_comparisons() -> list[Comparison]:
    """Table 7 as comparisons: one per model, its versions as rows."""
    by_model: dict[str, list[ComparedFile]] = {}
    for printed in data.table("paper_table7"):
        ppl, accuracy = (
            float(printed["mmlu_perplexity"]),
            float(printed["mmlu_accuracy"]),
        )
        numbers = {
            "composite_score": log(ppl) - accuracy,
            "accuracy": accuracy,
        }
        made = row("plan", result(printed["variant"], 300, n_chunks=0)).model_copy(
            update={
                name: Estimate(value=value, low=None, high=None)
                for name, value in numbers.items()
            }
        )
        by_model.setdefault(printed["model"], []).append(made)
    return [
        comparison(model=model).model_copy(update={"rows": tuple(rows)})
        for model, rows in by_model.items()
    ]


def test_the_papers_comparison_of_classifiers_comes_out_of_its_table():
    found = {
        (pair.first, pair.second): pair
        for pair in across_models(paper_comparisons())
        if pair.measure == "composite score"
    }
    n_checked = 0
    for printed in data.table("paper_table13"):
        pair = found.get((printed["fast"], printed["fast_train"]))
        if pair is None:  # two variants together are no pair of versions
            continue
        n_checked += 1
        assert pair.test is not None
        assert pair.test.n == len(pair.models) == 4
        for computed, key in (
            (pair.test.t, "t"), (pair.test.p, "p"), (pair.test.cohens_d, "d"),
        ):  # fmt: skip
            digits = len(printed[key].partition(".")[2])
            assert round(computed, digits) == float(printed[key])
    assert n_checked == 2


def test_a_version_that_one_model_lacks_is_compared_over_the_others():
    first, second = (
        comparison(
            row("plan", result("ewq", 300, extra, 2.0)),
            row("preset", result("Q8_0", 200, 0.1, 1.0)),
            model=f"model {extra}",
        )
        for extra in (0.5, 0.7)
    )
    lacking = comparison(row("preset", result("Q8_0", 200, 0.1, 1.0)), model="third")

    pairs = {pair.measure: pair for pair in across_models([first, second, lacking])}

    assert set(pairs) == {"ln perplexity", "KLD"}
    assert pairs["ln perplexity"].models == ("model 0.5", "model 0.7")
    assert pairs["ln perplexity"].test is not None
    assert pairs["KLD"].test is None  # both differ by as much
    assert "paired t-test" in printed(across_view(list(pairs.values())), 80)


def test_one_model_twice_is_refused():
    one = comparison(row("plan", result("ewq", 300)))
    with pytest.raises(UsageError, match="two comparisons are of one model"):
        across_models([one, one])

"""The bench's arithmetic, with a model that is a table."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from io import StringIO
from math import exp, log, sqrt
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ewq_gguf import data
from ewq_gguf.bench.files import identify
from ewq_gguf.bench.job import (
    Failure,
    MemoryUse,
    progress_line,
    read_progress,
)
from ewq_gguf.bench.questions.datafile import read_text
from ewq_gguf.bench.runner import Request
from ewq_gguf.bench.tasks import generation, mmlu
from ewq_gguf.bench.tasks.speed import measure
from ewq_gguf.bench.texts.quality import Named, check_comparable, score_text
from ewq_gguf.bench.texts.scoring import divergence, token_nll
from ewq_gguf.bench.texts.summary import Tokens, kld, perplexity, text_result
from ewq_gguf.bench.texts.windows import Window, Windows, chunks_of, lines_of
from ewq_gguf.checkpoint.hub_data import wikitext
from ewq_gguf.errors import ChildError, InputError, UsageError, VerificationError
from ewq_gguf.process import python_argv, run
from ewq_gguf.records import BenchedFile, ChunkPart, Result
from ewq_gguf.report.bench_view import bench_view
from tests.bench_models import BOS, N_VOCAB, Table
from tests.gguf_files import write_gguf

TEXT = "The quick brown fox jumps over the lazy dog. " * 8
FILE = Path("text.txt")


def nothing_done(_index: int) -> bool:
    return False


def parts_of(model, windows, n_ctx, base=None):
    named = Named(Path("model.gguf"), model)
    other = None if base is None else Named(Path("base.gguf"), base)
    return [part for _, part in score_text(named, other, windows, n_ctx, nothing_done)]


def expected_nll(table, window):
    """Straight from the table, token by token."""
    rows = table.logits.astype(np.float64)
    logp = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    tokens = window.tokens
    return [-logp[tokens[i - 1], tokens[i]] for i in range(window.first, len(tokens))]


# Rows of logits


def test_two_logits_by_hand():
    logits = np.log(np.array([[0.25, 0.75]], np.float32))
    base = np.log(np.array([[0.5, 0.5]], np.float32))
    target = np.array([1], np.int32)

    assert token_nll(logits, target) == pytest.approx([-log(0.75)])
    found = divergence(logits, base, target)
    assert found.nll_nats == pytest.approx([-log(0.75)])
    assert found.base_nll_nats == pytest.approx([log(2)])
    assert found.kld_nats == pytest.approx([0.5 * log(2) + 0.5 * log(2 / 3)])
    assert found.is_same_top.tolist() == [False]


def test_equal_logits_diverge_by_exactly_nothing():
    rows = np.random.default_rng(1).normal(0, 9, (40, 50_000)).astype(np.float32)

    found = divergence(rows, rows.copy(), np.zeros(40, np.int32))

    assert found.kld_nats.tolist() == [0.0] * 40
    assert found.is_same_top.all()


def test_a_large_offset_of_all_logits_changes_nothing():
    rows = np.random.default_rng(2).normal(size=(3, 10)).astype(np.float32)
    targets = np.array([1, 2, 3], np.int32)

    shifted = token_nll(rows + np.float32(1024), targets)
    assert shifted == pytest.approx(token_nll(rows, targets), abs=1e-3)


# Windows


def test_chunks_begin_with_bos_in_place_of_their_first_token():
    windows = chunks_of(Table(), "abcdefghijkl", 4, FILE)

    first, second, third = (w.tokens.tolist() for w in windows.windows)
    assert first == [BOS, ord("a"), ord("b"), ord("c")]
    assert second == [BOS, ord("e"), ord("f"), ord("g")]
    assert third[0] == BOS
    # llama-perplexity scores n_ctx - 1 - n_ctx / 2 tokens of each.
    assert [w.n_scored for w in windows.windows] == [1, 1, 1]


def test_a_model_without_bos_keeps_every_token_and_one_newline_is_dropped():
    windows = chunks_of(Table(add_bos=False), "abcd\n", 4, FILE)
    assert [w.tokens.tolist() for w in windows.windows] == [[97, 98, 99, 100]]


@pytest.mark.fault(67)
def test_a_text_shorter_than_one_context_is_refused():
    with pytest.raises(InputError, match=r"has 4 tokens, one context needs 512"):
        chunks_of(Table(), "abc", 512, FILE)


@pytest.mark.fault(68)
def test_every_token_of_a_line_is_scored_and_long_lines_are_counted():
    found = lines_of(Table(), "ab\n\n" + "x" * 9 + "\ncd\r\n", 8, FILE)

    assert [w.tokens.tolist() for w in found.windows] == [[0, 97, 98], [0, 99, 100]]
    assert [w.n_scored for w in found.windows] == [2, 2]
    assert found.n_skipped == 1


def test_without_bos_a_lines_first_token_cannot_be_scored():
    found = lines_of(Table(add_bos=False), "abc\nd", 8, FILE)
    assert [w.n_scored for w in found.windows] == [2]


def test_lines_share_batches_up_to_the_room_and_the_documents_allowed():
    long = Windows(tuple(Window(np.zeros(5, np.int32), 1) for _ in range(5)))
    short = Windows(tuple(Window(np.zeros(2, np.int32), 1) for _ in range(130)))

    assert [len(batch) for batch in long.batches(10)] == [2, 2, 1]
    assert [len(batch) for batch in short.batches(512)] == [64, 64, 2]


@pytest.mark.fault(66)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b" \n", "is empty", id="blank"),
        pytest.param(b"ab\xff", "is not UTF-8 at byte 2", id="encoding"),
        pytest.param(b"\xef\xbb\xbfabc", "begins with a byte order mark", id="bom"),
        pytest.param(b"ab\0c", "has a NUL at byte 2", id="nul"),
    ],
)
def test_texts_that_are_no_texts_are_refused(tmp_path, data, message):
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_text(path)


# Scoring a text


@pytest.mark.parametrize("n_ctx", [8, 600, 1100])
def test_scores_are_the_tables(n_ctx):
    table = Table()
    windows = chunks_of(table, TEXT * 8, n_ctx, FILE)

    parts = parts_of(table, windows, n_ctx)

    found = [x for part in parts for x in part.nll_nats]
    expected = [x for window in windows.windows for x in expected_nll(table, window)]
    assert found == pytest.approx(expected)


def test_lines_in_one_batch_do_not_see_each_other():
    table = Table()
    windows = lines_of(table, "first\nsecond line\nthird", 64, FILE)

    (part,) = parts_of(table, windows, 64)

    assert part.lengths == (5, 11, 5)
    expected = [x for window in windows.windows for x in expected_nll(table, window)]
    assert part.nll_nats == pytest.approx(expected)


def test_a_model_against_itself_is_exactly_zero():
    windows = chunks_of(Table(), TEXT, 64, FILE)

    result = text_result("t", parts_of(Table(), windows, 64, Table()), 0)

    assert result.kld is not None
    assert result.kld.kld_mean_nats == result.kld.kld_max_nats == 0.0
    assert result.kld.top1_agreement == 1.0
    assert result.kld.delta_p_rms == 0.0
    assert set(result.kld.stderr.values()) - {result.kld.stderr["base_ppl"]} == {0.0}
    assert result.kld.base_ppl == pytest.approx(result.ppl)


def test_finished_batches_are_not_evaluated_again():
    table = Table()
    windows = chunks_of(table, TEXT * 8, 512, FILE)
    named = Named(FILE, table)

    found = dict(score_text(named, None, windows, 512, lambda i: i != 2))

    assert [i for i, part in found.items() if part] == [2]
    assert table.evaluated == 512


@pytest.mark.fault(59)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("broken", ["model.gguf", "base.gguf"])
def test_logits_that_are_no_numbers_name_the_file(value, broken):
    models = {"model.gguf": Table(), "base.gguf": Table()}
    models[broken].logits[ord("q")] = value
    windows = chunks_of(Table(), TEXT, 64, FILE)

    with pytest.raises(VerificationError, match=f"{broken}: is numerically broken"):
        parts_of(models["model.gguf"], windows, 64, models["base.gguf"])


@pytest.mark.fault(69)
def test_a_base_with_another_tokenizer_is_refused():
    own, other = Named(FILE, Table()), Named(Path("base.gguf"), Table(shift=1))
    windows = [chunks_of(named.model, TEXT, 64, FILE) for named in (own, other)]

    with pytest.raises(InputError, match=r"base.gguf: has another tokenizer"):
        check_comparable(own, other, *windows)


# Numbers


def test_perplexity_by_hand():
    ppl, stderr = perplexity(np.array([1.0, 3.0]))
    assert ppl == pytest.approx(exp(2))
    assert stderr == pytest.approx(exp(2) * 1.0)  # sqrt(1 / (2 - 1))


def random_part(n_chunks, length, seed=0):
    random = np.random.default_rng(seed)
    count = n_chunks * length
    return ChunkPart(
        name="0/0",
        lengths=(length,) * n_chunks,
        nll_nats=tuple(random.exponential(2, count).tolist()),
        base_nll_nats=tuple(random.exponential(2, count).tolist()),
        kld_nats=tuple(random.exponential(0.1, count).tolist()),
        is_same_top=tuple((random.random(count) < 0.9).tolist()),
    )


def test_divergence_numbers_are_numpys():
    part = random_part(20, 31)
    values = np.array(part.kld_nats)
    delta = np.exp(-np.array(part.nll_nats)) - np.exp(-np.array(part.base_nll_nats))

    found = kld(Tokens.of([part]))

    assert found.kld_mean_nats == pytest.approx(values.mean())
    for name, share in (("median", 50), ("p90", 90), ("p99", 99), ("p999", 99.9)):
        quantile = getattr(found, f"kld_{name}_nats")
        assert quantile == pytest.approx(np.percentile(values, share))
    assert found.kld_max_nats == values.max()
    assert found.top1_agreement == np.mean(part.is_same_top)
    assert found.delta_p_rms == pytest.approx(sqrt(np.mean(delta**2)))


def test_errors_of_independent_tokens_are_the_textbooks():
    part = random_part(200, 25)
    values = np.array(part.kld_nats)

    found = kld(Tokens.of([part])).stderr

    n_tokens = len(values)
    assert found["kld_mean_nats"] == pytest.approx(
        values.std() / sqrt(n_tokens), rel=0.1
    )
    assert found["top1_agreement"] == pytest.approx(
        sqrt(0.9 * 0.1 / n_tokens), rel=0.15
    )


def test_tokens_that_agree_within_a_chunk_widen_the_error():
    levels = np.repeat(np.random.default_rng(3).exponential(0.1, 100), 50)
    part = random_part(100, 50).model_copy(update={"kld_nats": tuple(levels.tolist())})

    found = kld(Tokens.of([part])).stderr["kld_mean_nats"]

    assert found == pytest.approx(levels.std() / sqrt(100), rel=0.15)


def test_one_chunk_has_no_error_to_show():
    assert kld(Tokens.of([random_part(1, 9)])).stderr == {}


# Speed


def test_speed_evaluates_prompt_and_answer_after_a_warm_up():
    table = Table()
    told: list[float] = []

    speed, memory = measure(table, 16, 4, 3, told.append)

    assert table.evaluated == (16 + 4) * (1 + 3)
    assert speed is not None
    assert min(speed.prompt_tps, speed.generation_tps, speed.ttft_seconds) > 0
    assert speed.load_seconds >= 0.5
    assert memory.weights_bytes == 4 * N_VOCAB**2
    assert memory.n_ctx == 20
    assert memory.peak_rss_bytes > 1 << 20
    assert told[-1] == 1.0


def test_memory_alone_needs_no_repeats():
    table = Table()
    speed, _ = measure(table, 16, 4, 0, lambda share: None)
    assert speed is None
    assert table.evaluated == 20


# Requests, messages, files


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(tasks=()), "--tasks: is empty"),
        (Request(tasks=("kld",), texts=(("a", FILE),)), "no base"),
        (Request(tasks=("perplexity",)), "--text: is missing"),
        (Request(tasks=("generation",)), "--prompts: is missing"),
        (
            Request(tasks=("perplexity",), texts=(("a", FILE), ("a", FILE))),
            "two texts have one name",
        ),
    ],
)
def test_tasks_that_lack_something_are_refused(request_, message):
    with pytest.raises(UsageError, match=message):
        request_.parameters()


def test_data_is_read_once_however_many_files_are_measured(tmp_path):
    for split in ("test", "dev"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"maths_{split}.csv").write_text("2 + 2?,3,4,5,6,B\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}')
    request = Request(
        tasks=("mmlu", "generation"),
        settings={
            "mmlu": mmlu.Settings(folder=str(tmp_path), n_shots=1, limit=None),
            "generation": generation.Settings(
                path=str(tmp_path / "prompts.jsonl"), limit=None, max_tokens=9
            ),
        },
    )

    asked = request.parameters()

    for path in ("test/maths_test.csv", "dev/maths_dev.csv", "prompts.jsonl"):
        (tmp_path / path).unlink()
    assert request.parameters() == asked
    assert None not in (asked.mmlu_sha256, asked.prompts_sha256, asked.max_tokens)
    with pytest.raises(InputError, match="cannot be read"):
        replace(request, tasks=("generation",)).parameters()


@pytest.mark.fault(67)
def test_the_packages_own_texts_are_six_domains_of_one_document_per_line():
    table = Table()
    found = dict(data.domains())

    assert list(found) == [
        "code", "conversational", "general", "literary", "nonsense", "scientific",
    ]  # fmt: skip
    for path in found.values():
        windows = lines_of(table, read_text(path), 512, path)
        assert (len(windows.windows), windows.n_skipped) == (20, 0)
        # As one running text they are too short, and the message says by how much.
        with pytest.raises(InputError, match=r"has \d+ tokens, one context needs 8192"):
            chunks_of(table, read_text(path), 8192, path)


def test_an_error_survives_the_way_from_a_child():
    error = VerificationError("bench", "a.gguf", "is broken", "do not use it")
    found = Failure.model_validate_json(Failure.of(error).model_dump_json()).error()
    assert type(found) is VerificationError
    assert str(found) == str(error)


def test_progress_lines_are_told_from_a_log():
    told = read_progress(progress_line(0.25, 123).strip())
    assert told == (0.25, MemoryUse(123))
    assert read_progress("load_tensors: 100 %") is None


@pytest.mark.fault(53, 61)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "ends", id="empty"),
        pytest.param(b"GGUF\x03", "ends", id="truncated"),
        pytest.param(b"PK\x03\x04" + bytes(60), "not GGUF", id="zip"),
        pytest.param(b"GGUF\x00\x00\x00\x03" + bytes(60), "big-endian", id="endian"),
    ],
)
def test_files_that_are_no_gguf_are_refused(tmp_path, data, message):
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(VerificationError, match=message):
        identify(path)


def test_a_table_of_results_fits_80_columns():
    part = random_part(20, 31)
    texts = (text_result("wikitext", [part], 3),)
    asked = Request(tasks=("speed",)).parameters()
    speed, memory = measure(Table(), 16, 4, 2, lambda share: None)
    result = Result(
        file=BenchedFile(
            name="a\x1b-file-of-a-long-name.gguf", size_bytes=1, sha256=""
        ),
        base=None,
        parameters=asked,
        engine=Table().engine,
        size_bytes=10**9,
        texts=texts,
        speed=speed,
        memory=memory,
    )
    console = Console(width=80, record=True, file=StringIO())

    console.print(bench_view([result, result]))

    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert f"{texts[0].ppl:.3f}" in text
    assert "620 tokens scored in 20 windows of 512, 3 longer left out" in text


# The default text


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub whose archive holds what a test says."""
    import huggingface_hub

    monkeypatch.setenv("EWQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EWQ_TEXT_DIR", raising=False)
    archive = tmp_path / "archive.zip"
    asked = []

    def download(*args, **_kwargs):
        asked.append(args)
        return str(archive)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    def put(name: str, data: bytes):
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(name, data)
        return asked

    return put


def test_wikitext_is_fetched_once(hub):
    asked = hub("wikitext-2-raw/wiki.test.raw", b"= Robert Boulter =")

    first, second = wikitext("bench"), wikitext("bench")

    assert first == second
    assert first.read_bytes() == b"= Robert Boulter ="
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("other.txt", b"", "is no archive with wikitext-2-raw/wiki.test.raw"),
        ("wikitext-2-raw/wiki.test.raw", bytes((16 << 20) + 1), "is larger than"),
    ],
)
def test_another_archive_is_refused(hub, name, data, message):
    hub(name, data)
    with pytest.raises(InputError, match=message):
        wikitext("bench")


def test_without_a_network_a_text_must_be_given(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {"token_embd.weight": (8, 256)})
    code = (
        "import sys; from ewq_gguf.cli import main; "
        f"sys.exit(main(['bench', {str(path)!r}, '--tasks', 'perplexity']))"
    )
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "EWQ_TEXT_DIR": ""}
    env["EWQ_CACHE"] = str(tmp_path / "cache")
    argv = [*python_argv("x")[:1], "-c", code]

    with pytest.raises(ChildError) as caught:
        run(argv, stage="test", log_path=tmp_path / "log", env=env)

    assert caught.value.return_code == 7
    assert "ggml-org/ci" in caught.value.log_tail[-1]

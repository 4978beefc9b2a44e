"""Answers as a task of the bench: real files, a base, interruptions, the tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ewq_gguf.api import Run, base_file
from ewq_gguf.bench.job import MemoryUse
from ewq_gguf.bench.runner import CPU_SETUP, Request, bench_file
from ewq_gguf.bench.tasks.generation import Settings
from ewq_gguf.cli import main
from ewq_gguf.errors import InputError
from ewq_gguf.process import run
from ewq_gguf.records import AnswerPart, Result, load_record, read_journal

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [pytest.mark.llamacpp]

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

N_PROMPTS, MAX_TOKENS = 20, 6


@pytest.fixture(autouse=True)
def cache(own_cache, tmp_path, monkeypatch) -> Path:
    """The run's toolchain, and answers of this test's own."""
    folder: Path = tmp_path / "cache"
    folder.mkdir()
    for name in ("toolchain", "demo"):
        (folder / name).symlink_to(own_cache / name)
    monkeypatch.setenv("EWQ_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def files(tiny, toolchain, tmp_path_factory) -> list[Path]:
    """The tiny model in types of 4 and 8 bits."""
    folder = tmp_path_factory.mktemp("answers")
    for ftype in ("Q4_0", "Q8_0"):
        argv = [toolchain.tool("llama-quantize"), tiny.base, folder / f"{ftype}.gguf"]
        run([*argv, ftype], stage="test", log_path=folder / "log")
    return sorted(folder.glob("*.gguf"))


@pytest.fixture
def prompts(tmp_path) -> Path:
    path: Path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"Say {n}.", "reference": f"{n}"} for n in range(N_PROMPTS)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def request_(tiny, prompts) -> Request:
    return Request(
        tasks=("generation",),
        base=tiny.base,
        setup=CPU_SETUP.model_copy(update={"n_threads": 1}),
        settings={
            "generation": Settings(path=str(prompts), limit=None, max_tokens=MAX_TOKENS)
        },
    )


def silent(_share: float, _use: MemoryUse) -> None:
    pass


def kept(cache: Path) -> list[Path]:
    """The journals of base models' answers."""
    return sorted((cache / "bench" / "answers").rglob("*.journal"))


def test_a_file_beside_itself_gives_the_same_answers(request_, tiny):
    found = bench_file(tiny.base, request_, silent)

    assert found.generation is not None
    fidelity = found.generation.fidelity
    assert fidelity is not None
    assert fidelity.n_identical == len(found.generation.answers) == N_PROMPTS
    assert found.common_prefix_share == 1.0
    assert found.fidelity_rouge_l == fidelity.scores.rouge_l
    assert found.generation.references is not None
    assert found.rouge_l == found.generation.references.rouge_l
    assert found.bleu is not None
    assert found.base is not None
    assert found.parameters.max_tokens == MAX_TOKENS


def test_a_bases_answers_are_generated_once_for_all_files(request_, files, cache):
    first = bench_file(files[0], request_, silent)
    (journal,) = kept(cache)
    parts = read_journal(journal, AnswerPart)
    lines = [line for line in journal.read_bytes().splitlines() if line]
    assert len(lines) == len(parts) == N_PROMPTS

    # What the journal says is what the next file is compared with.
    one = parts["line 1"].answer.model_copy(update={"text": "abc", "tokens": (1, 2)})
    changed = parts["line 1"].model_copy(update={"answer": one})
    lines[0] = changed.model_dump_json().encode()
    journal.write_bytes(b"\n".join(lines))
    again = bench_file(files[0], request_, silent)
    second = bench_file(files[1], request_, silent)

    assert kept(cache) == [journal]
    assert journal.read_bytes() == b"\n".join(lines)
    for found in (first, again, second):
        assert found.generation is not None
        assert found.generation.fidelity is not None
    assert first.generation is not None
    assert again.generation is not None
    assert first.generation.answers == again.generation.answers
    assert first.generation.fidelity != again.generation.fidelity
    assert second.generation is not None
    assert first.generation.prompts_sha256 == second.generation.prompts_sha256

    # Other limits are other answers.
    longer = request_.settings["generation"].model_copy(
        update={"max_tokens": MAX_TOKENS + 1}
    )
    bench_file(files[0], replace(request_, settings={"generation": longer}), silent)
    assert len(kept(cache)) == 2


class Stopped(Exception):
    """Raised by a listener."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop_at", "kept_share"), [(0.3, 0.2), (0.8, 0.5)], ids=["file", "base"]
)
def test_answers_that_were_stopped_go_on_where_they_were(
    request_, files, cache, stop_at, kept_share
):
    shares: list[float] = []

    def stop(share, _rss):
        shares.append(share)
        if share > stop_at:
            raise Stopped

    with pytest.raises(Stopped):
        bench_file(files[0], request_, stop)
    assert shares == sorted(shares)
    shares.clear()
    again = bench_file(files[0], request_, lambda share, _rss: shares.append(share))

    # After the model is loaded, what was done is told with the first new token.
    assert min(share for share in shares if share) >= kept_share
    (journal,) = kept(cache)
    assert journal.read_text().count("line") == N_PROMPTS * 2  # name and id, once each
    assert shares[-1] == 1.0
    assert again == bench_file(files[0], request_, silent)


@pytest.mark.fault(68)
def test_a_prompt_longer_than_the_context_is_counted_and_not_cut(
    request_, prompts, files
):
    long = {"prompt": "many words " * 5000, "reference": "x"}
    prompts.write_text(f"{prompts.read_text()}\n{json.dumps(long)}")

    found = bench_file(files[0], request_, silent).generation

    assert found is not None
    (skipped,) = found.too_long
    assert skipped.id == f"line {N_PROMPTS + 1}"
    assert skipped.n_tokens > skipped.n_ctx
    assert (found.n_prompts, len(found.answers)) == (N_PROMPTS + 1, N_PROMPTS)
    prompts.write_text(json.dumps(long))
    with pytest.raises(InputError, match="all 1 are longer than the context of 4096"):
        bench_file(files[0], replace(request_), silent)


@pytest.mark.slow
@pytest.mark.fault(69)
def test_a_base_that_reads_prompts_as_other_tokens_is_refused(request_, files):
    base = base_file(Run("demo"))

    with pytest.raises(InputError, match="has another tokenizer than Q4_0"):
        bench_file(files[0], replace(request_, base=base), silent)


# The command line.


def ewq_bench(file: Path, out: Path, *options: str | Path) -> int:
    argv = ["bench", str(file), "-o", str(out), "-q", "--threads", "1", *options]
    return main([str(one) for one in argv])


def test_the_packages_own_prompts_are_the_default(files, tiny, tmp_path, capsys):
    out = tmp_path / "r.json"
    options = ["--tasks", "generation", "--base", tiny.base, "--max-tokens", "2"]

    assert ewq_bench(files[0], out, *options) == 0

    printed = capsys.readouterr().out
    assert "beside references" in printed
    assert "beside the base model's" in printed
    assert max(map(len, printed.splitlines())) <= 80
    found = load_record(Result, out, "test").generation
    assert found is not None
    assert len(found.answers) + len(found.too_long) == found.n_prompts == 20
    # The same again is the same result; another limit is another one.
    assert ewq_bench(files[0], out, *options) == 0
    assert ewq_bench(files[0], out, *options, "--prompt-limit", "3") == 2


def test_prompts_without_references_need_no_base(files, tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "Why?"}\n{"prompt": "How?"}')
    out = tmp_path / "r.json"

    options = ["--tasks", "generation", "--prompts", path, "--max-tokens", "2"]
    assert ewq_bench(files[0], out, *options) == 0

    found = load_record(Result, out, "test")
    assert found.generation is not None
    assert found.generation.references is None
    assert found.generation.fidelity is None
    assert (found.bleu, found.fidelity_rouge_l, found.base) == (None, None, None)
    printed = capsys.readouterr().out
    assert "2 prompts were answered" in printed
    assert "BLEU" not in printed


def test_domains_are_six_texts_read_by_lines(files, tmp_path, capsys):
    out = tmp_path / "r.json"
    options = ["--tasks", "perplexity", "--text", "domains"]

    assert ewq_bench(files[0], out, *options) == 0

    found = load_record(Result, out, "test")
    assert found.parameters.is_lines
    assert [(text.name, len(text.chunks)) for text in found.texts] == [
        (name, 20)
        for name in (
            "code", "conversational", "general", "literary", "nonsense", "scientific",
        )
    ]  # fmt: skip
    capsys.readouterr()
    mixed = [*options, "--text", f"own={tmp_path / 'r.json'}"]
    assert ewq_bench(files[0], tmp_path / "other.json", *mixed) == 2
    assert "say so with --lines" in capsys.readouterr().err

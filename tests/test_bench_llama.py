"""The bench on real files: llama.cpp's own tools, crashes, and the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from ewq_gguf.api import Run, base_file
from ewq_gguf.bench.job import MemoryUse
from ewq_gguf.bench.runner import Request, bench_file
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.cli import main
from ewq_gguf.errors import (
    ChildError,
    InputError,
    LockedError,
    ResourceError,
    ToolError,
    VerificationError,
)
from ewq_gguf.process import run
from ewq_gguf.records import Result, load_record
from tests.test_rpc import rpc_worker

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [pytest.mark.llamacpp, pytest.mark.usefixtures("own_cache")]

WORDS = "the quick brown fox jumps over a lazy dog while entropy is measured".split()
N_CTX = 64


def silent(_share: float, _use: MemoryUse) -> None:
    pass


def prose(n_words: int) -> str:
    """Words in an order that repeats late."""
    return " ".join(WORDS[(7 * i * i + 3 * i) % len(WORDS)] for i in range(n_words))


@pytest.fixture
def text(tmp_path) -> Path:
    path: Path = tmp_path / "text.txt"
    path.write_text(prose(3000))
    return path


@pytest.fixture
def request_of(text, tiny):
    def make(*tasks, **changes):
        request = Request(
            tasks=tasks,
            base=tiny.base,
            texts=(("prose", text),),
            n_ctx=N_CTX,
            n_prompt=32,
            n_generated=4,
            n_repeats=2,
        )
        return replace(request, **changes)

    return make


@pytest.fixture(scope="session")
def small(tiny, tmp_path_factory, toolchain) -> Path:
    """The tiny model in 4-bit types."""
    folder: Path = tmp_path_factory.mktemp("small")
    return quantised(toolchain, tiny.base, folder, "Q4_0")


def quantised(toolchain, base: Path, folder: Path, ftype: str) -> Path:
    out = folder / f"{ftype}.gguf"
    argv = [toolchain.tool("llama-quantize"), base, out, ftype]
    run(argv, stage="test", log_path=folder / "quantize.log")
    return out


def perplexity_log(toolchain, folder: Path, last: str, *options: str | Path) -> str:
    """What llama-perplexity prints; again where it lost the line it should end with.

    Its log is written by a thread that does not always live to write the last lines.
    """
    for _ in range(10):
        log = run(
            [toolchain.tool("llama-perplexity"), "-t", "2", *options],
            stage="test",
            log_path=folder / "perplexity.log",
            timeout_seconds=600,
        )
        if re.search(last, log):
            break
    return log


def number(pattern: str, log: str) -> float:
    match = re.search(pattern, log)
    assert match is not None, log[-3000:]
    return float(match[1])


def check_parity(toolchain, folder: Path, request: Request, file: Path) -> None:
    """Perplexity within 0.1 % and mean divergence within 1 % of llama-perplexity."""
    assert request.base is not None
    (_, text), n_chunks = request.texts[0], str(request.n_chunks)
    ctx: list[str | Path] = ["-c", str(request.n_ctx)]
    plain: list[str | Path] = ["-f", text, "--chunks", n_chunks, *ctx]
    logits = folder / "logits.bin"

    found = bench_file(file, request, silent)

    final, last = r"Final estimate: PPL = ([\d.]+)", r"Same top p: +([\d.]+)"
    own = perplexity_log(toolchain, folder, final, "-m", file, *plain)
    base = perplexity_log(
        toolchain, folder, final, "-m", request.base, *plain,
        "--kl-divergence-base", logits,
    )  # fmt: skip
    compared = perplexity_log(
        toolchain, folder, last, "-m", file, *ctx, "--kl-divergence-base", logits,
        "--kl-divergence",
    )  # fmt: skip
    logits.unlink()
    assert found.ppl is not None
    divergence = found.texts[0].kld
    assert divergence is not None
    assert found.ppl == pytest.approx(number(final, own), rel=1e-3)
    assert divergence.base_ppl == pytest.approx(number(final, base), rel=1e-3)
    mean = number(r"Mean +KLD: +([\d.]+)", compared)
    assert divergence.kld_mean_nats == pytest.approx(mean, rel=1e-2)
    top = number(last, compared) / 100
    assert divergence.top1_agreement == pytest.approx(top, abs=5e-3)
    rms = number(r"RMS Δp +: +([\d.]+)", compared) / 100
    assert divergence.delta_p_rms == pytest.approx(rms, rel=2e-2, abs=1e-5)
    if len(found.texts[0].chunks) > 1:
        stderr = number(r"PPL = [\d.]+ \+/- ([\d.]+)", own)
        assert found.ppl_stderr == pytest.approx(stderr, rel=1e-2)


def test_the_tiny_model_is_scored_as_llama_perplexity_does(
    request_of, small, toolchain, tmp_path
):
    request = request_of("perplexity", "kld", n_chunks=12)
    check_parity(toolchain, tmp_path, request, small)


@pytest.mark.slow
def test_the_built_in_model_is_scored_as_llama_perplexity_does(
    request_of, toolchain, tmp_path, wikitext
):
    base = base_file(Run("demo"))
    file = quantised(toolchain, base, tmp_path, "Q4_K_M")
    request = request_of("perplexity", "kld", n_chunks=4, n_ctx=512)
    request = replace(request, base=base, texts=(("wikitext", wikitext),))
    check_parity(toolchain, tmp_path, request, file)


@pytest.fixture
def wikitext() -> Path:
    folder = os.environ.get("EWQ_TEXT_DIR")
    path = Path(folder or "", "wikitext-2-raw", "wiki.test.raw")
    if not folder or not path.is_file():
        pytest.skip("EWQ_TEXT_DIR names no folder with wikitext-2-raw/wiki.test.raw")
    return path


def test_a_file_against_itself_diverges_by_exactly_nothing(request_of, tiny):
    found = bench_file(tiny.base, request_of("kld"), silent)

    kld = found.texts[0].kld
    assert kld is not None
    assert kld.kld_mean_nats == kld.kld_max_nats == found.kld_p99_nats == 0.0
    assert found.top1_agreement == 1.0
    assert found.ppl == pytest.approx(kld.base_ppl, rel=1e-12)


def test_two_runs_give_the_same_numbers(request_of, small):
    request = request_of("kld", is_lines=True, n_ctx=128, n_chunks=None)
    (_, text), *_ = request.texts
    text.write_text("\n".join(prose(3 + i % 9)[i % 5 :] for i in range(150)))

    first, second = (bench_file(small, request, silent) for _ in range(2))

    assert first == second
    assert len(first.texts[0].chunks) == 150


def test_speed_and_memory_of_a_file(request_of, small):
    found = bench_file(small, request_of("speed", "memory"), silent)

    assert found.speed is not None
    assert found.memory is not None
    assert min(found.speed.prompt_tps, found.speed.generation_tps) > 0
    tensors = sum(tensor.size_bytes for tensor in read_gguf(small).tensors)
    # A mapped buffer spans the tensors that were repacked into another one.
    assert tensors <= found.memory.weights_bytes <= 2 * tensors
    assert found.memory.kv_bytes > 0
    assert found.memory.peak_rss_bytes > found.memory.weights_bytes
    assert found.memory.device_bytes == 0
    assert found.size_bytes == small.stat().st_size
    assert found.ppl is None


def test_a_smaller_cache_type_takes_less_memory(request_of, small):
    # Rows of 16 of this model fit no block of 32: the usual types and f32.
    setup = request_of("memory").setup
    wide = setup.model_copy(update={"cache_type_k": "f32", "cache_type_v": "f32"})

    narrow_kv, wide_kv = (
        bench_file(small, request_of("memory", setup=s), silent).memory
        for s in (setup, wide)
    )

    assert narrow_kv is not None
    assert wide_kv is not None
    assert wide_kv.kv_bytes == pytest.approx(2 * narrow_kv.kv_bytes, rel=0.05)


# Faults


class Stopped(Exception):
    """Raised by a listener."""


def test_a_run_that_was_stopped_goes_on_where_it_was(request_of, small):
    request = request_of("kld", n_ctx=16)
    (_, text), *_ = request.texts
    text.write_text(prose(12_000))
    shares: list[float] = []

    def stop(share, _rss):
        shares.append(share)
        if share > 0.2:
            raise Stopped

    with pytest.raises(Stopped):
        bench_file(small, request, stop)
    stopped_at = shares.pop()
    again = bench_file(small, request, lambda share, rss: shares.append(share))

    # What was done is told at once, without the work between.
    assert stopped_at < 1
    assert shares[-1] == 1.0
    assert again == bench_file(small, request, silent)


@pytest.mark.fault(80)
def test_a_child_that_was_killed_needs_memory(request_of, small):
    def kill(_share, _rss):
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)

    with pytest.raises(ResourceError, match=r"killed \(137\).*weights alone need"):
        bench_file(small, request_of("perplexity"), kill)


@pytest.mark.fault(77, 95)
def test_an_rpc_worker_that_is_not_there_is_named(request_of, small):
    setup = request_of("speed").setup
    setup = setup.model_copy(update={"device": "auto", "rpc": ("127.0.0.1:1",)})

    with pytest.raises(ChildError, match=r"RPC workers: 127\.0\.0\.1:1") as caught:
        bench_file(small, request_of("speed", setup=setup), silent)

    assert "Failed to connect to 127.0.0.1:1" in caught.value.log_tail[-1]
    assert caught.value.log_path is not None
    assert caught.value.log_path.exists()


def test_an_rpc_worker_holds_the_layers(request_of, small, toolchain):
    with rpc_worker(toolchain) as address:
        setup = request_of("kld").setup
        setup = setup.model_copy(update={"device": "auto", "rpc": (address,)})
        found = bench_file(small, request_of("kld", "memory", setup=setup), silent)

    assert list(found.engine.devices) == ["RPC0"]
    assert found.engine.n_layers_offloaded == 3
    assert found.device_bytes is not None
    assert found.device_bytes > 0
    assert found.kld_mean_nats is not None
    assert found.kld_mean_nats > 0


@pytest.mark.fault(93)
@pytest.mark.parametrize(
    "said",
    [
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 7605.34 MiB on device "
        "0: cudaMalloc failed: out of memory\n"
        "llama_model_load: error loading model: unable to allocate CUDA0 buffer\n",
        "ggml_gallocr_reserve_n: failed to allocate CUDA0 buffer of size 1073741824\n",
        "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer\n",
    ],
)
def test_memory_that_runs_out_is_said_with_what_to_do(small, said):
    llama = pytest.importorskip("ewq_gguf.bench.engines.llama")

    for error in (llama.load_error(small, said), llama.context_error(small, said)):
        assert isinstance(error, ResourceError)
        assert "fewer layers on the devices with -ngl" in str(error)
    assert isinstance(llama.load_error(small, "no such type\n"), ChildError)


@pytest.mark.fault(92)
@pytest.mark.parametrize(
    "changes",
    [{"device": "CUDA0"}, {"device": "auto", "n_gpu_layers": 4}],
    ids=["device", "layers"],
)
def test_a_device_that_is_not_there_is_no_silent_cpu(request_of, small, changes):
    setup = request_of("speed").setup.model_copy(update=changes)
    with pytest.raises(ToolError, match="no device but the CPU"):
        bench_file(small, request_of("speed", setup=setup), silent)


@pytest.mark.fault(59)
def test_a_file_of_nan_is_numerically_broken(request_of, tiny, tmp_path):
    path = tmp_path / "nan.gguf"
    shutil.copy(tiny.base, path)
    norm = next(t for t in read_gguf(path).tensors if t.name == "output_norm.weight")
    with path.open("r+b") as file:
        file.seek(norm.offset)
        file.write(struct.pack("<f", float("nan")) * (norm.size_bytes // 4))

    with pytest.raises(VerificationError, match="numerically broken"):
        bench_file(path, request_of("perplexity"), silent)


@pytest.mark.fault(53)
def test_a_truncated_file_is_refused_before_it_is_loaded(request_of, tiny, tmp_path):
    path = tmp_path / "short.gguf"
    path.write_bytes(tiny.base.read_bytes()[:-1000])
    with pytest.raises(VerificationError, match=r"short\.gguf"):
        bench_file(path, request_of("perplexity"), silent)


@pytest.mark.fault(58)
def test_split_files_are_benched_whole_or_not_at_all(
    request_of, tiny, toolchain, tmp_path
):
    argv = ["--split", "--split-max-tensors", "8", tiny.base, tmp_path / "part"]
    split = toolchain.tool("llama-gguf-split")
    run([split, *argv], stage="test", log_path=tmp_path / "split.log")
    first, *others = sorted(tmp_path.glob("part-*.gguf"))

    whole = bench_file(first, request_of("perplexity"), silent)
    joined = bench_file(tiny.base, request_of("perplexity"), silent)
    assert whole.ppl == joined.ppl
    assert whole.size_bytes == sum(p.stat().st_size for p in (first, *others))
    shutil.copy(first, others[0])
    others[1].unlink()
    second = others[0]
    with pytest.raises(VerificationError, match="1 of its 3 parts are missing, 1 are"):
        bench_file(first, request_of("perplexity"), silent)
    with pytest.raises(VerificationError, match="not called like the first"):
        bench_file(second, request_of("perplexity"), silent)


@pytest.mark.slow
@pytest.mark.fault(69)
def test_a_base_of_another_tokenizer_is_refused(request_of, tiny, toolchain):
    base = base_file(Run("demo"))
    with pytest.raises(InputError, match="another tokenizer"):
        bench_file(tiny.base, request_of("kld", base=base), silent)


def test_one_file_is_measured_by_one_run_at_a_time(request_of, small):
    # A request of its own: of what another test has measured nothing is left to do.
    request = request_of("perplexity", n_chunks=11)
    seen: list[float] = []

    def again(share, _rss):
        if not seen:
            seen.append(share)
            with pytest.raises(LockedError):
                bench_file(small, request, silent)

    bench_file(small, request, again)
    assert seen


# The command line


def test_results_are_written_reused_and_not_lost(small, tiny, text, tmp_path, capsys):
    out = tmp_path / "results"
    argv = ["bench", str(small), str(tiny.base), "--base", str(tiny.base),
            "--text", f"prose={text}", "--ctx", "64", "--tasks", "kld,perplexity",
            "--chunks", "9", "-o", str(out)]  # fmt: skip

    assert main(argv) == 0
    printed = capsys.readouterr()
    assert "Q4_0.gguf" in printed.out
    assert "KLD in nats against" in printed.out
    paths = sorted(out.iterdir())
    first, second = (load_record(Result, path, "test") for path in paths)
    assert [len(r.texts[0].chunks) for r in (first, second)] == [9, 9]

    assert main([*argv, "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("was there already, still valid") == 2
    found = json.loads(printed.out)
    assert {r["ppl"] for r in found} == {first.ppl, second.ppl}

    assert main([*argv, "--chunks", "10"]) == 2
    assert "made from other inputs; use --force" in capsys.readouterr().err
    assert main([*argv, "--chunks", "10", "--force", "-q"]) == 0
    assert capsys.readouterr().err == ""
    assert len(load_record(Result, paths[0], "test").texts[0].chunks) == 10


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--tasks", "mmmlu"], 2, "there is no 'mmmlu'"),
        (["--tasks", "kld"], 2, "no base to compare with"),
        (["--tasks", "perplexity", "--text", "a"], 2, "is not NAME=FILE"),
        (["--tasks", "perplexity", "--text", "a=missing.txt"], 3, "cannot be read"),
        (["--tasks", "speed", "--device", "cpu", "-ngl", "2"], 2, "nothing to do"),
        (["--tasks", "speed", "--rpc", "8.8.8.8"], 2, "is a public"),
        (["--tasks", "speed", "--tensor-split", "3,x"], 2, "is no share"),
        (["--tasks", "speed", "--device", "CUDA0"], 4, "no device but the CPU"),
    ],
)
def test_options_that_make_no_sense(small, tmp_path, capsys, options, code, message):
    argv = ["bench", str(small), "-o", str(tmp_path / "r.json"), "-q", *options]

    assert main(argv) == code

    err = capsys.readouterr().err
    assert err.startswith("ewq: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "r.json").exists()


def test_a_missing_file_is_said_before_anything_runs(small, tmp_path, capsys):
    argv = ["bench", str(small), str(tmp_path / "none.gguf"), "--tasks", "speed"]
    assert main([*argv, "-o", str(tmp_path / "r")]) == 3
    assert "none.gguf: no such file" in capsys.readouterr().err


@pytest.fixture
def mmlu(tmp_path) -> Path:
    """Two subjects of three questions, one example each."""
    folder: Path = tmp_path / "mmlu"
    for part, count in (("test", 3), ("dev", 1)):
        (folder / part).mkdir(parents=True)
        for subject in ("small_sums", "colours"):
            rows = [f"What is {i} + {part == 'dev':d}?,1,2,3,4,B" for i in range(count)]
            path = folder / part / f"{subject}_{part}.csv"
            path.write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.slow
def test_mmlu_is_asked_and_goes_on_where_it_was(mmlu, tmp_path, capsys):
    file = base_file(Run("demo"))
    args = ["bench", str(file), "-q", "--tasks", "mmlu", "--mmlu", str(mmlu)]
    args += ["--shots", "1", "--limit", "2", "--device", "cpu"]

    assert main([*args, "-o", str(tmp_path / "r.json")]) == 0

    found = load_record(Result, tmp_path / "r.json", "test")
    assert found.mmlu is not None
    assert found.accuracy == found.mmlu.n_right / 4
    assert [(s.subject, s.n) for s in found.mmlu.subjects] == [
        ("colours", 2),
        ("small_sums", 2),
    ]
    assert "all questions" in capsys.readouterr().out
    # The same again is the same result; another number of shots is another one.
    assert main([*args, "-o", str(tmp_path / "r.json")]) == 0
    assert main([*args, "--shots", "0", "-o", str(tmp_path / "r.json")]) == 2


def test_mmlu_without_questions_says_what_is_missing(
    small, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("EWQ_MMLU_DIR", raising=False)

    assert main(["bench", str(small), "--tasks", "mmlu"]) == 2
    assert "EWQ_MMLU_DIR" in capsys.readouterr().err

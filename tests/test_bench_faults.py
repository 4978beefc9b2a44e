"""Faults 77, 79, 80, 92, 93 and 95 at the command line: what fails beside us."""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from ewq_gguf import store
from ewq_gguf.bench import children
from ewq_gguf.bench.job import MemoryUse, read_progress
from ewq_gguf.bench.runner import CPU_SETUP, Request, bench_file
from ewq_gguf.cli import main
from ewq_gguf.errors import ChildError, ResourceError
from ewq_gguf.records import ChunkPart, read_journal
from tests.test_rpc import free_port, rpc_worker

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [pytest.mark.llamacpp, pytest.mark.usefixtures("own_cache")]

#: What a worker of another release says to HELLO: version 99.0.0.
_OTHER_VERSION = struct.pack("<Q4B24x", 28, 99, 0, 0, 0)


def silent(_share: float, _use: MemoryUse) -> None:
    pass


@pytest.fixture
def text(tmp_path) -> Path:
    path: Path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over a lazy dog " * 5000)
    return path


@pytest.fixture
def bench(tiny, tmp_path, text, capsys):
    """Exit code and stderr of `ewq bench` on the tiny model."""

    def run_bench(*options: str) -> tuple[int, str]:
        argv = ["bench", str(tiny.base), "-q", "-o", str(tmp_path / "r.json")]
        argv += ["--tasks", "perplexity", "--text", f"prose={text}", "--ctx", "64"]
        code = main([*argv, *options])
        return code, capsys.readouterr().err

    return run_bench


def over(*workers: str):
    """The setup with these RPC workers."""
    return CPU_SETUP.model_copy(update={"device": "auto", "rpc": workers})


@contextmanager
def answering(data: bytes):
    """A server that reads, says this and then nothing; its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        clients = []

        def serve():
            with suppress(OSError):
                while True:
                    client, _ = server.accept()
                    clients.append(client)
                    client.recv(1024)
                    client.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        for client in clients:
            client.close()
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.fault(77, 95)
def test_an_absent_worker_is_named_with_the_log_and_its_last_lines(bench):
    address = f"127.0.0.1:{free_port()}"

    code, err = bench("--rpc", address)

    first, *tail = err.splitlines()
    assert code == 5
    assert f"its RPC workers: {address}" in first
    assert "its log is " in first
    assert Path(first.split("its log is ")[1].split(";")[0]).exists()
    assert 1 <= len(tail) <= 20
    assert f"Failed to connect to {address}" in tail[-1]


@pytest.mark.fault(95)
def test_a_worker_of_another_version_is_named(bench):
    with answering(_OTHER_VERSION) as address:
        code, err = bench("--rpc", address)

    assert code == 5
    assert address in err.splitlines()[0]
    assert "RPC server version mismatch: 99.0.0" in err


@pytest.mark.fault(95)
def test_what_was_finished_before_a_worker_died_is_kept(tiny, text, toolchain):
    port = free_port()
    request = Request(
        tasks=("perplexity",),
        texts=(("prose", text),),
        n_ctx=64,
        setup=over(f"127.0.0.1:{port}"),
    )
    shares: list[float] = []

    with rpc_worker(toolchain, port):

        def kill(share, _rss):
            shares.append(share)
            if share:
                for child in psutil.Process().children():
                    if child.name().startswith("ggml-rpc"):
                        child.kill()

        with pytest.raises(ChildError, match=f"RPC workers: 127.0.0.1:{port}"):
            bench_file(tiny.base, request, kill)
    assert 0 < max(shares) < 1
    journal = max(store.cache_dir("bench").glob("*.journal"), key=os.path.getmtime)
    first = read_journal(journal, ChunkPart)["0/0"]
    with journal.open("a") as file:
        mark = {"nll_nats": (7.0,) * len(first.nll_nats)}
        file.write(f"\n{first.model_copy(update=mark).model_dump_json()}\n")

    with rpc_worker(toolchain, port):
        found = bench_file(tiny.base, request, silent)

    # The first windows were not scored again, the last ones were.
    chunks = found.texts[0].chunks
    assert chunks[0].nll_nats == 7.0 * chunks[0].n_tokens
    assert chunks[-1].nll_nats != 7.0 * chunks[-1].n_tokens


@pytest.mark.fault(79)
def test_a_child_without_progress_is_ended(monkeypatch, bench):
    """It waits for a worker that never answers: a second instead of half an hour."""
    monkeypatch.setenv("EWQ_CHILD_TIMEOUT", "1")
    with answering(b"") as address:
        code, err = bench("--rpc", address)

    assert code == 5
    first, *_ = err.splitlines()
    assert "made no progress for 0:00:01 and was ended" in first
    assert "set EWQ_CHILD_TIMEOUT to more seconds" in first
    assert not psutil.Process().children()


@pytest.mark.parametrize("value", ["soon", "0", "-5", "nan", "inf"])
def test_a_timeout_that_is_no_time_is_refused_at_once(monkeypatch, bench, value):
    monkeypatch.setenv("EWQ_CHILD_TIMEOUT", value)

    code, err = bench()

    assert code == 2
    assert f"EWQ_CHILD_TIMEOUT: {value!r} is no time" in err


@pytest.mark.fault(80)
def test_a_child_that_was_killed_says_what_it_needs(bench, monkeypatch, tiny):
    hear = read_progress

    def kill(line):
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)
        return hear(line)

    monkeypatch.setattr(children, "read_progress", kill)
    code, err = bench()

    assert code == 6
    assert len(err.splitlines()) == 1
    assert "killed (137)" in err
    assert f"its weights alone need {tiny.base.stat().st_size / 1e9:.1f} GB" in err


@pytest.mark.fault(92)
@pytest.mark.parametrize("options", [["--device", "CUDA0"], ["-ngl", "4"]])
def test_a_gpu_that_is_not_there_is_not_replaced_by_the_cpu(bench, options):
    code, err = bench(*options)

    assert code == 4
    assert "this llama.cpp has no device but the CPU" in err
    assert len(err.splitlines()) == 1


@pytest.mark.fault(93)
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_device_without_memory_is_told_with_fewer_layers(tiny, toolchain):
    with rpc_worker(toolchain, most_bytes=1 << 30) as address:
        request = Request(tasks=("speed",), setup=over(address), n_prompt=1 << 24)
        with pytest.raises(ResourceError, match="leaves no memory") as caught:
            bench_file(tiny.base, request, silent)

    assert caught.value.exit_code == 6
    assert "fewer layers on the devices with -ngl" in caught.value.remedy

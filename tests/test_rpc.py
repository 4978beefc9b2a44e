"""A model on real RPC workers, and the memory that llama.cpp really takes."""

from __future__ import annotations

import re
import resource
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ewq_gguf import api
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.ggml_types import tensor_bytes
from ewq_gguf.process import run
from ewq_gguf.records.placement import Machine
from ewq_gguf.records.plan import PlanTensor
from ewq_gguf.rpc.commands import rpc_commands, rpc_flags
from ewq_gguf.rpc.context_memory import compute_bytes, kv_bytes
from ewq_gguf.rpc.placement import place
from ewq_gguf.tensor_names import layer_idx, role
from tests.gguf_files import using_cache

pytestmark = [pytest.mark.llamacpp, pytest.mark.slow]
pytest_plugins = ["tests.toolchain_fixtures"]

N_CTX = 256
TEXT = " ".join(
    f"The {n} machines of the cluster hold {n + 1} layers each, and pass them on."
    for n in range(60)
)
_ASSIGNED = re.compile(r"layer +(\d+) assigned to device (\w+)")
_BUFFER = re.compile(r"(\S+) +(model|KV|compute) buffer size = +([\d.]+) MiB")
_PPL = re.compile(r"Final estimate: PPL = ([\d.]+)")


@pytest.fixture(scope="module")
def base(session_cache, toolchain) -> Path:
    """The built-in model: 30 layers, tied embeddings."""
    with using_cache(session_cache):
        return api.base_file(api.Run("demo"))


@pytest.fixture(scope="module")
def tensors(base) -> tuple[PlanTensor, ...]:
    return tuple(
        PlanTensor(
            name=t.name,
            role=role(t.name),
            layer_idx=layer_idx(t.name),
            shape=t.shape,
            base_type=t.ggml_type,
            is_quantizable=False,
            ggml_type=t.ggml_type,
            written_type=t.ggml_type,
            size_bytes=tensor_bytes(t.ggml_type, t.shape),
        )
        for t in read_gguf(base).tensors
    )


@pytest.fixture
def perplexity(base, toolchain, tmp_path):
    """Runs llama-perplexity on a short text; its log."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def log_of(flags, n_ctx=N_CTX):
        # -b: else it takes several contexts at once; -lv 5: what goes where.
        own = ["-b", str(n_ctx), "--chunks", "2", "-t", "2", "-lv", "5"]
        return run(
            [toolchain.tool("llama-perplexity"), "-m", base, "-f", text, *own, *flags],
            stage="test",
            log_path=tmp_path / "perplexity.log",
            timeout_seconds=120,
        )

    return log_of


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def rpc_worker(toolchain, port=None, *, most_bytes=None):
    """A worker on a port of this machine, with as much memory; its address."""
    port = port or free_port()
    argv = [toolchain.tool("ggml-rpc-server"), "-H", "127.0.0.1", "-p", str(port)]

    def limit():
        if most_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))

    server = subprocess.Popen(
        [*argv, "-t", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=limit,
    )
    try:
        for _ in range(100):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def buffers(log):
    """Bytes of each device's last buffers: {(device, kind): bytes}, to 0.01 MiB."""
    return {
        (device, kind): float(size) * 2**20
        for device, kind, size in _BUFFER.findall(log)
    }


def test_every_layer_lies_where_it_was_planned(tensors, toolchain, perplexity):
    layer = sum(t.size_bytes for t in tensors if t.layer_idx == 0)
    layer += kv_bytes(tensors, N_CTX)[0]
    embedding = next(t.size_bytes for t in tensors if t.role == "token_embd")
    body = compute_bytes(tensors, N_CTX, has_output=False)
    full = compute_bytes(tensors, N_CTX)
    slack = layer // 2
    with ExitStack() as stack:
        first, second = (stack.enter_context(rpc_worker(toolchain)) for _ in range(2))
        found = place(
            tensors,
            [
                Machine(
                    name="main", memory_bytes=embedding + 11 * layer + body + slack
                ),
                Machine(name=first, memory_bytes=12 * layer + body + slack),
                Machine(name=second, memory_bytes=embedding + 7 * layer + full + slack),
            ],
            N_CTX,
        )
        assert found is not None
        planned = [(s.machine, s.first_layer, s.last_layer) for s in found.stages]
        assert planned == [("main", 0, 10), (first, 11, 22), (second, 23, 29)]
        assert f"--rpc {first},{second}" in rpc_commands("m.gguf", found)

        log = perplexity(rpc_flags(found))

    devices = {int(idx): device for idx, device in _ASSIGNED.findall(log)}
    expected = (
        ["CPU"] * 11 + ["RPC0"] * 12 + ["RPC1"] * 8
    )  # the output head is layer 30
    assert [devices[idx] for idx in range(31)] == expected
    check_memory(found, buffers(log))
    alone = perplexity(["-c", str(N_CTX), "-fit", "off", "-ngl", "0"])
    assert ppl(log) == pytest.approx(ppl(alone), abs=1e-4)


def ppl(log):
    match = _PPL.search(log)
    assert match is not None, log[-500:]
    return float(match[1])


def check_memory(found, real):
    """What was planned for each machine against what llama.cpp allocated."""
    rounding = 0.01 * 2**20
    for stage in found.stages:
        name = "CPU" if stage.machine == "main" else f"RPC0[{stage.machine}]"
        assert real[name, "KV"] == pytest.approx(stage.kv_bytes, abs=rounding)
        assert real[name, "compute"] <= stage.compute_bytes + rounding
        if name != "CPU":  # whose buffer is a mapped stretch of the file
            assert real[name, "model"] == pytest.approx(
                stage.weight_bytes, abs=rounding
            )


@pytest.mark.parametrize("n_ctx", [256, 600, 4096])
def test_the_memory_beside_the_weights_is_llama_cpps(tensors, perplexity, n_ctx):
    real = buffers(perplexity(["-c", str(n_ctx), "-fit", "off"], n_ctx))

    cache = sum(kv_bytes(tensors, n_ctx).values())
    compute = compute_bytes(tensors, n_ctx)
    assert real["CPU", "KV"] == pytest.approx(cache, abs=0.01 * 2**20)
    assert real["CPU", "compute"] <= compute <= 2 * real["CPU", "compute"]

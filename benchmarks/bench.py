"""The bench beside llama.cpp's own tools: same build, same text, same run.

    python -m benchmarks.bench [CHUNKS]

The built-in model and its Q4_K_M file. Perplexity and divergence beside
llama-perplexity's, with the time of each; speed beside llama-bench's, in turns, because
other work on a machine slows whatever runs meanwhile; the fastest turns are compared.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ewq_gguf.api import Run, base_file
from ewq_gguf.bench.reference_run import make_reference
from ewq_gguf.bench.runner import Request, bench_file
from ewq_gguf.checkpoint.hub_data import wikitext
from ewq_gguf.llamacpp.toolchain import Toolchain, find_toolchain
from ewq_gguf.process import N_CPUS, run
from ewq_gguf.records import Result

T = TypeVar("T")

_N_TURNS, _N_REPEATS = 7, 2
_FINAL = r"Final estimate: PPL = ([\d.]+)"


def main(n_chunks: int) -> None:
    """Print both, line by line."""
    text = wikitext("benchmark")
    toolchain = find_toolchain()
    base = base_file(Run("demo"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "Q4_K_M.gguf"
        tool(toolchain, folder, "llama-quantize", base, file, "Q4_K_M")
        request = Request(
            tasks=("perplexity",),
            base=base,
            texts=(("wikitext", text),),
            n_chunks=n_chunks,
        )
        quality(toolchain, folder, file, request)
        speed(toolchain, folder, file, request)


def quality(toolchain: Toolchain, folder: Path, file: Path, request: Request) -> None:
    """Perplexity of the file, and its divergence from the base."""
    assert request.base is not None
    chunks: list[str | Path] = [
        "-f",
        request.texts[0][1],
        "--chunks",
        str(request.n_chunks),
    ]
    logits = folder / "logits.bin"
    plain = ["llama-perplexity", "-t", str(N_CPUS)]

    ours, seconds = timed(lambda: bench(file, request))
    log, tool_seconds = timed(
        lambda: tool(toolchain, folder, *plain, "-m", file, *chunks)
    )
    line("perplexity", ours.ppl or 0.0, number(_FINAL, log), seconds, tool_seconds)

    compare = replace(request, tasks=("kld",))
    ours, seconds = timed(lambda: bench(file, compare))

    def both() -> str:
        reference: list[str | Path] = ["--kl-divergence-base", logits]
        tool(toolchain, folder, *plain, "-m", request.base or "", *chunks, *reference)
        return tool(
            toolchain, folder, *plain, "-m", file, *reference, "--kl-divergence"
        )

    log, tool_seconds = timed(both)
    mean = number(r"Mean +KLD: +([\d.]+)", log)
    line("mean KLD, nats", ours.kld_mean_nats or 0.0, mean, seconds, tool_seconds)
    n_tool_bytes = logits.stat().st_size
    print(f"llama-perplexity wrote {n_tool_bytes / 1e6:,.0f} MB for it")
    logits.unlink()
    through_reference(file, compare, folder, ours, n_tool_bytes)
    own = bench(request.base, compare).texts[0].kld
    assert own is not None
    print(f"the base against itself: maximum {own.kld_max_nats} nats")


def through_reference(
    file: Path, request: Request, folder: Path, lockstep: Result, n_tool_bytes: int
) -> None:
    """The divergence through a reference file, beside that in lockstep."""
    assert request.base is not None
    base, out = request.base, folder / "base.ref"
    _, seconds = timed(
        lambda: make_reference(base, out, request, lambda share, rss_bytes: None)
    )
    size = out.stat().st_size
    print(
        f"the reference has {size / 1e6:,.1f} MB, {size / n_tool_bytes:.1%} of these, "
        f"made in {seconds:.1f} s"
    )
    through = replace(request, base=out)
    found, seconds = timed(lambda: bench(file, through))
    mean, direct = found.kld_mean_nats or 0.0, lockstep.kld_mean_nats or 0.0
    print(
        f"mean KLD through it {mean:.8f} nats, {mean - direct:+g} from lockstep, "
        f"in {seconds:.1f} s"
    )
    own = bench(base, through).kld_mean_nats
    print(f"the base through its reference: mean {own} nats")


def speed(toolchain: Toolchain, folder: Path, file: Path, request: Request) -> None:
    """Tokens per second of prompts and answers, in turns."""
    ours, theirs = [], []
    options: list[str | Path] = ["-m", file, "-t", str(N_CPUS), "-o", "json"]
    options += ["-r", str(_N_REPEATS)]
    for _ in range(_N_TURNS):
        result = bench(file, replace(request, tasks=("speed",), n_repeats=_N_REPEATS))
        assert result.speed is not None
        ours.append((result.speed.prompt_tps, result.speed.generation_tps))
        log = tool(toolchain, folder, "llama-bench", *options)
        tests = json.loads(log[log.index("[\n") : log.rindex("]") + 1])
        theirs.append((tests[0]["avg_ts"], tests[1]["avg_ts"]))
    for i, name in enumerate(("pp512, tokens/s", "tg128, tokens/s")):
        line(name, max(turn[i] for turn in ours), max(turn[i] for turn in theirs))


def bench(file: Path, request: Request) -> Result:
    """Ours."""
    return bench_file(file, request, lambda share, rss_bytes: None)


def tool(toolchain: Toolchain, folder: Path, name: str, *options: str | Path) -> str:
    """What one of llama.cpp's tools prints."""
    argv = [toolchain.tool(name), *options]
    return run(argv, stage="benchmark", log_path=folder / f"{name}.log")


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """What a function returns, and its seconds."""
    started = time.perf_counter()
    found = function()
    return found, time.perf_counter() - started


def number(pattern: str, log: str) -> float:
    """The number that a tool printed."""
    match = re.search(pattern, log)
    assert match is not None, log[-1000:]
    return float(match[1])


def line(
    name: str, ours: float, theirs: float, seconds: float = 0, tool_seconds: float = 0
) -> None:
    """Both numbers, how far apart they are, and what they took."""
    took = f"  in {seconds:.1f} s and {tool_seconds:.1f} s" if seconds else ""
    print(
        f"{name:16}  ours {ours:10.5f}  llama.cpp {theirs:10.5f}  "
        f"{ours / theirs - 1:+.3%}{took}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)

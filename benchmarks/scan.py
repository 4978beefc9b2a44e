"""How fast a scan is, what memory it takes, and what a killed one costs.

    python -m benchmarks.scan [MODEL...] [--threads 1,2] [--repeats 7] [--json FILE]

Plain reading is preadv into a reused 8 MiB buffer per thread, over the same files, with
the same number of threads, in the same run; all alternate, so that a slow minute hits
each. The page cache is warm. `limit` reads and counts 16-bit codes and does nothing
else: no scan of 16-bit weights can be faster on this machine.

Without MODEL: the built-in model and two made ones with matrices of a 1B model's size
(2.1 GB of BF16, 1.7 GB of F32); then the proof of concept's way on 4 GB of BF16
(transformers loads it, np.histogram takes every module), the peak memory of a process
that scans a sparse 100 GB checkpoint, and a scan that is killed half way.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from benchmarks.made import SHAPE_1B, SHAPE_100GB, write_checkpoint
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.reader import BUFFER_BYTES
from ewq_gguf.checkpoint.scan import Work, scan_checkpoint
from ewq_gguf.checkpoint.source import open_checkpoint
from ewq_gguf.entropy.codes import N_CODES, count_codes

_PEAK_FLAG = "--peak-of"

#: The public proof of concept measures like this: the whole model in memory as
#: float32, each linear module's weights into 256 bins.
_POC = """
import sys, time, numpy as np, torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # imports, all of them
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear):
        weights = module.weight.detach().numpy().flatten()
        counts, _ = np.histogram(weights, bins=256)
        p = counts[counts > 0] / counts.sum()
        print(name, -(p * np.log2(p)).sum(), file=sys.stderr)
print(time.perf_counter() - start)
"""


def read_plainly(
    checkpoint: Checkpoint,
    n_threads: int,
    *,
    n_bytes: int = 8 << 20,
    count: bool = False,
) -> None:
    """Read every weight byte with preadv, each thread into its own buffer.

    With `count` each buffer's 16-bit codes are counted and nothing more is done: what
    this machine could do at most.
    """
    parts = [
        (shard.path, begin, min(begin + (64 << 20), shard.header.file_bytes))
        for shard in checkpoint.shards
        for begin in range(0, shard.header.file_bytes, 64 << 20)
    ]

    def read(mine: list[tuple[Path, int, int]]) -> None:
        array = np.empty(n_bytes, np.uint8)
        buffer, table = array.data, np.zeros(N_CODES, np.uint32)
        for path, begin, end in mine:
            fd = os.open(path, os.O_RDONLY)
            offset = begin
            while offset < end:
                n_read = os.preadv(fd, [buffer[: end - offset]], offset)
                offset += n_read
                if count:
                    count_codes(array[: n_read // 2 * 2].view(np.uint16), table)
            os.close(fd)

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(read, [parts[i::n_threads] for i in range(n_threads)]))


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_of_scan(model: str) -> tuple[int, float]:
    """Peak resident bytes, and seconds, of a fresh process that scans the model."""
    out = subprocess.run(
        [sys.executable, "-m", "benchmarks.scan", model, _PEAK_FLAG],
        check=True,
        capture_output=True,
        text=True,
    )
    peak, took = out.stdout.split()
    return int(peak), float(took)


def print_peak(model: str) -> None:
    """What `peak_of_scan` runs."""
    importlib.import_module("numba.np.arraymath")  # otherwise at the first call
    took = seconds(lambda: scan_checkpoint(open_checkpoint(model), work=Work(2)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak * (1 if sys.platform == "darwin" else 1024), took)


def measure(model: str, n_threads: int, repeats: int) -> dict[str, float | int | str]:
    """Medians of alternating runs, in seconds and GB/s."""
    checkpoint = open_checkpoint(model)
    n_bytes = sum(tensor.end - tensor.begin for _, tensor in checkpoint.tensors)
    scan_checkpoint(checkpoint)  # compiles, and warms the page cache
    plain, limit, scanned = [], [], []
    for _ in range(repeats):
        plain.append(seconds(lambda: read_plainly(checkpoint, n_threads)))
        limit.append(
            seconds(
                lambda: read_plainly(
                    checkpoint, n_threads, n_bytes=BUFFER_BYTES, count=True
                )
            )
        )
        scanned.append(
            seconds(lambda: scan_checkpoint(checkpoint, work=Work(n_threads)))
        )
    return {
        "model": checkpoint.identity.name,
        "threads": n_threads,
        "bytes": n_bytes,
        "plain_gb_per_s": n_bytes / statistics.median(plain) / 1e9,
        "limit_gb_per_s": n_bytes / statistics.median(limit) / 1e9,
        "scan_gb_per_s": n_bytes / statistics.median(scanned) / 1e9,
        "scan_best_gb_per_s": n_bytes / min(scanned) / 1e9,
        "scan_over_plain": statistics.median(
            a / b for a, b in zip(plain, scanned, strict=True)
        ),
        "scan_seconds": statistics.median(scanned),
    }


def print_speeds(rows: list[dict[str, float | int | str]]) -> None:
    """The table of `measure`."""
    print(
        "GB/s                       GB  threads   plain   limit    scan  plain/scan  "
        "seconds"
    )
    for row in rows:
        print(
            f"{row['model']:23}  {int(row['bytes']) / 1e9:4.2f}  {row['threads']:7}  "
            f"{row['plain_gb_per_s']:6.2f}  {row['limit_gb_per_s']:6.2f}  "
            f"{row['scan_gb_per_s']:6.2f}  {1 / float(row['scan_over_plain']):10.2f}  "
            f"{row['scan_seconds']:7.3f}"
        )


def measure_poc(model: Path) -> dict[str, float]:
    """The proof of concept's way beside a scan, imports left out of both."""
    out = subprocess.run(
        [sys.executable, "-c", _POC, str(model)],
        check=True,
        capture_output=True,
        text=True,
    )
    scanned = min(peak_of_scan(str(model))[1] for _ in range(3))
    poc = float(out.stdout)
    return {"poc_seconds": poc, "scan_seconds": scanned, "ratio": poc / scanned}


def scan_process(model: Path, cache: Path) -> subprocess.Popen[bytes]:
    """`ewq scan` of a model, begun, with a cache of its own: nothing is taken over."""
    cache.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "ewq_gguf", "scan", str(model), "-q", "--force",
         "-o", str(cache / "out.scan.json")],
        env=os.environ | {"EWQ_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def run_scan(model: Path, cache: Path) -> bytes:
    """`ewq scan` of a model, and the record it writes."""
    if scan_process(model, cache).wait() != 0:
        raise SystemExit("ewq scan failed")
    return (cache / "out.scan.json").read_bytes()


def measure_resume(model: Path, n_tensors: int) -> dict[str, float | int | bool]:
    """Kill a scan once half its tensors are known, and let it go on."""
    whole, killed = model.parent / "whole", model.parent / "killed"
    from_nothing = seconds(lambda: run_scan(model, whole))
    process = scan_process(model, killed)
    n_known = 0
    while n_known < n_tensors // 2 and process.poll() is None:
        n_known = sum(
            path.read_bytes().count(b"\n") for path in killed.glob("scans/*.journal")
        )
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    went_on = seconds(lambda: run_scan(model, killed))
    results = [(cache / "out.scan.json").read_bytes() for cache in (whole, killed)]
    return {
        "tensors": n_tensors,
        "known_when_killed": n_known,
        "whole_seconds": from_nothing,
        "rest_seconds": went_on,
        "same_bytes": results[0] == results[1],
    }


def print_more(result: Mapping[str, Mapping[str, float]]) -> None:
    """The lines below the table."""
    poc, memory, resume = result["poc"], result["sparse"], result["resume"]
    print(
        f"\nproof of concept's way {poc['poc_seconds']:.1f} s, a scan "
        f"{poc['scan_seconds']:.2f} s: {poc['ratio']:.0f} times (imports left out)\n"
        f"sparse checkpoint of {memory['bytes'] / 1e9:.1f} GB: peak "
        f"{memory['peak_rss_bytes'] / 1e6:.0f} MB, {memory['seconds']:.0f} s\n"
        f"killed with {resume['known_when_killed']} of {resume['tensors']} tensors "
        f"known: the rest took {resume['rest_seconds']:.2f} s, a whole scan "
        f"{resume['whole_seconds']:.2f} s; same bytes: {resume['same_bytes']}"
    )


def measure_more(folder: Path) -> dict[str, dict[str, float]]:
    """The proof of concept, memory and resume."""
    two_b = folder / "2B-BF16"
    write_checkpoint(two_b, replace(SHAPE_1B, n_layers=32), "BF16")
    sparse = folder / "sparse"
    write_checkpoint(sparse, SHAPE_100GB, "BF16", n_shards=20, sparse=True)
    n_bytes = sum(path.stat().st_size for path in sparse.glob("*.safetensors"))
    peak, took = peak_of_scan(str(sparse))
    return {
        "poc": measure_poc(two_b),
        "sparse": {"bytes": n_bytes, "peak_rss_bytes": peak, "seconds": took},
        "resume": measure_resume(sparse, len(open_checkpoint(str(sparse)).tensors)),
    }


@click.command()
@click.argument("models", nargs=-1)
@click.option("--threads", default="1,2", show_default=True)
@click.option("--repeats", default=7, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
@click.option(_PEAK_FLAG, "only_peak", is_flag=True, hidden=True)
def main(
    models: tuple[str, ...],
    threads: str,
    repeats: int,
    json_path: Path | None,
    only_peak: bool,
) -> None:
    """Print the table."""
    if only_peak:
        print_peak(models[0])
        return
    with tempfile.TemporaryDirectory(prefix="ewq-bench-") as made:
        folder = Path(made)
        chosen = list(models) or ["demo"]
        if not models:
            one_b, f32 = folder / "1B-BF16", folder / "1B-F32"
            write_checkpoint(one_b, SHAPE_1B, "BF16")
            write_checkpoint(f32, replace(SHAPE_1B, n_layers=6), "F32")
            chosen += [str(one_b), str(f32)]
        rows = [
            measure(model, int(n), repeats)
            for model in chosen
            for n in threads.split(",")
        ]
        print(f"{platform.machine()}, numpy {np.__version__}, median of {repeats}\n")
        print_speeds(rows)
        result = {} if models else measure_more(folder)
    if result:
        print_more(result)
    if json_path:
        text = json.dumps({"speeds": rows, **result}, indent=1, sort_keys=True)
        json_path.write_text(text + "\n")


if __name__ == "__main__":
    main()

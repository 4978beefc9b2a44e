"""How fast a scan is, beside plain reading of the same bytes.

    python benchmarks/scan.py [MODEL] [--threads 1,2] [--repeats 7] [--json FILE]

Plain reading is preadv into a reused 8 MiB buffer per thread, over the same files, with
the same number of threads, in the same run; both alternate, so that a slow minute hits
both. The page cache is warm. Peak memory is that of a fresh process that scans once.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.scan import Work, scan_checkpoint
from ewq_gguf.checkpoint.source import open_checkpoint

BUFFER_BYTES = 8 << 20
_PEAK_FLAG = "--peak-of"


def read_plainly(checkpoint: Checkpoint, n_threads: int) -> None:
    """Read every weight byte with preadv, each thread into its own buffer."""
    parts = [
        (shard.path, begin, min(begin + (64 << 20), shard.header.file_bytes))
        for shard in checkpoint.shards
        for begin in range(0, shard.header.file_bytes, 64 << 20)
    ]

    def read(mine: list[tuple[Path, int, int]]) -> None:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        for path, begin, end in mine:
            fd = os.open(path, os.O_RDONLY)
            offset = begin
            while offset < end:
                offset += os.preadv(fd, [buffer[: end - offset]], offset)
            os.close(fd)

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(read, [parts[i::n_threads] for i in range(n_threads)]))


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_rss_bytes(model: str) -> int:
    """Peak resident memory of a process that opens and scans the model."""
    out = subprocess.run(
        [sys.executable, __file__, model, _PEAK_FLAG, "1"],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(out.stdout)


def measure(
    checkpoint: Checkpoint, n_threads: int, repeats: int
) -> dict[str, float | int]:
    """Best and median of alternating runs, in seconds and GB/s."""
    n_bytes = sum(tensor.end - tensor.begin for _, tensor in checkpoint.tensors)
    plain, scanned = [], []
    for _ in range(repeats):
        plain.append(seconds(lambda: read_plainly(checkpoint, n_threads)))
        scanned.append(
            seconds(lambda: scan_checkpoint(checkpoint, work=Work(n_threads)))
        )
    return {
        "threads": n_threads,
        "bytes": n_bytes,
        "plain_gb_per_s": n_bytes / statistics.median(plain) / 1e9,
        "scan_gb_per_s": n_bytes / statistics.median(scanned) / 1e9,
        "scan_best_gb_per_s": n_bytes / min(scanned) / 1e9,
        "scan_over_plain": statistics.median(plain) / statistics.median(scanned),
        "scan_seconds": statistics.median(scanned),
    }


@click.command()
@click.argument("model", default="demo")
@click.option("--threads", default="1,2", show_default=True)
@click.option("--repeats", default=7, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
@click.option(_PEAK_FLAG, "only_peak", type=int, hidden=True)
def main(
    model: str, threads: str, repeats: int, json_path: Path | None, only_peak: int
) -> None:
    """Print the table."""
    checkpoint = open_checkpoint(model)
    if only_peak:
        scan_checkpoint(checkpoint, work=Work(only_peak))
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(peak_kib * (1 if sys.platform == "darwin" else 1024))
        return
    scan_checkpoint(checkpoint)  # compiles, and warms the page cache
    rows = [measure(checkpoint, int(n), repeats) for n in threads.split(",")]
    peak = peak_rss_bytes(model)
    print(f"{checkpoint.identity.name}, {rows[0]['bytes']:,} bytes of weights")
    print(f"{platform.machine()}, numpy {np.__version__}, median of {repeats} runs\n")
    print("threads  plain GB/s  scan GB/s  (best)  scan/plain  seconds")
    for row in rows:
        print(
            f"{row['threads']:7}  {row['plain_gb_per_s']:10.2f}  "
            f"{row['scan_gb_per_s']:9.2f}  {row['scan_best_gb_per_s']:6.2f}  "
            f"{row['scan_over_plain']:10.2f}  {row['scan_seconds']:7.3f}"
        )
    print(f"\npeak memory of a scanning process: {peak / 1e6:.0f} MB")
    if json_path:
        result = {"rows": rows, "peak_rss_bytes": peak}
        json_path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

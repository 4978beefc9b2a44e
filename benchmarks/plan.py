"""How long plans take: with a scan, by classifier, and for 126 layers of 405B.

    python -m benchmarks.plan

The classifier's claim (arXiv:2503.04704: 100 times less time than EWQ) beside the whole
way here: EWQ reads every weight, FastEWQ fits its forest and asks it. Both in one
process with everything imported and compiled, weights in the page cache; the least of
five runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.made import SHAPE_1B, SHAPE_405B, write_checkpoint
from benchmarks.scan import seconds
from ewq_gguf import api
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.mapping import map_tensors
from ewq_gguf.checkpoint.scan import Work, scan_checkpoint
from ewq_gguf.checkpoint.source import open_checkpoint
from ewq_gguf.entropy.layers import layer_scans
from ewq_gguf.fastewq.classifier import select_layers
from ewq_gguf.fastewq.rows import layer_features, shipped_rows
from ewq_gguf.plan.build import make_plan
from ewq_gguf.plan.model_tensors import layout_tensor
from ewq_gguf.plan.size_target import SizeTarget, parse_budget
from ewq_gguf.records import (
    EwqPolicy,
    FastEwqPolicy,
    Machine,
    Measures,
    Scan,
    TensorScan,
)
from ewq_gguf.tensor_names import layer_idx, role

_N_RUNS = 5
_LADDER = ("TQ1_0", "Q2_K", "Q3_K", "Q4_K", "Q8_0", "raw")


def least(function: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls."""
    return min(seconds(function) for _ in range(_N_RUNS))


def compare_ways(folder: Path) -> None:
    """EWQ beside FastEWQ, on a made model."""
    write_checkpoint(folder, SHAPE_1B, "BF16")
    checkpoint = open_checkpoint(str(folder))
    rows = shipped_rows()
    tensors = [
        layout_tensor(t.name, t.shape, t.dtype) for t in map_tensors(checkpoint)[0]
    ]

    def fast() -> None:
        features = layer_features(tensors, checkpoint.identity.n_layers)
        select_layers(rows, list(features.values()))

    ewq = least(lambda: scan_checkpoint(checkpoint, work=Work(2)))
    fitted = least(fast)
    whole = least(lambda: api.plan(api.Run(checkpoint), FastEwqPolicy()))
    print(
        f"{SHAPE_1B.n_layers} layers, 2.08 GB: EWQ reads every weight in {ewq:.3f} s, "
        f"FastEWQ answers in {fitted:.3f} s, {ewq / fitted:.1f} times less; its whole "
        f"plan takes {whole:.3f} s"
    )


def plan_405b(folder: Path) -> None:
    """Plans of a model whose weights do not exist."""
    write_checkpoint(folder, SHAPE_405B, "BF16", n_shards=8, sparse=True)
    checkpoint = open_checkpoint(str(folder))
    scan = scan_of_headers(checkpoint)
    asks = {
        "no budget": None,
        "50%": parse_budget("50%"),
        "8 machines": machines(8, 30 * 10**9),
        "16 machines": machines(16, 17 * 10**9),
    }
    print(f"\n{checkpoint.identity.n_layers} layers, {len(scan.tensors)} tensors")
    by: tuple[Literal["layer", "tensor"], ...] = ("layer", "tensor")
    for granularity in by:
        policy = EwqPolicy(granularity=granularity, ladder=_LADDER)
        for name, ask in asks.items():
            took = least(partial(make_plan, scan, policy, budget=ask))
            print(f"by {granularity:6}  {name:11}  {took:6.3f} s")
    took = least(lambda: api.plan(api.Run(checkpoint), FastEwqPolicy()))
    print(f"fastewq    no budget    {took:6.3f} s")


def machines(n: int, memory_bytes: int) -> SizeTarget:
    """Machines of which no two are alike, each with so much memory or a little more."""
    cluster = tuple(
        Machine(
            name=f"10.0.0.{i + 1}",
            memory_bytes=memory_bytes + i * 30_000_000,
            bytes_per_second=10**10 * (1 + 7 * i % 16),
        )
        for i in range(n)
    )
    return SizeTarget(f"{n} machines", machines=cluster, may_exceed=True)


def scan_of_headers(checkpoint: Checkpoint) -> Scan:
    """A scan with invented entropies: the weights were never written."""
    rng = np.random.default_rng(0)
    tensors = [
        TensorScan(
            name=tensor.name,
            hf_names=tensor.hf_names,
            role=role(tensor.name),
            layer_idx=layer_idx(tensor.name),
            shape=tensor.shape,
            dtype=tensor.dtype,
            n_weights=prod(tensor.shape),
            softmax_entropy_nats=float(rng.normal(4.605, 1e-4)),
            histogram_entropy_bits=float(rng.normal(6, 0.5)),
            min=-1.0,
            max=1.0,
            n_distinct=None,
            code_entropy_bits=None,
            n_nonfinite=0,
            weights_crc32=0,
            mean=0.0,
            std=1.0,
            excess_kurtosis=0.0,
            outlier_share=0.0,
            zero_share=0.0,
            exponent_entropy_bits=0.0,
        )
        for tensor in map_tensors(checkpoint)[0]
    ]
    return Scan(
        model=checkpoint.identity,
        measures=Measures(),
        tensors=tuple(tensors),
        layers=layer_scans(tensors),
        dropped=(),
    )


def main() -> None:
    """Print both."""
    with tempfile.TemporaryDirectory(prefix="ewq-bench-") as made:
        compare_ways(Path(made) / "1B-BF16")
        plan_405b(Path(made) / "405B")


if __name__ == "__main__":
    main()

"""How long policy `optimal` thinks: the solver, and an 8B model's error table.

    python -m benchmarks.optimal

The table is measured on one layer of Llama 3.1 8B's shape with random weights, as many
of its rows as of the whole model's, and multiplied by 32 layers.
"""

from __future__ import annotations

import tempfile
import time
from math import prod
from pathlib import Path

import gguf
import numpy as np

from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.ggml_types import QUANTISED_TYPES, TYPES
from ewq_gguf.llamacpp.ggml import Ggml
from ewq_gguf.llamacpp.quant_error import quant_errors
from ewq_gguf.llamacpp.toolchain import find_toolchain
from ewq_gguf.optimal.knapsack import solve_knapsack
from ewq_gguf.process import N_CPUS

N_LAYERS = 32
SHARE = 0.02
SHAPES = {
    "attn_q": (4096, 4096), "attn_k": (1024, 4096), "attn_v": (1024, 4096),
    "attn_output": (4096, 4096), "ffn_gate": (14336, 4096), "ffn_up": (14336, 4096),
    "ffn_down": (4096, 14336),
}  # fmt: skip


MODELS = {
    "SmolLM2-135M": [49152 * 576, *[576 * 576, 192 * 576, 192 * 576] * 30,
                     *[576 * 576, 1536 * 576, 1536 * 576, 1536 * 576] * 30],
    "Gemma 3 270M": [262144 * 640, *[1024 * 640, 256 * 640, 256 * 640] * 18,
                     *[1024 * 640, 2048 * 640, 2048 * 640, 2048 * 640] * 18],
    "2000 tensors": [1 << 29, 1 << 29, *[1 << 20, 1 << 22, 1 << 24] * 666],
}  # fmt: skip
N_RUNS = 20


def main() -> None:
    """Print both."""
    for model, sizes in MODELS.items():
        for is_timed in (False, True):
            solve(model, np.array(sizes), is_timed)
    table()


def solve(model: str, sizes: np.ndarray, is_timed: bool) -> None:
    """Allocate 20 types by random costs, which fall fourfold per bit, and speeds."""
    seconds_taken, excess = [], []
    for seed in range(N_RUNS):
        random = np.random.default_rng(seed)
        bits = np.append(np.linspace(1.5, 8.5, 19), 16.0)
        n_bytes = (sizes[:, None] * bits / 8).astype(np.int64)
        slopes = sizes * random.lognormal(0, 1, len(sizes))
        costs = slopes[:, None] * 4.0**-bits * random.uniform(0.8, 1.2, n_bytes.shape)
        usages, limits = [n_bytes], [int(sizes.sum() * random.uniform(2.7, 7) / 8)]
        if is_timed:
            usages.append(n_bytes * random.uniform(0.6, 1.6, len(bits)))
            slow = costs[:, bits <= 5].argmin(axis=1)
            limits.append(np.take_along_axis(usages[1], slow[:, None], 1).sum())
        started = time.perf_counter()
        found = solve_knapsack(costs, usages, limits)
        seconds_taken.append(time.perf_counter() - started)
        if found is not None:
            excess.append(found.cost / found.lower_bound - 1)
    print(
        f"{model}, {len(sizes)} x 20, {len(limits)} limits, {N_RUNS} runs: "
        f"{np.median(seconds_taken):.3f} s, at most {max(seconds_taken):.3f} s, "
        f"at most {max(excess):.2%} above the bound"
    )


def table() -> None:
    """All types of the menu, 2 % of the rows, columns weighed."""
    toolchain = find_toolchain()
    assert toolchain.lib_dir is not None
    ggml = Ggml(toolchain.lib_dir)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.gguf"
        write_layer(path)
        tensors = read_gguf(path).tensors
        n_weights = sum(prod(tensor.shape) for tensor in tensors)
        random = np.random.default_rng(1)
        importance = {
            t.name: random.lognormal(0, 1, (1, t.shape[-1])).astype(np.float32)
            for t in tensors
        }
        slow = [name for name in QUANTISED_TYPES if TYPES[name].is_slow]
        total = 0.0
        for name, types in {
            "others": [name for name in QUANTISED_TYPES if name not in slow],
            "IQ1 to IQ3": slow,
        }.items():
            started = time.perf_counter()
            wanted = [(tensor, types) for tensor in tensors]
            for _ in quant_errors(
                path, wanted, ggml, share=SHARE, importance=importance, n_threads=N_CPUS
            ):
                pass
            taken = (time.perf_counter() - started) * N_LAYERS
            total += taken
            print(
                f"{len(types)} types ({name}), {SHARE:.0%} of {N_LAYERS} layers of "
                f"{n_weights / 1e6:.0f}M weights, {N_CPUS} threads: "
                f"{taken / 60:.1f} min"
            )
    print(f"together {total / 60:.1f} min")


def write_layer(path: Path) -> None:
    """A GGUF of one layer, BF16."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for name, shape in SHAPES.items():
        rows = random.standard_normal(shape, np.float32)
        data = (rows.view(np.uint32) >> 16).astype("<u2")
        writer.add_tensor(
            f"blk.0.{name}.weight",
            data,
            raw_shape=shape,
            raw_dtype=gguf.GGMLQuantizationType.BF16,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()

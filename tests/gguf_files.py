"""Small GGUF files, and what llama-quantize would make of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest

from ewq_gguf import api, ggml_types
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.source import open_checkpoint
from ewq_gguf.llamacpp.layout import layout_of
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.plan.assemble import layers_of, provenance
from ewq_gguf.plan.build import make_plan
from ewq_gguf.plan.sizes import header_bytes, padded, string_kv_bytes
from ewq_gguf.process import run
from ewq_gguf.records import Layout, Plan, Scan, UniformPolicy
from tests.checkpoints import write_llama

_DRY_LINE = re.compile(r"\[\s*\d+/\s*\d+\] (.*?) +- \[.*\], type = +(\w+), size = (.*)")


@contextmanager
def using_cache(folder: Path) -> Iterator[None]:
    """A cache in the environment, for fixtures that live longer than a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EWQ_CACHE", str(folder))
        patch.delenv("EWQ_LLAMA_CPP", raising=False)
        yield


def make_cache(folder: Path, toolchain: Toolchain) -> Path:
    """Make a folder a cache with nothing but the real toolchain and built-in model."""
    real = toolchain.bin_dir.parent.parent
    (folder / "toolchain").symlink_to(real)
    (real.parent / "demo").mkdir(exist_ok=True)
    (folder / "demo").symlink_to(real.parent / "demo")
    return folder


@dataclass(frozen=True)
class Tiny:
    """A small checkpoint with everything made of it but a mixed GGUF."""

    folder: Path
    checkpoint: Checkpoint
    scan: Scan
    layout: Layout
    base: Path

    def plan(self, ggml_type: str = "Q8_0", **types: str) -> Plan:
        """A uniform plan, with other types for the roles named."""
        plan = make_plan(self.scan, UniformPolicy(ggml_type=ggml_type), self.layout)
        named = {t.name: types[t.role] for t in plan.tensors if t.role in types}
        return with_types(plan, self.layout, named)


def make_tiny(folder: Path, cache: Path, toolchain: Toolchain, **shape) -> Tiny:
    """Write a checkpoint, scan it, lay it out, convert it: about ten seconds."""
    write_llama(folder, **shape)
    with using_cache(cache):
        checkpoint = open_checkpoint(str(folder))
        return Tiny(
            folder,
            checkpoint,
            api.scan(api.Run(checkpoint)),
            layout_of(checkpoint, toolchain),
            api.base_file(api.Run(checkpoint)),
        )


def with_types(plan: Plan, layout: Layout, types: Mapping[str, str]) -> Plan:
    """The plan with other types for the tensors named; its totals hold again."""
    tensors = []
    for tensor in plan.tensors:
        asked = types.get(tensor.name, tensor.ggml_type)
        written = ggml_types.written_type(asked, tensor.shape[-1])
        size = ggml_types.tensor_bytes(written, tensor.shape)
        update = {"ggml_type": asked, "written_type": written, "size_bytes": size}
        tensors.append(tensor.model_copy(update=update))
    data = sum(padded(tensor.size_bytes) for tensor in tensors)
    pairs = provenance(plan.model, plan.ewq_version)
    kv_bytes = layout.kv_bytes + string_kv_bytes(pairs)
    header = header_bytes(kv_bytes, ((t.name, t.shape) for t in tensors))
    size = header + data
    totals = plan.totals.model_copy(
        update={
            "tensor_bytes": data,
            "header_bytes": header,
            "file_size_bytes": size,
            "bpw": 8 * size / plan.totals.n_weights,
        }
    )
    update = {
        "tensors": tuple(tensors), "layers": layers_of(tensors), "totals": totals,
    }  # fmt: skip
    return plan.model_copy(update=update)


def write_gguf(
    path: Path,
    tensors: Mapping[str, Sequence[int]],
    *,
    dtype: type[np.generic] = np.float32,
    n_layers: int = 1,
) -> Path:
    """A GGUF of tensors of zeros that llama-quantize opens as a Llama."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(256)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dry_run(
    toolchain: Toolchain, base: Path, types: str, ftype: str = "Q8_0"
) -> dict[str, str]:
    """The type llama-quantize gives each tensor, with a --tensor-type-file."""
    file = base.with_name(f"{base.name}.types")
    file.write_text(types)
    overrides: list[str | Path] = ["--tensor-type-file", file] if types else []
    tool = toolchain.tool("llama-quantize")
    return dry_run_argv(
        [tool, "--dry-run", *overrides, base, ftype], file.with_suffix(".log")
    )


def dry_run_argv(argv: Sequence[str | Path], log: Path) -> dict[str, str]:
    """The types a finished command line gives."""
    text = run(argv, stage="test", log_path=log)
    found = {}
    for line in text.splitlines():
        if match := _DRY_LINE.search(line):
            name, source, size = match.groups()
            target = re.search(r"\((\w+)\)$", size.strip())
            found[name] = (target[1] if target else source).upper()
    return found


def leftovers(folder: Path) -> list[str]:
    """What a run left beside its output: work folders and temporary files."""
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".ewq")

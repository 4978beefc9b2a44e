"""The layout of a base GGUF: asked of the real converter once, then cached.

A GGUF source's layout is in its own header. The same header also tells the size of
every standard preset: llama-quantize plans on it without a weight (`--dry-run`), so no
rule of its mixtures is repeated here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ewq_gguf import ggml_types, store
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.gguf_file import GgufFile, read_gguf
from ewq_gguf.errors import ChildError, InputError, ToolError
from ewq_gguf.llamacpp.convert import BaseHeader, base_type, header_of
from ewq_gguf.llamacpp.loading import tensor_refusals
from ewq_gguf.llamacpp.logs import child_log
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.plan.sizes import ALIGNMENT, header_bytes, padded
from ewq_gguf.process import run
from ewq_gguf.records import (
    Layout,
    LayoutTensor,
    PresetTypes,
    Source,
    load_cached,
)

#: Presets a user would otherwise take, large to small; none needs an imatrix.
PRESETS = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL",
    "IQ4_XS", "Q3_K_L", "Q3_K_M", "IQ3_M", "Q3_K_S", "Q2_K",
)  # fmt: skip

#: Others, which few take; ternary ones are for weights that were trained to be so.
MORE_PRESETS = ("Q5_1", "Q4_1", "MXFP4_MOE", "TQ2_0", "TQ1_0")
#: Presets that a matrix with every entry makes possible.
IMATRIX_PRESETS = (
    "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS",
    "IQ1_M", "IQ1_S",
)  # fmt: skip
#: Every preset that can be asked for.
ALL_PRESETS = (*PRESETS, *MORE_PRESETS, *IMATRIX_PRESETS)
#: Presets that llama-quantize makes with a matrix only; the types of IQ3_S need none.
NEED_IMATRIX = frozenset(IMATRIX_PRESETS) - {"IQ3_S"}

#: Keys that llama-quantize sets, to uint32 values.
_QUANTIZER_KEYS = ("general.file_type", "general.quantization_version")
#: Keys of the source that it drops, or that the plan's own replace.
_REPLACED_KEYS = (
    *_QUANTIZER_KEYS, "split.no", "split.count", "split.tensors.count",
    "ewq.version", "ewq.plan.sha256",
)  # fmt: skip

# [   1/ 290]   token_embd.weight - [ 576, 49152, 1, 1], type = bf16, size = ... (q8_0)
_DRY_LINE = re.compile(
    r"\[\s*\d+/\s*\d+\]\s+(\S+)\s+- \[.*?\], type =\s*(\w+), size =\s*(.*)"
)
_DRY_TYPE = re.compile(r"\((\w+)\)\s*$")


def layout_of(checkpoint: Checkpoint, toolchain: Toolchain) -> Layout:
    """The header the converter would write for a checkpoint, or a GGUF's own.

    Cached by everything it depends on: files, headers, name and converter.

    Raises:
        ToolError: the converter's packages or the tools are missing.
        InputError: the checkpoint has no tokenizer, or the GGUF cannot be planned.
        ChildError: the converter refuses the checkpoint, or llama-quantize the GGUF.
    """
    known = cached_layout(checkpoint.identity.fingerprint, toolchain.key)
    if known is not None:
        return known
    with _header(checkpoint, toolchain) as base:
        presets = {
            preset: preset_bytes(base.path, base.gguf, preset, toolchain)
            for preset in PRESETS
        }
        layout = layout_from(
            base,
            presets,
            converter_commit=toolchain.commit,
            model_fingerprint=checkpoint.identity.fingerprint,
            refusal=tensor_refusals([base.path])[0],
        )
    path = layout_path(checkpoint.identity.fingerprint, toolchain.key)
    store.write_text(path, layout.to_json(), stage="plan", force=True)
    return layout


def preset_types(
    checkpoint: Checkpoint,
    toolchain: Toolchain,
    imatrix: Path | None = None,
    presets: Sequence[str] = PRESETS,
    *,
    needed: Collection[str] = PRESETS,
) -> dict[str, dict[str, str]]:
    """Each tensor's type in each preset, by the preset's name.

    Cached like a layout. With an importance matrix some mixtures are others. What
    llama-quantize refuses is left out, unless it is among those that are needed.

    Raises:
        ToolError, InputError, ChildError: as of `layout_of`.
    """
    matrix = store.sha256_file(imatrix) if imatrix else None
    fingerprint = checkpoint.identity.fingerprint
    key = store.cache_key(fingerprint, toolchain.key, matrix, presets)
    path = store.cache_dir("layouts") / f"{key[:32]}.json"
    if (known := load_cached(PresetTypes, path, "plan")) is not None:
        return known.types
    with _header(checkpoint, toolchain) as base:
        types = {}
        for preset in presets:
            try:
                types[preset] = _dry_run(
                    base.path, base.gguf, preset, toolchain, imatrix
                )
            except ChildError:
                if preset in needed:
                    raise
        found = PresetTypes(types=types)
    store.write_text(path, found.to_json(), stage="plan", force=True)
    return found.types


def _header(
    checkpoint: Checkpoint, toolchain: Toolchain
) -> AbstractContextManager[BaseHeader]:
    if checkpoint.identity.is_gguf:
        return own_header(checkpoint)
    return header_of(checkpoint, toolchain, outtype=base_type(checkpoint))


@contextmanager
def own_header(checkpoint: Checkpoint) -> Iterator[BaseHeader]:
    """A GGUF source's own header, with a hole for its data.

    Yields:
        The header; its file is removed afterwards.

    Raises:
        InputError: the file that llama-quantize would write cannot be predicted.
    """
    (shard,) = checkpoint.shards
    out = store.cache_dir("layouts") / f"{checkpoint.identity.fingerprint}.gguf"
    with store.work_dir(out, stage="plan") as folder:
        path = folder / "header.gguf"
        path.write_bytes(shard.header.raw)
        os.truncate(path, shard.header.file_bytes)
        gguf = read_gguf(path)
        _check_plannable(gguf, shard.path)
        sources = {t.name: (Source(hf_name=t.name),) for t in gguf.tensors}
        yield BaseHeader(path, gguf, sources)


def _check_plannable(gguf: GgufFile, path: Path) -> None:
    if gguf.alignment != ALIGNMENT:
        raise InputError(
            "plan",
            path,
            f"is aligned to {gguf.alignment} bytes, llama-quantize writes {ALIGNMENT}",
            "convert the checkpoint again",
        )
    for tensor in gguf.tensors:
        if tensor.ggml_type not in ggml_types.FLOAT_TYPES:
            raise InputError(
                "plan",
                path,
                f"{tensor.name} is {tensor.ggml_type}: llama-quantize cannot read it",
                "convert the checkpoint to F32, F16 or BF16",
            )


def layout_from(
    base: BaseHeader,
    preset_bytes: dict[str, int],
    *,
    converter_commit: str,
    model_fingerprint: str,
    refusal: str = "",
) -> Layout:
    """The record of a header."""
    return Layout(
        converter_commit=converter_commit,
        model_fingerprint=model_fingerprint,
        kv_bytes=base.gguf.kv_bytes,
        added_kv_bytes=added_kv_bytes(base.gguf),
        tensors=tuple(
            LayoutTensor(
                name=tensor.name,
                shape=tensor.shape,
                ggml_type=tensor.ggml_type,
                sources=base.sources[tensor.name],
            )
            for tensor in base.gguf.tensors
        ),
        preset_bytes=preset_bytes,
        refusal=refusal,
        warnings=base.warnings,
    )


def added_kv_bytes(gguf: GgufFile) -> int:
    """How many more bytes of keys llama-quantize writes than it read.

    The plan's own are not among them. Fewer than 0 where it drops more than it adds.
    """
    added = sum(8 + len(key) + 4 + 4 for key in _QUANTIZER_KEYS)
    return added - sum(gguf.kv_sizes.get(key, 0) for key in _REPLACED_KEYS)


def cached_layout(model_fingerprint: str, toolchain_key: str) -> Layout | None:
    """A layout that was made before, for a plan from a SCAN file alone."""
    return load_cached(Layout, layout_path(model_fingerprint, toolchain_key), "plan")


def layout_path(model_fingerprint: str, toolchain_key: str) -> Path:
    """Where a layout is cached."""
    name = store.cache_key(model_fingerprint, toolchain_key)[:32]
    return store.cache_dir("layouts") / f"{name}.json"


def preset_bytes(
    header_path: Path, header: GgufFile, preset: str, toolchain: Toolchain
) -> int:
    """File size of a standard preset, from llama-quantize's own dry run.

    Raises:
        ToolError: llama-quantize prints its plan in another form than the pinned one.
    """
    types = _dry_run(header_path, header, preset, toolchain)
    data = sum(
        padded(ggml_types.tensor_bytes(types[tensor.name], tensor.shape))
        for tensor in header.tensors
    )
    infos = ((tensor.name, tensor.shape) for tensor in header.tensors)
    return header_bytes(header.kv_bytes + added_kv_bytes(header), infos) + data


def _dry_run(
    header_path: Path,
    header: GgufFile,
    preset: str,
    toolchain: Toolchain,
    imatrix: Path | None = None,
) -> dict[str, str]:
    """Each tensor's type in a preset.

    Raises:
        ToolError: llama-quantize prints its plan in another form than the pinned one.
    """
    weighed = ("--imatrix", imatrix.absolute()) if imatrix else ()
    with child_log("plan", header_path) as log_path:
        text = run(
            [
                toolchain.tool("llama-quantize"),
                "--dry-run",
                *weighed,
                header_path.name,
                preset,
            ],
            stage="plan",
            log_path=log_path,
            cwd=header_path.parent,
        )
    types = dry_run_types(text)
    if set(types) != {tensor.name for tensor in header.tensors}:
        raise ToolError(
            "plan",
            "llama-quantize",
            f"--dry-run named {len(types)} of {len(header.tensors)} tensors",
            "use the pinned llama.cpp: `ewq toolchain build`",
        )
    return types


def dry_run_types(log: str) -> dict[str, str]:
    """Each tensor's type from llama-quantize's log, by name."""
    types = {}
    for line in log.splitlines():
        if match := _DRY_LINE.search(line):
            name, source, size = match.groups()
            target = _DRY_TYPE.search(size)
            types[name] = (target[1] if target else source).upper()
    return types

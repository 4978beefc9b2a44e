"""Layout: the GGUF that the converter would write for a checkpoint, without weights."""

from __future__ import annotations

from typing import Literal

from ewq_gguf.records.base import Part, Record


class Source(Part):
    """A checkpoint tensor, or a part of one, that feeds a GGUF tensor.

    Attributes:
        hf_name: in the checkpoint.
        box: the part: (start, stop, step) per dimension; None for all of it.
    """

    hf_name: str
    box: tuple[tuple[int, int, int], ...] | None = None


class LayoutTensor(Part):
    """One tensor of the base GGUF.

    Attributes:
        name: in the GGUF.
        shape: slowest dimension first.
        ggml_type: in the base GGUF: the 16- or 32-bit type, F32 for norms.
        sources: the checkpoint's tensors that it is made of; empty where the converter
            computes it.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: str
    sources: tuple[Source, ...] = ()


class Layout(Record):
    """The header of a base GGUF.

    Attributes:
        converter_commit: commit of the llama.cpp whose converter it is.
        model_fingerprint: fingerprint of the checkpoint.
        kv_bytes: bytes of all key-value pairs in the base GGUF.
        added_kv_bytes: how many more bytes of them llama-quantize writes, without the
            plan's own.
        tensors: as the converter orders them.
        preset_bytes: file size of each standard preset, by its name.
        refusal: why llama.cpp would not load such a file: a tensor that it needs is
            missing; empty where it would, or was not asked.
        warnings: the converter's warnings.
    """

    schema_name: Literal["ewq.layout"] = "ewq.layout"
    schema_version: Literal[4] = 4

    converter_commit: str
    model_fingerprint: str
    kv_bytes: int
    added_kv_bytes: int
    tensors: tuple[LayoutTensor, ...]
    preset_bytes: dict[str, int]
    refusal: str = ""
    warnings: tuple[str, ...] = ()


class PresetTypes(Record):
    """The types that llama-quantize would write for each preset of a model.

    Attributes:
        types: type of every tensor after llama-quantize's fallback, by preset and name.
    """

    schema_name: Literal["ewq.preset-types"] = "ewq.preset-types"
    schema_version: Literal[1] = 1

    types: dict[str, dict[str, str]]

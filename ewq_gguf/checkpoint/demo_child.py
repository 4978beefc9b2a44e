"""Rebuild the built-in checkpoint from its Q4_1 GGUF: run as a child process.

    python -m ewq_gguf.checkpoint.demo_child GGUF OUT [--original]

writes model.safetensors, config and tokenizer files into the folder OUT. With
`--original` the weights are the dequantised ones, float32 and not rotated: what the
tests compare with.

Weights are dequantised by gguf-py and written tensor by tensor, so the child stays
small; everything written depends on the GGUF alone, on no installed library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ewq_gguf.checkpoint.demo_gguf import (
    Source,
    config,
    generation_config,
    tokenizer_files,
)
from ewq_gguf.checkpoint.rotation import (
    FloatArray,
    Rotation,
    draw_rotation,
    to_bfloat16,
)

_EMBEDDING = "model.embed_tokens"
_FINAL_NORM = "model.norm"
# Our name of a layer's tensor -> GGUF's, and the norm whose output it reads.
_READERS = {
    "self_attn.q_proj": ("attn_q", "attn_norm"),
    "self_attn.k_proj": ("attn_k", "attn_norm"),
    "self_attn.v_proj": ("attn_v", "attn_norm"),
    "mlp.gate_proj": ("ffn_gate", "ffn_norm"),
    "mlp.up_proj": ("ffn_up", "ffn_norm"),
}
_WRITERS = {"self_attn.o_proj": "attn_output", "mlp.down_proj": "ffn_down"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


class Tensor(NamedTuple):
    """One tensor to write: its parts are arrays of its rows, in order."""

    name: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[FloatArray]]


def original_tensors(source: Source) -> list[Tensor]:
    """The dequantised weights as they are, head tied."""

    def tensor(name: str, gguf_name: str) -> Tensor:
        is_large = gguf_name == "token_embd"
        return Tensor(
            f"{name}.weight",
            source.shape(gguf_name),
            lambda: (
                source.parts(gguf_name) if is_large else iter([source.whole(gguf_name)])
            ),
        )

    tensors = [tensor(_EMBEDDING, "token_embd"), tensor(_FINAL_NORM, "output_norm")]
    layer_names = {name: gguf_name for name, (gguf_name, _) in _READERS.items()}
    layer_names |= _WRITERS | _NORMS
    for layer_idx in range(source.n_layers):
        tensors += [
            tensor(f"model.layers.{layer_idx}.{name}", f"blk.{layer_idx}.{gguf_name}")
            for name, gguf_name in layer_names.items()
        ]
    return tensors


def rotated_tensors(source: Source, rotation: Rotation) -> list[Tensor]:
    """The same model in the rotated basis, head untied (docs/demo-model.md)."""

    def reader(name: str, gguf_name: str, norm: str) -> Tensor:
        # W diag(g) R diag(g')^-1
        def parts() -> Iterator[FloatArray]:
            gain = source.whole(norm)
            paired = rotation.paired_gain(gain)
            is_head = gguf_name == "token_embd"
            whole = source.parts if is_head else lambda name: iter([source.whole(name)])
            for weights in whole(gguf_name):
                yield rotation.columns(weights * gain) / paired

        return Tensor(f"{name}.weight", source.shape(gguf_name), parts)

    def writer(name: str, gguf_name: str) -> Tensor:
        # R^T W
        return Tensor(
            f"{name}.weight",
            source.shape(gguf_name),
            lambda: iter([rotation.rows(source.whole(gguf_name))]),
        )

    def norm(name: str, gguf_name: str) -> Tensor:
        return Tensor(
            f"{name}.weight",
            source.shape(gguf_name),
            lambda: iter([rotation.paired_gain(source.whole(gguf_name))]),
        )

    embedding = Tensor(
        f"{_EMBEDDING}.weight",
        source.shape("token_embd"),
        lambda: map(rotation.columns, source.parts("token_embd")),
    )
    head = reader("lm_head", "token_embd", "output_norm")
    tensors = [embedding, norm(_FINAL_NORM, "output_norm"), head]
    for layer_idx in range(source.n_layers):
        ours, theirs = f"model.layers.{layer_idx}", f"blk.{layer_idx}"
        tensors += [
            reader(f"{ours}.{name}", f"{theirs}.{matrix}", f"{theirs}.{gain}")
            for name, (matrix, gain) in _READERS.items()
        ]
        tensors += [
            writer(f"{ours}.{name}", f"{theirs}.{matrix}")
            for name, matrix in _WRITERS.items()
        ]
        tensors += [
            norm(f"{ours}.{name}", f"{theirs}.{gain}") for name, gain in _NORMS.items()
        ]
    return tensors


def write_safetensors(path: Path, tensors: list[Tensor], *, bfloat16: bool) -> None:
    """Write BF16 or F32 tensors, sorted by name, one part at a time.

    Ours instead of the library's so that the bytes cannot change with its version
    and no more than one part is held.
    """
    tensors = sorted(tensors)
    item_bytes = 2 if bfloat16 else 4
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + item_bytes * int(np.prod(tensor.shape))
        header[tensor.name] = {
            "dtype": "BF16" if bfloat16 else "F32",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        shown = 0
        for tensor in tensors:
            for part in tensor.parts():
                file.write(_encoded(part, bfloat16=bfloat16))
            percent = 100 * header[tensor.name]["data_offsets"][1] // end
            if percent >= shown + 10:
                shown = percent
                _say(f"{percent} % of the built-in model's weights written")


def write_checkpoint(gguf_path: Path, out: Path, *, original: bool) -> None:
    """Write the checkpoint's generated files into the folder `out`."""
    source = Source(gguf_path)
    rotation = draw_rotation(source.width)
    files = tokenizer_files(source)
    files["config.json"] = config(source, bfloat16=not original)
    files["generation_config.json"] = generation_config(source)
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (out / name).write_bytes(text.encode())
    tensors = (
        original_tensors(source) if original else rotated_tensors(source, rotation)
    )
    write_safetensors(out / "model.safetensors", tensors, bfloat16=not original)


def _encoded(part: FloatArray, *, bfloat16: bool) -> bytes:
    if bfloat16:
        return to_bfloat16(part).astype("<u2").tobytes()
    return part.astype("<f4").tobytes()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    write_checkpoint(
        Path(sys.argv[1]), Path(sys.argv[2]), original="--original" in sys.argv[3:]
    )

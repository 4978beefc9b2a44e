"""Scans and layouts made by hand, for plans that need no weights."""

from __future__ import annotations

from math import prod

from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.records import (
    LayerScan,
    Layout,
    LayoutTensor,
    Measures,
    ModelIdentity,
    Scan,
    Shard,
    TensorScan,
)

MODEL = ModelIdentity(
    name="hand-made",
    hub_id=None,
    revision=None,
    hf_architecture="LlamaForCausalLM",
    n_layers=5,
    files_sha256={"config.json": "0" * 64},
    shards=(Shard(name="model.safetensors", size_bytes=1, header_sha256="1" * 64),),
)
#: Shapes of one layer; rows of 576 are no multiple of 256.
LAYER: dict[str, tuple[int, ...]] = {
    "attn_norm": (576,),
    "attn_q": (576, 576),
    "ffn_down": (576, 1536),
    "ffn_up": (1536, 576),
}


def make_scan(
    entropies,
    *,
    bits=None,
    dtype="BF16",
    epsilon=0.01,
    largest=1.0,
    model=MODEL,
    layer=None,
):
    """A scan of a model with these layer entropies, embedding and head of 64 rows."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (64, 576)}
    for idx in range(len(entropies)):
        shapes |= {f"blk.{idx}.{r}.weight": s for r, s in (layer or LAYER).items()}
    shapes |= {"output_norm.weight": (576,), "output.weight": (64, 576)}
    tensors = tuple(
        TensorScan(
            name=name,
            hf_names=(name,),
            role=name.split(".")[-2],
            layer_idx=int(name.split(".")[1]) if name.startswith("blk.") else None,
            shape=shape,
            dtype=dtype,
            n_weights=prod(shape),
            n_nonfinite=0,
            softmax_entropy_nats=4.6,
            histogram_entropy_bits=5.0,
            mean=0.0,
            std=1.0,
            min=-largest,
            max=0.5,
            excess_kurtosis=0.0,
            outlier_share=0.0,
            zero_share=0.0,
            exponent_entropy_bits=3.0,
            code_entropy_bits=None,
            n_distinct=None,
            weights_crc32=0,
        )
        for name, shape in shapes.items()
    )
    layers = tuple(
        LayerScan(
            layer_idx=idx,
            n_weights=1000,
            softmax_entropy_nats=entropy,
            histogram_entropy_bits=(bits or entropies)[idx],
        )
        for idx, entropy in enumerate(entropies)
    )
    return Scan(
        model=model,
        measures=Measures(epsilon=epsilon),
        tensors=tensors,
        layers=layers,
        dropped=(),
    )


def make_layout(scan, kv_bytes=1000):
    """The layout the converter would give: norms in F32."""
    return Layout(
        converter_commit="c" * 40,
        model_fingerprint=scan.model.fingerprint,
        kv_bytes=kv_bytes,
        added_kv_bytes=0,
        tensors=tuple(
            LayoutTensor(
                name=tensor.name,
                shape=tensor.shape,
                ggml_type=tensor.dtype if len(tensor.shape) > 1 else "F32",
            )
            for tensor in scan.tensors
        ),
        preset_bytes={"Q8_0": 1},
    )


def subject_of(scan, raw_type="auto"):
    """The same model with its layout, of which no weight was read."""
    layout = make_layout(scan)
    return ModelTensors.of_tensors(scan.model, layout.tensors, layout, raw_type)


def decisions(plan):
    return [layer.ggml_type for layer in plan.layers]


def types(plan, what="ggml_type"):
    return {tensor.name: getattr(tensor, what) for tensor in plan.tensors}

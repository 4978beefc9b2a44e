"""From tensors to layers: H_layer = sum |W| H(W) / sum |W| over the linear matrices.

Source: arXiv:2503.04704 section 3.2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import fsum

from ewq_gguf.ggml_types import n_dims
from ewq_gguf.records import LayerScan, TensorScan
from ewq_gguf.tensor_names import is_quantizable


def layer_scans(tensors: Iterable[TensorScan]) -> tuple[LayerScan, ...]:
    """Each layer's size-weighted mean entropies, in layer order.

    Norms, biases and router weights do not count: they are not linear matrices that
    a plan could quantise. A layer without one is left out.
    """
    members: dict[int, list[TensorScan]] = defaultdict(list)
    for tensor in tensors:
        if tensor.layer_idx is not None and is_quantizable(
            tensor.name, n_dims(tensor.shape)
        ):
            members[tensor.layer_idx].append(tensor)
    return tuple(_layer(idx, members[idx]) for idx in sorted(members))


def _layer(layer_idx: int, tensors: list[TensorScan]) -> LayerScan:
    n_weights = sum(tensor.n_weights for tensor in tensors)
    # fsum rounds once, so the order of the tensors cannot be seen in the result.
    return LayerScan(
        layer_idx=layer_idx,
        n_weights=n_weights,
        softmax_entropy_nats=fsum(t.n_weights * t.softmax_entropy_nats for t in tensors)
        / n_weights,
        histogram_entropy_bits=fsum(
            t.n_weights * t.histogram_entropy_bits for t in tensors
        )
        / n_weights,
    )

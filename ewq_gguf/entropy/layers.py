"""From tensors to layers: H_layer = sum |W| H(W) / sum |W| over the linear matrices.

Source: arXiv:2503.04704 section 3.2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import fsum

from ewq_gguf.ggml_types import n_dims
from ewq_gguf.records import LayerScan, Statistics, TensorScan
from ewq_gguf.tensor_names import is_quantizable

#: Statistics that count weights.
_COUNTS = ("n_weights", "n_nonfinite")


def layer_scans(tensors: Iterable[TensorScan]) -> tuple[LayerScan, ...]:
    """Each layer's size-weighted mean entropies, in layer order.

    Norms, biases and router weights do not count: they are not linear matrices that
    a plan could quantise. A layer without one is left out.
    """
    return tuple(
        LayerScan(
            layer_idx=idx,
            n_weights=sum(tensor.n_weights for tensor in members),
            softmax_entropy_nats=_mean(members, "softmax_entropy_nats"),
            histogram_entropy_bits=_mean(members, "histogram_entropy_bits"),
        )
        for idx, members in _members(tensors).items()
    )


def layer_statistics(tensors: Iterable[TensorScan]) -> dict[int, dict[str, float]]:
    """Every statistic of a scan by layer, aggregated as the layers' entropies are.

    Counts of weights are summed; `variance` is the mean of the tensors', and `depth`
    the layer's index. What some tensor lacks is left out.
    """
    features = {}
    for idx, members in _members(tensors).items():
        averages = {"depth": float(idx)}
        for name in Statistics.model_fields:
            values = [getattr(tensor, name) for tensor in members]
            if name in _COUNTS:
                averages[name] = float(sum(values))
            elif None not in values:
                averages[name] = _mean(members, name)
        n_weights = sum(tensor.n_weights for tensor in members)
        squares = fsum(tensor.n_weights * tensor.std**2 for tensor in members)
        features[idx] = averages | {"variance": squares / n_weights}
    return features


def _members(tensors: Iterable[TensorScan]) -> dict[int, list[TensorScan]]:
    """The linear matrices of each layer, in layer order."""
    members: dict[int, list[TensorScan]] = defaultdict(list)
    for tensor in tensors:
        if tensor.layer_idx is not None and is_quantizable(
            tensor.name, n_dims(tensor.shape)
        ):
            members[tensor.layer_idx].append(tensor)
    return dict(sorted(members.items()))


def _mean(tensors: list[TensorScan], name: str) -> float:
    """A statistic's mean, weighted by sizes."""
    # fsum rounds once, so the order of the tensors cannot be seen in the result.
    total = fsum(tensor.n_weights * getattr(tensor, name) for tensor in tensors)
    return total / sum(tensor.n_weights for tensor in tensors)

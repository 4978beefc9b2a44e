"""Plan: which type each tensor gets, why, and how large the file will be."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ewq_gguf.records.base import Part, Record
from ewq_gguf.records.model import ModelIdentity


class EwqPolicy(Part):
    """The paper's rule with every parameter of it (arXiv:2503.04704 section 3.3).

    Attributes:
        measure: which entropy decides.
        epsilon: of the softmax measure.
        n_bins: of the histogram measure.
        factor: X of the threshold mu - X sigma.
        ladder: precisions from low to high; `raw` is the plan's raw type.
        embedding_type: of the token embedding; `raw` or a ggml type.
        output_type: of the output head; `raw` or a ggml type.
    """

    name: Literal["ewq"] = "ewq"
    measure: Literal["softmax", "histogram"] = "softmax"
    epsilon: float = 0.01
    n_bins: int = 256
    factor: float = 1.0
    ladder: tuple[str, ...] = ("Q4_K", "Q8_0", "raw")
    embedding_type: str = "raw"
    output_type: str = "raw"


class UniformPolicy(Part):
    """One type for every tensor that llama-quantize quantises.

    Attributes:
        ggml_type: `raw` or a ggml type.
    """

    name: Literal["uniform"] = "uniform"
    ggml_type: str


Policy = Annotated[EwqPolicy | UniformPolicy, Field(discriminator="name")]


class PlanTensor(Part):
    """One tensor of the file.

    Attributes:
        name: in the GGUF.
        role: such as `attn_q`.
        layer_idx: None outside the layers.
        shape: slowest dimension first.
        base_type: in the base GGUF.
        is_quantizable: whether llama-quantize touches it; if not, base_type stays.
        ggml_type: asked for.
        written_type: what is written, after llama-quantize's fallback.
        size_bytes: of its data, without padding.
    """

    name: str
    role: str
    layer_idx: int | None
    shape: tuple[int, ...]
    base_type: str
    is_quantizable: bool
    ggml_type: str
    written_type: str
    size_bytes: int


class PlanLayer(Part):
    """One layer's decision.

    Attributes:
        layer_idx: from 0.
        entropy: in the unit of the policy's measure; None where none decided.
        ggml_type: the precision decided for its matrices.
    """

    layer_idx: int
    entropy: float | None
    ggml_type: str


class Thresholds(Part):
    """The numbers the rule compared with.

    Attributes:
        mean: mu, of the layer entropies.
        std: sigma, population.
        low: mu - X sigma; below it the lowest precision of the ladder.
    """

    mean: float
    std: float
    low: float


class Totals(Part):
    """The whole file.

    Attributes:
        n_weights: of all tensors.
        tensor_bytes: of their data, padded.
        header_bytes: everything before the data; None where it is not known.
        file_size_bytes: the prediction.
        is_estimate: True where the header is not known and left out.
        bpw: bits per weight of the whole file.
    """

    n_weights: int
    tensor_bytes: int
    header_bytes: int | None
    file_size_bytes: int
    is_estimate: bool
    bpw: float


class Plan(Record):
    """Enough to rebuild the same GGUF, byte for byte, with the same toolchain.

    Attributes:
        ewq_version: of the package that planned it; the file carries it.
        model: of which checkpoint.
        weights_sha256: and which weights; see Scan.weights_sha256.
        policy: with every parameter.
        raw_type: what `raw` means here.
        ftype: llama-quantize's base type, and the file's `general.file_type`.
        thresholds: of the rule; None where the policy has none.
        tensors: every tensor of the file.
        layers: the decisions.
        totals: the prediction.
    """

    schema_name: Literal["ewq.plan"] = "ewq.plan"
    schema_version: Literal[2] = 2

    ewq_version: str
    model: ModelIdentity
    weights_sha256: str
    policy: Policy
    raw_type: str
    ftype: str
    thresholds: Thresholds | None
    tensors: tuple[PlanTensor, ...]
    layers: tuple[PlanLayer, ...]
    totals: Totals

"""Plan: the type of each tensor, the reasons, and the predicted size of the file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import SerializerFunctionWrapHandler, model_serializer

from ewq_gguf.records.base import Part, Record
from ewq_gguf.records.model import ModelIdentity
from ewq_gguf.records.placement import Placement
from ewq_gguf.records.policy import Policy
from ewq_gguf.records.search import Search


class Budget(Part):
    """How large the file may be, and how that was reached (Algorithm 1 of the paper).

    Policy `optimal`, which reaches it otherwise, has only the bytes.

    Attributes:
        asked: Budget as given: `6GiB`, `80%`, `4.5 bpw`, `auto`, or the machines.
        limit_bytes: Largest size of the file; no more than it takes unquantised.
        case: 1 everything fits raw; 2 the decision fits and was promoted; 3 it does
            not: a uniform type was promoted; 4 not even the lowest uniform type fits:
            demoted below the ladder.
        start: Types that promotion or demotion began with: `raw`, `decision` or a type.
        n_steps: Number of steps up or down.
        n_ctx: Tokens of context that memory was left for, where it was.
        context_bytes: Memory of that context: KV cache and compute buffer.
    """

    asked: str
    limit_bytes: int
    case: Literal[1, 2, 3, 4] | None = None
    start: str | None = None
    n_steps: int | None = None
    n_ctx: int | None = None
    context_bytes: int | None = None


class Imatrix(Part):
    """The importance matrix a file is made with.

    The file itself says the same, but for the hash: `quantize.imatrix.*`.

    Attributes:
        file_name: Name without its folder.
        file_sha256: SHA-256 of its bytes.
        n_entries: Number of tensors that it has weights for.
        n_chunks: Chunks of the text it was computed on; 0 where it does not say.
        dataset: the text's name, cut as llama-quantize cuts it; None without one.
    """

    file_name: str
    file_sha256: str
    n_entries: int
    n_chunks: int
    dataset: str | None


class PlanTensor(Part):
    """One tensor of the file.

    Attributes:
        name: Name in the GGUF.
        role: such as `attn_q`.
        layer_idx: None outside the layers.
        shape: slowest dimension first.
        base_type: Type in the base GGUF.
        is_quantizable: whether llama-quantize touches it; if not, base_type stays.
        ggml_type: Type that llama-quantize is asked for.
        written_type: Type that is written, after llama-quantize's fallback.
        size_bytes: Bytes of its data, without padding.
        entropy: Entropy that decided where tensors are decided one by one, else None.
        is_exact: whether the scan found every weight on the type's lattice, so that
            nothing is lost; left out of the JSON where not, as by older versions.
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
    entropy: float | None = None
    is_exact: bool = False

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plans without exact tensors keep the hash that older versions gave them."""
        values: dict[str, Any] = handler(self)
        if not self.is_exact:
            del values["is_exact"]
        return values


class PlanLayer(Part):
    """One layer's decision.

    Attributes:
        layer_idx: from 0.
        entropy: in the unit of the policy's measure; None where none decided.
        decision: the policy's type for its matrices, before a budget moved it; None
            where tensors are decided one by one.
        ggml_type: the type its matrices are asked to have; None where they differ.
    """

    layer_idx: int
    entropy: float | None
    decision: str | None
    ggml_type: str | None


class Thresholds(Part):
    """The numbers the rule compared with.

    Attributes:
        mean: mu, of the entropies; weighted by parameters in rule `q75`.
        std: sigma, population.
        low: mu - X sigma; below it the third precision of the ladder from the top.
        high: from here on the ladder's highest precision: mu, or the 75th percentile.
    """

    mean: float
    std: float
    low: float
    high: float


class Totals(Part):
    """The whole file.

    Attributes:
        n_weights: Weights of all tensors.
        tensor_bytes: Bytes of their data, padded.
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
        ewq_version: Version of the package that planned it; the file carries it.
        model: Identity of the checkpoint.
        weights_sha256: Hash of its weights; see Scan.weights_sha256. None where the
            policy has not read them.
        policy: with every parameter.
        raw_type: Type that `raw` means here.
        ftype: llama-quantize's base type, and the file's `general.file_type`.
        thresholds: Thresholds of `layer`, or of each role where tensors are decided
            one by one; empty where the policy has none.
        budget: the limit and how it was reached; None without one.
        placement: on a cluster's machines; None without one.
        imatrix: Importance matrix that the file is made with; None without one.
        search: Measurements that chose the types; None where a rule did.
        tensors: every tensor of the file.
        layers: the decisions.
        totals: the prediction.
    """

    schema_name: Literal["ewq.plan"] = "ewq.plan"
    schema_version: Literal[3] = 3

    ewq_version: str
    model: ModelIdentity
    weights_sha256: str | None
    policy: Policy
    raw_type: str
    ftype: str
    thresholds: dict[str, Thresholds]
    budget: Budget | None
    placement: Placement | None = None
    imatrix: Imatrix | None = None
    search: Search | None = None
    tensors: tuple[PlanTensor, ...]
    layers: tuple[PlanLayer, ...]
    totals: Totals

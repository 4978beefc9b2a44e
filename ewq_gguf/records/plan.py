"""Plan: which type each tensor gets, why, and how large the file will be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from ewq_gguf.ggml_types import QUANTISED_TYPES
from ewq_gguf.records.base import Part, Record
from ewq_gguf.records.model import ModelIdentity
from ewq_gguf.records.placement import Placement
from ewq_gguf.records.search import Search


class EwqPolicy(Part):
    """The paper's rule with every parameter of it (arXiv:2503.04704 section 3.3).

    Attributes:
        measure: which entropy decides.
        epsilon: of the softmax measure.
        n_bins: of the histogram measure.
        factor: X of the threshold mu - X sigma.
        rule: `mean`, the paper's, or `q75`, the proof of concept's; see plan.ewq.
        granularity: whether whole layers are decided or single tensors within a role.
        ladder: precisions from low to high; `raw` is the plan's raw type.
        embedding_type: of what is outside the layers, the output head left out: `raw`,
            a ggml type, or `auto`: raw, but under a budget the ladder's steps.
        output_type: of the output head, likewise.
    """

    name: Literal["ewq"] = "ewq"
    measure: Literal["softmax", "histogram"] = "softmax"
    epsilon: float = 0.01
    n_bins: int = 256
    factor: float = 1.0
    rule: Literal["mean", "q75"] = "mean"
    granularity: Literal["layer", "tensor"] = "layer"
    ladder: tuple[str, ...] = ("Q4_K", "Q8_0", "raw")
    embedding_type: str = "auto"
    output_type: str = "auto"


class FastEwqPolicy(Part):
    """A classifier of layers that never sees a weight (arXiv:2503.04704 section 4).

    Attributes:
        variant: `full`, fitted on every row, or `train`, on 70 % of them.
        n_low: how many of the layers it selects, from the last one down, get the
            precision two below the ladder's highest; 1 in the paper's "fast 4bit/8bit
            mixed".
        rows_sha256: of the rows it was fitted on.
        library: that fitted it, with its version; another one may decide otherwise.
        ladder: as of EwqPolicy.
        embedding_type: as of EwqPolicy.
        output_type: as of EwqPolicy.
    """

    name: Literal["fastewq"] = "fastewq"
    variant: Literal["full", "train"] = "full"
    n_low: int = 0
    rows_sha256: str = ""
    library: str = ""
    ladder: tuple[str, ...] = ("Q4_K", "Q8_0", "raw")
    embedding_type: str = "auto"
    output_type: str = "auto"


class UniformPolicy(Part):
    """One type for every tensor that llama-quantize quantises.

    Attributes:
        ggml_type: `raw` or a ggml type.
        embedding_type: of what is outside the layers, the output head left out: `raw`,
            a ggml type, or `auto`: the same.
        output_type: of the output head, likewise.
    """

    name: Literal["uniform"] = "uniform"
    ggml_type: str
    embedding_type: str = "auto"
    output_type: str = "auto"


class PresetPolicy(Part):
    """The types of one of llama-quantize's own mixtures, as its dry run tells them.

    Attributes:
        preset: such as `Q4_K_M`.
    """

    name: Literal["preset"] = "preset"
    preset: str


class OptimalPolicy(Part):
    """Whatever was measured to be best: errors and sensitivities propose, files decide.

    Attributes:
        types: that tensors may have, besides raw.
        floors: the type of fewest bits by role, `*` for every role.
        ceilings: of most bits, likewise.
        min_tps: tokens per second that the file has to generate on this machine; None
            for any.
        effort_minutes: that probes and files may be measured for.
        seed: of the text that the model writes to be measured on.
    """

    name: Literal["optimal"] = "optimal"
    types: tuple[str, ...] = QUANTISED_TYPES
    floors: dict[str, str] = {}
    ceilings: dict[str, str] = {}
    min_tps: float | None = None
    effort_minutes: float = 20.0
    seed: int = 1


class ImportedPolicy(Part):
    """Types that somebody else chose.

    Attributes:
        source: `poc`, a plan of the public proof of concept, or `gguf`, a file's types.
        file_name: of what was imported.
        file_sha256: of its bytes; of a GGUF file of all bytes before the data.
    """

    name: Literal["imported"] = "imported"
    source: Literal["poc", "gguf"]
    file_name: str
    file_sha256: str


class ProbePolicy(Part):
    """A part of the model quantised and the rest left as it is, to see what it does.

    Attributes:
        part: `nothing`, `layers` for all of them, `layer 3`, or a role.
        ggml_type: of that part.
    """

    name: Literal["probe"] = "probe"
    part: str
    ggml_type: str


class ControlPolicy(Part):
    """Another plan's layer decisions, dealt to other layers: as many of each type.

    Attributes:
        order: `random`; `inverted`, the highest entropy gets what the lowest had; or
            what the lowest precisions go to first: the largest `variance` of weights,
            the `first` layers or the `last`.
        seed: of the random one.
        plan_sha256: of the plan whose decisions they are.
    """

    name: Literal["control"] = "control"
    order: Literal["random", "inverted", "variance", "first", "last"]
    seed: int | None = None
    plan_sha256: str


#: Policies that decide; the others only tell where types came from.
RulePolicy = EwqPolicy | FastEwqPolicy | UniformPolicy | PresetPolicy | OptimalPolicy
GivenPolicy = ImportedPolicy | ProbePolicy | ControlPolicy

Policy = Annotated[RulePolicy | GivenPolicy, Field(discriminator="name")]


class Budget(Part):
    """How large the file may be, and how that was reached (Algorithm 1 of the paper).

    Of policy `optimal`, which reaches it otherwise, there are only the bytes.

    Attributes:
        asked: as it was given: `6GiB`, `80%`, `4.5 bpw`, `auto`, or the machines.
        limit_bytes: of the file; no more than it takes unquantised.
        case: 1 everything fits raw; 2 the decision fits and was promoted; 3 it does
            not: a uniform type was promoted; 4 not even the lowest uniform type fits:
            demoted below the ladder.
        start: what promotion or demotion began with: `raw`, `decision` or a type.
        n_steps: how many steps up or down were taken.
        n_ctx: tokens of context that room was left for, where it was.
        context_bytes: that room: KV cache and compute buffer.
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
        file_name: without its folder.
        file_sha256: of its bytes.
        n_entries: how many tensors it weighs.
        n_chunks: of the text it was computed on; 0 where it does not say.
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
        name: in the GGUF.
        role: such as `attn_q`.
        layer_idx: None outside the layers.
        shape: slowest dimension first.
        base_type: in the base GGUF.
        is_quantizable: whether llama-quantize touches it; if not, base_type stays.
        ggml_type: asked for.
        written_type: what is written, after llama-quantize's fallback.
        size_bytes: of its data, without padding.
        entropy: that decided, where tensors are decided one by one, else None.
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
        weights_sha256: and which weights; see Scan.weights_sha256. None where the
            policy has not read them.
        policy: with every parameter.
        raw_type: what `raw` means here.
        ftype: llama-quantize's base type, and the file's `general.file_type`.
        thresholds: of the rule: of `layer`, or of each role where tensors are decided
            one by one; empty where the policy has none.
        budget: the limit and how it was reached; None without one.
        placement: on a cluster's machines; None without one.
        imatrix: that the file is made with; None without one.
        search: what was measured to choose the types; None where a rule did.
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

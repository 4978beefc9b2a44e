"""Policies: the rules that give each tensor its type, with every parameter of theirs.

A new parameter is a field here with its `Parameter`, the code that uses it, and its
test: options, the grammar, labels and views are made from the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ewq_gguf.ggml_types import QUANTISED_TYPES
from ewq_gguf.records.base import Part
from ewq_gguf.records.parameter import (
    Parameter,
    PolicyField,
    TypeParameter,
    policy_fields,
)

Ladder = Annotated[
    tuple[str, ...],
    TypeParameter(
        "--ladder",
        help="Types, low to high: the three highest are for layers of low, medium and "
        "high entropy, lower ones serve budgets.",
        metavar="T,T,...",
    ),
]
EmbeddingType = Annotated[
    str,
    TypeParameter(
        "--embedding-type",
        "embd=",
        "Type of token_embd.weight: a ggml type, raw, or auto: raw, under a budget the "
        "ladder's, of policy uniform its own.",
        metavar="TYPE",
    ),
]
OutputType = Annotated[
    str,
    TypeParameter(
        "--output-type",
        "out=",
        "Type of output.weight, with the same values.",
        metavar="TYPE",
    ),
]
_STANDARD_LADDER = ("Q4_K", "Q8_0", "raw")


class _Policy(Part):
    """A policy.

    Attributes:
        takes_budget: Whether it can fill a size: never, where one is given, or always.
    """

    takes_budget: ClassVar[Literal["never", "may", "must"]] = "never"

    @classmethod
    @cache
    def parameters(cls) -> Mapping[str, PolicyField]:
        """The parameters by their names, in the order in which they are spelt."""
        return policy_fields(cls)


class EwqPolicy(_Policy):
    """The paper's rule with every parameter of it (arXiv:2503.04704 section 3.3).

    Rule `mean` is the paper's, `q75` the proof of concept's; see plan.ewq.
    """

    takes_budget = "may"

    name: Literal["ewq"] = "ewq"
    measure: Annotated[
        Literal["softmax", "histogram"],
        Parameter("--measure", help="Entropy that decides."),
    ] = "softmax"
    n_bins: Annotated[
        int,
        Parameter(
            "--bins", "bins", "Bins of the histogram entropy.", least=2, most=65536
        ),
    ] = 256
    epsilon: Annotated[
        float,
        Parameter("--epsilon", "eps", "Epsilon of the softmax entropy.", least=0),
    ] = 0.01
    rule: Annotated[
        Literal["mean", "q75"],
        Parameter(
            "--rule", help="Keep layers raw from the mean or 75th percentile on."
        ),
    ] = "mean"
    granularity: Annotated[
        Literal["layer", "tensor"],
        Parameter("--granularity", help="Decide layers, or tensors within their role."),
    ] = "layer"
    factor: Annotated[
        float, Parameter("--factor", "x", "X of the threshold mu - X sigma.", least=0)
    ] = 1.0
    ladder: Ladder = _STANDARD_LADDER
    embedding_type: EmbeddingType = "auto"
    output_type: OutputType = "auto"


class FastEwqPolicy(_Policy):
    """A classifier of layers that never sees a weight (arXiv:2503.04704 section 4).

    One low layer makes the paper's "fast 4bit/8bit mixed".

    Attributes:
        rows_sha256: SHA-256 of the rows it was fitted on.
        library: Library that fitted it, with its version; another may decide otherwise.
    """

    takes_budget = "may"

    name: Literal["fastewq"] = "fastewq"
    variant: Annotated[
        Literal["full", "train"],
        Parameter("--variant", help="Fit on every row, or on 70 % of them."),
    ] = "full"
    n_low: Annotated[
        int,
        Parameter(
            "--low-layers",
            "low",
            "Selected layers, from the last one down, that get the ladder's third "
            "type from the top.",
            least=0,
            most=10_000,
        ),
    ] = 0
    rows_sha256: Annotated[str, Parameter(word="rows=", is_recorded=True)] = ""
    library: Annotated[str, Parameter(word="library=", is_recorded=True)] = ""
    ladder: Ladder = _STANDARD_LADDER
    embedding_type: EmbeddingType = "auto"
    output_type: OutputType = "auto"


class UniformPolicy(_Policy):
    """One type for every tensor that llama-quantize quantises."""

    name: Literal["uniform"] = "uniform"
    ggml_type: Annotated[str, TypeParameter(metavar="TYPE")]
    embedding_type: EmbeddingType = "auto"
    output_type: OutputType = "auto"


class PresetPolicy(_Policy):
    """One of llama-quantize's own mixtures, such as `Q4_K_M`, by its dry run."""

    name: Literal["preset"] = "preset"
    preset: Annotated[str, TypeParameter(metavar="NAME")]


class OptimalPolicy(_Policy):
    """The best file of a size that can be found by measuring.

    Attributes:
        floors: Types by role, `*` for every role.
        ceilings: Types by role, `*` for every role.
        seed: Seed of the text that the model writes to be measured on.
    """

    takes_budget = "must"

    name: Literal["optimal"] = "optimal"
    effort_minutes: Annotated[
        float,
        Parameter(
            "--effort",
            "effort",
            "Time budget in minutes for probing and measuring.",
            metavar="MINUTES",
            least=0,
        ),
    ] = 20.0
    min_tps: Annotated[
        float | None,
        Parameter(
            "--min-tps",
            "tps",
            "Tokens per second that the file must generate on this machine.",
            metavar="X",
            above=0,
        ),
    ] = None
    types: Annotated[
        tuple[str, ...],
        TypeParameter(
            "--types",
            "types=",
            "Types that tensors may have, besides raw.  [default: all]",
            metavar="T,T,...",
        ),
    ] = QUANTISED_TYPES
    floors: Annotated[
        dict[str, str],
        TypeParameter(
            "--floor",
            "floor=",
            "Type of fewest bits, for a role such as attn_v or for all; repeat.",
            metavar="[ROLE=]TYPE",
        ),
    ] = {}
    ceilings: Annotated[
        dict[str, str],
        TypeParameter(
            "--ceiling",
            "ceiling=",
            "Type of most bits, for a role or for all; repeat.",
            metavar="[ROLE=]TYPE",
        ),
    ] = {}
    seed: Annotated[int, Parameter(word="seed")] = 1


class ImportedPolicy(_Policy):
    """Types that somebody else chose.

    Attributes:
        source: `poc`, a plan of the public proof of concept, or `gguf`, a file's types.
        file_name: Name of the imported file.
        file_sha256: SHA-256 of its bytes; of a GGUF file those before the data.
    """

    name: Literal["imported"] = "imported"
    source: Annotated[Literal["poc", "gguf"], Parameter(is_recorded=True)]
    file_name: Annotated[str, Parameter(word="file=", is_recorded=True)]
    file_sha256: Annotated[str, Parameter()]


class ProbePolicy(_Policy):
    """A part of the model quantised and the rest left as it is, to see what it does.

    Attributes:
        part: `nothing`, `layers` for all of them, `layer 3`, or a role.
        ggml_type: Type of that part.
    """

    name: Literal["probe"] = "probe"
    part: Annotated[str, Parameter()]
    ggml_type: Annotated[str, TypeParameter()]


class ControlPolicy(_Policy):
    """Another plan's layer decisions, dealt to other layers: as many of each type.

    Attributes:
        order: `random`; `inverted`, the highest entropy gets what the lowest had; or
            the layers that the lowest precisions go to first: the largest
            `variance` of weights, the `first` layers or the `last`.
        seed: Seed of the random order.
        plan_sha256: SHA-256 of the plan whose decisions they are.
    """

    name: Literal["control"] = "control"
    order: Annotated[
        Literal["random", "inverted", "variance", "first", "last"], Parameter()
    ]
    seed: Annotated[int | None, Parameter(word="seed")] = None
    plan_sha256: Annotated[str, Parameter()]


#: Policies that decide; the others only tell where types came from.
RulePolicy = EwqPolicy | FastEwqPolicy | UniformPolicy | PresetPolicy | OptimalPolicy
GivenPolicy = ImportedPolicy | ProbePolicy | ControlPolicy

Policy = Annotated[RulePolicy | GivenPolicy, Field(discriminator="name")]

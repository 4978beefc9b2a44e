"""Study: many temporary files of one model, measured to judge a way of planning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ewq_gguf.records.base import Part, Record
from ewq_gguf.records.model import ModelIdentity
from ewq_gguf.records.result import (
    BenchedFile,
    BenchParameters,
    Engine,
)
from ewq_gguf.records.scores import PairedMean, RankCorrelation
from ewq_gguf.records.texts import TextResult


class StudyFile(Part):
    """A file that was made, measured and removed; its plan makes it again.

    Attributes:
        label: its name in the study.
        plan_sha256: SHA-256 of its plan.
        layer_types: the type asked for each layer's matrices, from the first layer on;
            None where they differ.
        size_bytes: the file's bytes.
        bpw: bits per weight of the whole file.
        quality: perplexity and divergence from the base.
    """

    label: str
    plan_sha256: str
    layer_types: tuple[str | None, ...]
    size_bytes: int
    bpw: float
    quality: TextResult


class LayerProbe(Part):
    """One layer quantised, everything else as the base has it.

    Attributes:
        layer_idx: number of the layer.
        statistics: statistics of its linear matrices' weights, by their names in a
            scan, weighted by the matrices' sizes; and `variance` and `depth`.
        file: the measured file.
    """

    layer_idx: int
    statistics: dict[str, float]
    file: StudyFile


class RoleProbe(Part):
    """One role quantised in every layer, everything else as the base has it.

    Attributes:
        role: such as `attn_q`.
        n_tensors: number of tensors with that role.
        n_weights: their weights.
        file: the measured file.
    """

    role: str
    n_tensors: int
    n_weights: int
    file: StudyFile


class StatisticCorrelation(Part):
    """A statistic of the layers' weights and the layers' divergence.

    Attributes:
        statistic: its name.
        correlation: Spearman's, over the layers.
    """

    statistic: str
    correlation: RankCorrelation


class Sensitivity(Part):
    """The cost of quantising each part alone, and the statistics that foretell it.

    Attributes:
        kind: name of the study.
        ggml_type: type that the parts were given.
        epsilon: constant in the logarithm of the softmax entropies.
        n_bins: bins of the histogram entropies.
        floor: nothing quantised; a divergence of exactly 0.
        rounding: all layers at Q8_0: no more than this is the rounding of
            activations, which any quantised matrix brings with it, whatever its type.
        layers: one at a time.
        roles: one at a time, those outside the layers too.
        correlations: each statistic's correlation with the layers' mean divergence.
    """

    kind: Literal["sensitivity"] = "sensitivity"
    ggml_type: str
    epsilon: float
    n_bins: int
    floor: StudyFile
    rounding: StudyFile
    layers: tuple[LayerProbe, ...]
    roles: tuple[RoleProbe, ...]
    correlations: tuple[StatisticCorrelation, ...]


class Control(Part):
    """The plan's layer decisions, dealt to other layers.

    Attributes:
        order: as of ControlPolicy.
        seed: seed of a random one.
        file: the measured file.
        difference: its mean divergence minus the plan's, over the same windows.
    """

    order: Literal["random", "inverted", "variance", "first", "last"]
    seed: int | None
    file: StudyFile
    difference: PairedMean


class Controls(Part):
    """A plan beside others with as many layers of each type.

    Attributes:
        kind: name of the study.
        plan: the plan's file.
        controls: the other files.
        rank: place of the plan's mean divergence among it and the random ones; 1 is
            least.
        p: share of ranks as good or better; the least it can be is one over the
            number of random ones and one.
    """

    kind: Literal["controls"] = "controls"
    plan: StudyFile
    controls: tuple[Control, ...]
    rank: int
    p: float


class FactorFile(Part):
    """The file that a factor gives.

    Attributes:
        factor: X of the threshold.
        file: the measured file; factors that plan the same share one.
    """

    factor: float
    file: StudyFile


class FactorSweep(Part):
    """One factor after another.

    Attributes:
        kind: name of the study.
        files: in the order asked for.
    """

    kind: Literal["factor"] = "factor"
    files: tuple[FactorFile, ...]


class FrontierFile(Part):
    """A file on or above the curve of size against divergence.

    Attributes:
        source: whose types it has: a `preset`'s, policy `ewq`, `fastewq` or `optimal`.
        budget: the name of the size that it was planned for; None without one.
        limit_bytes: bytes of that size.
        has_imatrix: whether it was made with the importance matrix.
        file: the measured file.
        rival: label of the best preset that its limit allows; of optimal files only.
        difference: its mean divergence minus the rival's, over the same windows.
    """

    source: Literal["preset", "ewq", "fastewq", "optimal"]
    budget: str | None
    limit_bytes: int | None
    has_imatrix: bool
    file: StudyFile
    rival: str | None = None
    difference: PairedMean | None = None


class Frontier(Part):
    """Size against divergence, of every way to plan.

    Attributes:
        kind: name of the study.
        files: large to small.
        ratio: geometric mean of the optimal files' divergences over their rivals'; None
            where no optimal file has a rival.
    """

    kind: Literal["frontier"] = "frontier"
    files: tuple[FrontierFile, ...]
    ratio: float | None


Findings = Annotated[
    Sensitivity | Controls | FactorSweep | Frontier, Field(discriminator="kind")
]


class Study(Record):
    """Many temporary files of one model, measured alike.

    Attributes:
        ewq_version: version of the package that planned them.
        model: names and hashes of the checkpoint.
        base: the file that they were compared with.
        parameters: settings of every measurement.
        engine: the engine that computed.
        findings: results of the study that was done.
        request_sha256: SHA-256 of everything that was asked for; None in a record of a
            version that did not write it.
    """

    schema_name: Literal["ewq.study"] = "ewq.study"
    schema_version: Literal[1] = 1

    ewq_version: str
    model: ModelIdentity
    base: BenchedFile
    parameters: BenchParameters
    engine: Engine
    findings: Findings
    request_sha256: str | None = None

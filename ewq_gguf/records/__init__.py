"""The typed, versioned records that rooms hand to each other, each saved as JSON."""

from ewq_gguf.records.base import (
    Record,
    load_cached,
    load_record,
    read_journal,
    read_json,
)
from ewq_gguf.records.layout import Layout, LayoutTensor, Source
from ewq_gguf.records.model import ModelIdentity, Shard
from ewq_gguf.records.placement import Machine, Placement, Stage
from ewq_gguf.records.plan import (
    Budget,
    EwqPolicy,
    FastEwqPolicy,
    Imatrix,
    ImportedPolicy,
    Plan,
    PlanLayer,
    PlanTensor,
    Policy,
    RulePolicy,
    Thresholds,
    Totals,
    UniformPolicy,
)
from ewq_gguf.records.scan import LayerScan, Measures, Scan, Statistics, TensorScan
from ewq_gguf.records.verification import Verification, VerifiedTensor

__all__ = [
    "Budget",
    "EwqPolicy",
    "FastEwqPolicy",
    "Imatrix",
    "ImportedPolicy",
    "LayerScan",
    "Layout",
    "LayoutTensor",
    "Machine",
    "Measures",
    "ModelIdentity",
    "Placement",
    "Plan",
    "PlanLayer",
    "PlanTensor",
    "Policy",
    "Record",
    "RulePolicy",
    "Scan",
    "Shard",
    "Source",
    "Stage",
    "Statistics",
    "TensorScan",
    "Thresholds",
    "Totals",
    "UniformPolicy",
    "Verification",
    "VerifiedTensor",
    "load_cached",
    "load_record",
    "read_journal",
    "read_json",
]

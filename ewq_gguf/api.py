"""The main path as a handful of functions: what `ewq gguf` and a library user call.

    checkpoint -> Scan -> Plan -> base GGUF -> mixed GGUF -> Verification

Scans, layouts and base files are kept in the cache by what they depend on, so a second
run does only what changed.
"""

from ewq_gguf.experiments.compare import ComparisonSpec, compare
from ewq_gguf.experiments.versions import PlanSpec
from ewq_gguf.pipeline.bitsandbytes import ForTransformers, for_transformers
from ewq_gguf.pipeline.making import (
    Made,
    layout_bytes,
    make_gguf,
    planned_file,
)
from ewq_gguf.pipeline.planning import (
    check_layout,
    check_plan,
    check_weights,
    machine_budget,
    measured,
    plan,
    plan_file,
    policy_measures,
)
from ewq_gguf.stages.bases import base_file
from ewq_gguf.stages.calibrating import make_imatrix
from ewq_gguf.stages.choosing import as_planned
from ewq_gguf.stages.companions import companion_contents
from ewq_gguf.stages.converting import convert_model
from ewq_gguf.stages.importing import import_plan
from ewq_gguf.stages.options import SILENT, Options, Progress, Silent
from ewq_gguf.stages.presets import check_presets, preset_plans
from ewq_gguf.stages.scanning import layout, open_model, scan

__all__ = [
    "ForTransformers",
    "Made",
    "Options",
    "Progress",
    "SILENT",
    "Silent",
    "ComparisonSpec",
    "PlanSpec",
    "as_planned",
    "base_file",
    "check_layout",
    "check_plan",
    "check_presets",
    "check_weights",
    "companion_contents",
    "compare",
    "convert_model",
    "for_transformers",
    "import_plan",
    "layout",
    "layout_bytes",
    "machine_budget",
    "make_gguf",
    "make_imatrix",
    "measured",
    "open_model",
    "plan",
    "plan_file",
    "planned_file",
    "policy_measures",
    "preset_plans",
    "scan",
]

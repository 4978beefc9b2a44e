"""The library's face, and everything that the command line calls.

    checkpoint -> Scan -> Plan -> base GGUF -> mixed GGUF -> Verification

Scans, layouts and base files are kept in the cache by what they depend on, so a second
run does only what changed.
"""

from __future__ import annotations

from pathlib import Path

from ewq_gguf.experiments.compare import ComparisonSpec, PlanSpec, compare
from ewq_gguf.experiments.frontier import FrontierSpec
from ewq_gguf.experiments.layer_studies import (
    ControlsSpec,
    FactorSpec,
    SensitivitySpec,
)
from ewq_gguf.experiments.study import run_study
from ewq_gguf.pipeline import making
from ewq_gguf.pipeline.benching import bench, check_files, quantised_checkpoint
from ewq_gguf.pipeline.bitsandbytes import ForTransformers, for_transformers
from ewq_gguf.pipeline.making import Made, layout_bytes, planned_file
from ewq_gguf.pipeline.planning import (
    machine_budget,
    measured,
    plan,
    plan_file,
)
from ewq_gguf.plan.size_target import SizeTarget
from ewq_gguf.records import Plan, RulePolicy
from ewq_gguf.stages.calibrating import make_imatrix, with_imatrix
from ewq_gguf.stages.commands import (
    choices_given,
    convert_commands,
    quantize_commands,
)
from ewq_gguf.stages.converting import base_file, convert_model
from ewq_gguf.stages.finished_plan import (
    as_planned,
    check_given,
    check_plan,
    check_replaceable,
    check_weights,
)
from ewq_gguf.stages.importing import import_plan
from ewq_gguf.stages.options import SILENT, Options, Progress, Silent
from ewq_gguf.stages.presets import check_presets, preset_plans
from ewq_gguf.stages.run import Run
from ewq_gguf.stages.scanning import check_layout, policy_measures, scan

__all__ = [
    "ForTransformers",
    "Made",
    "Options",
    "Progress",
    "Run",
    "SILENT",
    "Silent",
    "ComparisonSpec",
    "ControlsSpec",
    "FactorSpec",
    "FrontierSpec",
    "PlanSpec",
    "SensitivitySpec",
    "as_planned",
    "base_file",
    "bench",
    "check_files",
    "check_given",
    "check_layout",
    "choices_given",
    "check_plan",
    "check_replaceable",
    "check_presets",
    "check_weights",
    "compare",
    "convert_commands",
    "convert_model",
    "for_transformers",
    "import_plan",
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
    "quantised_checkpoint",
    "quantize_commands",
    "run_study",
    "scan",
    "with_imatrix",
]


def open_model(
    model: str,
    *,
    reads_weights: bool = True,
    options: Options | None = None,
    progress: Progress = SILENT,
) -> Run:
    """Find a model, merge the adapters there are; an unknown architecture is refused.

    Args:
        model: a folder, a .safetensors or .gguf file, a Hub id, a URL, or `demo`.
        reads_weights: if not, weights on the Hub stay there.
        options: settings of the whole run; None for the defaults.
        progress: receiver of notes and of each stage's share done.

    Returns:
        The run that the other functions take; its `checkpoint` is open.

    Raises:
        EwqError: there is no such model, or it is not supported.
    """
    run = Run(model, options or Options(), progress, reads_weights)
    _ = run.checkpoint
    return run


def make_gguf(
    model: str,
    out: Path | None = None,
    policy: RulePolicy | Plan | None = None,
    *,
    raw_type: str = "auto",
    budget: SizeTarget | None = None,
    options: Options | None = None,
    progress: Progress = SILENT,
) -> Made:
    """Everything: scan, plan, convert, quantise, verify; reusing what is there.

    Args:
        model: a folder, a .safetensors or .gguf file, a Hub id, or `demo`.
        out: path of the GGUF; None for `NAME-EWQ-<nearest preset>.gguf` here.
        policy: how to plan, or a finished plan; None for the paper's.
        raw_type: meaning of `raw`: `F16`, `BF16` or `auto`.
        budget: limit of the file's size; None without one.
        options: settings of the whole run; None for the defaults.
        progress: receiver of notes and of each stage's share done.

    Raises:
        EwqError: a stage failed; the message says what to do.
    """
    run = Run(model, options or Options(), progress)
    return making.make_gguf(run, out, policy, raw_type=raw_type, budget=budget)

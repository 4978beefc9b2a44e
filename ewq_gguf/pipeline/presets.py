"""llama-quantize's own mixtures as plans, so that their files are verified like others.

Which type each tensor gets is asked of llama-quantize; its rules are not repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.llamacpp.imatrix import read_imatrix
from ewq_gguf.llamacpp.layout import (
    IMATRIX_PRESETS,
    MORE_PRESETS,
    PRESETS,
    preset_types,
)
from ewq_gguf.llamacpp.toolchain import find_toolchain
from ewq_gguf.pipeline.options import SILENT, Options, Progress
from ewq_gguf.pipeline.scanning import layout
from ewq_gguf.plan.assemble import assemble
from ewq_gguf.plan.subject import Subject
from ewq_gguf.records import Plan, PresetPolicy, Scan


def check_presets(names: Sequence[str]) -> None:
    """Refuse what is no standard preset.

    Raises:
        UsageError: naming the first.
    """
    if unknown := [name for name in names if name not in PRESETS]:
        raise UsageError(
            "plan",
            "preset",
            f"there is no standard preset {unknown[0]!r}",
            f"use {', '.join(PRESETS)}",
        )


def preset_plan(
    source: Checkpoint | Scan,
    policy: PresetPolicy,
    *,
    raw_type: str = "auto",
    options: Options | None = None,
    progress: Progress = SILENT,
) -> Plan:
    """A standard preset as a plan.

    Raises:
        UsageError: there is no such preset.
        InputError: the model is not there, only a scan of it.
    """
    check_presets([policy.preset])
    if isinstance(source, Scan):
        raise InputError(
            "plan",
            source.model.name,
            "a preset's types are asked of llama-quantize with the model's header",
            "give the model in place of the scan",
        )
    plans = preset_plans(source, raw_type=raw_type, options=options, progress=progress)
    return plans[policy.preset]


def preset_plans(
    checkpoint: Checkpoint,
    *,
    raw_type: str = "auto",
    presets: Sequence[str] = PRESETS,
    options: Options | None = None,
    progress: Progress = SILENT,
) -> dict[str, Plan]:
    """Presets as plans, by name, the standard ones large to small; no weight is read.

    One that needs an entry that the importance matrix lacks is left out.

    Raises:
        EwqError: the model cannot be laid out, or the importance matrix is another's.
    """
    options = options or Options()
    toolchain = find_toolchain(options.llama_cpp)
    laid_out = layout(checkpoint, toolchain, progress)
    subject = Subject.of_tensors(
        checkpoint.identity, laid_out.tensors, laid_out, raw_type
    )
    if options.imatrix:
        subject = replace(subject, importance=read_imatrix(options.imatrix))
    types = preset_types(checkpoint, toolchain, options.imatrix, presets)
    plans = {}
    for name in presets:
        if name not in types:
            continue
        try:
            plans[name] = assemble(subject, PresetPolicy(preset=name), types[name])
        except InputError:
            if name in PRESETS:
                raise
    return plans


def all_preset_plans(
    checkpoint: Checkpoint,
    *,
    raw_type: str = "auto",
    options: Options,
    progress: Progress = SILENT,
) -> dict[str, Plan]:
    """Every preset there is, by name: with the importance matrix, and without.

    Raises:
        EwqError: as of `preset_plans`.
    """
    plans: dict[str, Plan] = {}
    for suffix, imatrix, more in (
        (" imatrix", options.imatrix, IMATRIX_PRESETS),
        ("", None, ()),
    ):
        if suffix and imatrix is None:
            continue
        found = preset_plans(
            checkpoint,
            raw_type=raw_type,
            presets=(*PRESETS, *MORE_PRESETS, *more),
            options=replace(options, imatrix=imatrix),
            progress=progress,
        )
        plans |= {f"{name}{suffix}": plan for name, plan in found.items()}
    return plans

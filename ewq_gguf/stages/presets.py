"""llama-quantize's own mixtures as plans, so that their files are verified like others.

llama-quantize is asked for each tensor's type; its rules are not repeated.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.llamacpp.layout import (
    ALL_PRESETS,
    IMATRIX_PRESETS,
    MORE_PRESETS,
    NEED_IMATRIX,
    PRESETS,
    preset_types,
)
from ewq_gguf.plan.assemble import assemble
from ewq_gguf.plan.lattice import Lattices
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.records import Plan, PresetPolicy
from ewq_gguf.stages.run import Run


def check_presets(names: Sequence[str], *, has_imatrix: bool) -> None:
    """Refuse what is no standard preset, or needs an importance matrix.

    Raises:
        UsageError: naming the first that is none.
        InputError: naming the first that needs a matrix where there is none.
    """
    for name in names:
        if name not in ALL_PRESETS:
            raise UsageError(
                "plan",
                "preset",
                f"there is no standard preset {name!r}",
                f"use {', '.join(ALL_PRESETS)}",
            )
        if name in NEED_IMATRIX and not has_imatrix:
            raise InputError(
                "plan",
                "preset",
                f"{name} needs an importance matrix, and none is given",
                "give --imatrix FILE; `ewq imatrix MODEL -o FILE` makes one",
            )


def preset_plan(
    run: Run,
    policy: PresetPolicy,
    *,
    raw_type: str = "auto",
    lattices: Lattices | None = None,
) -> Plan:
    """A standard preset as a plan.

    Args:
        run: the model and the options.
        policy: the preset.
        raw_type: meaning of `raw`: `F16`, `BF16` or `auto`.
        lattices: types that hold tensors exactly, which keep their values.

    Raises:
        InputError: the model is not there, only a scan of it, or the matrix lacks an
            entry that the preset needs.
    """
    if run.given_scan is not None:
        raise InputError(
            "plan",
            run.identity.name,
            "a preset's types are asked of llama-quantize with the model's header",
            "give the model in place of the scan",
        )
    names = (policy.preset,)
    plans = preset_plans(
        run, raw_type=raw_type, presets=names, needed=names, lattices=lattices
    )
    return plans[policy.preset]


def preset_plans(
    run: Run,
    *,
    raw_type: str = "auto",
    presets: Sequence[str] = PRESETS,
    needed: Collection[str] = PRESETS,
    lattices: Lattices | None = None,
) -> dict[str, Plan]:
    """Presets as plans, by name, the standard ones large to small; no weight is read.

    One that cannot be made, as where the importance matrix lacks an entry, is left out,
    unless it is among those that are needed.

    Raises:
        EwqError: the model cannot be laid out, or the importance matrix is another's.
    """
    layout, imatrix = run.layout, run.options.imatrix
    model = ModelTensors.of_tensors(run.identity, layout.tensors, layout, raw_type)
    model = replace(model, lattices=lattices or {}, importance=run.importance)
    types = preset_types(run.checkpoint, run.toolchain, imatrix, presets, needed=needed)
    plans = {}
    for name in presets:
        if name not in types:
            continue
        try:
            plans[name] = assemble(model, PresetPolicy(preset=name), types[name])
        except InputError:
            if name in needed:
                raise
    return plans


def all_preset_plans(run: Run, *, raw_type: str = "auto") -> dict[str, Plan]:
    """Every preset there is, by name: with the importance matrix, and without.

    Raises:
        EwqError: as of `preset_plans`.
    """
    plans: dict[str, Plan] = {}
    for suffix, imatrix, more in (
        (" imatrix", run.options.imatrix, IMATRIX_PRESETS),
        ("", None, ()),
    ):
        if suffix and imatrix is None:
            continue
        made = preset_plans(
            run.with_options(imatrix=imatrix),
            raw_type=raw_type,
            presets=(*PRESETS, *MORE_PRESETS, *more),
        )
        plans |= {f"{name}{suffix}": plan for name, plan in made.items()}
    return plans

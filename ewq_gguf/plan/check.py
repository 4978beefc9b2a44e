"""Is a plan that came from a file one that `make_plan` could have made?"""

from __future__ import annotations

from ewq_gguf import ggml_types
from ewq_gguf.errors import InputError
from ewq_gguf.plan.assemble import ftype_of, layers_of, plan_tensor, totals_of
from ewq_gguf.records import LayoutTensor, Placement, Plan, PlanTensor, Totals


def check_sound(plan: Plan) -> None:
    """Refuse a plan whose parts contradict each other, before anything runs.

    Raises:
        InputError: with a JSON pointer to the part that is wrong.
    """
    seen: dict[str, str] = {}
    for i, tensor in enumerate(plan.tensors):
        pointer = f"/tensors/{i}"
        # llama-quantize lowers the case of what it is told.
        twin = seen.setdefault(tensor.name.lower(), tensor.name)
        if len(seen) == i:
            problem = "stands there twice"
            if twin != tensor.name:
                problem = f"differs from {twin} in capitals only"
            raise _wrong(plan, f"{pointer}/name", tensor.name, problem)
        _check_tensor(plan, tensor, pointer)
    ftype = ftype_of(plan.tensors)
    if plan.ftype != ftype:
        raise _wrong(plan, "/ftype", plan.ftype, f"must be {ftype}")
    _check_layers(plan)
    made = totals_of(plan.tensors, plan.totals.header_bytes)
    for key in Totals.model_fields:
        value, needed = getattr(plan.totals, key), getattr(made, key)
        if value != needed:
            raise _wrong(plan, f"/totals/{key}", value, f"must be {needed}")
    if plan.budget and plan.budget.limit_bytes < plan.totals.file_size_bytes:
        problem = f"is less than the file's {plan.totals.file_size_bytes}"
        raise _wrong(plan, "/budget/limit_bytes", plan.budget.limit_bytes, problem)
    if plan.placement:
        _check_placement(plan, plan.placement)


def _check_layers(plan: Plan) -> None:
    needed = layers_of(plan.tensors)
    if len(plan.layers) != len(needed):
        raise _wrong(plan, "/layers", len(plan.layers), f"must be {len(needed)}")
    for i, (layer, made) in enumerate(zip(plan.layers, needed, strict=True)):
        for key in ("layer_idx", "ggml_type"):
            value, needed_value = getattr(layer, key), getattr(made, key)
            if value != needed_value:
                problem = f"must be {needed_value}"
                raise _wrong(plan, f"/layers/{i}/{key}", value, problem)
        if layer.decision is not None and layer.decision not in ggml_types.PLANNABLE:
            pointer = f"/layers/{i}/decision"
            raise _wrong(plan, pointer, layer.decision, "is no ggml type")


def _check_placement(plan: Plan, placement: Placement) -> None:
    """Every layer on one machine, in order, and no machine with more than it holds."""
    at = "/placement"
    machines = {machine.name: machine for machine in placement.machines}
    names = [stage.machine for stage in placement.stages]
    if placement.n_ctx < 1:
        raise _wrong(plan, f"{at}/n_ctx", placement.n_ctx, "is not 1 or more")
    if len(machines) < len(placement.machines):
        raise _wrong(plan, f"{at}/machines", list(machines), "has one name twice")
    if not names or len(set(names)) < len(names) or not machines.keys() >= set(names):
        raise _wrong(plan, f"{at}/stages", names, f"are not among {list(machines)}")
    if names[0] != placement.machines[0].name:
        raise _wrong(plan, f"{at}/stages/0", names[0], "is not the main machine")
    n_placed = 0
    for i, stage in enumerate(placement.stages):
        pointer, machine = f"{at}/stages/{i}", machines[stage.machine]
        used = stage.weight_bytes + stage.kv_bytes + stage.compute_bytes
        if used > machine.memory_bytes:
            raise _wrong(plan, pointer, used, f"is over {machine.memory_bytes}")
        if stage.has_output != (i == len(names) - 1):
            raise _wrong(plan, pointer, stage.machine, "has the head, or lacks it")
        if stage.first_layer is None or stage.last_layer is None:
            continue
        if not n_placed == stage.first_layer <= stage.last_layer:
            problem = f"must be {n_placed}, and not after {stage.last_layer}"
            raise _wrong(plan, f"{pointer}/first_layer", stage.first_layer, problem)
        n_placed = stage.last_layer + 1
    n_layers = max((layer.layer_idx + 1 for layer in plan.layers), default=0)
    if n_placed < n_layers:
        raise _wrong(plan, f"{at}/stages", n_placed, f"layers of {n_layers} are placed")


def _check_tensor(plan: Plan, tensor: PlanTensor, pointer: str) -> None:
    if not tensor.shape or min(tensor.shape) < 1:
        raise _wrong(plan, f"{pointer}/shape", tensor.shape, "is no tensor's")
    ggml_type, base = tensor.ggml_type, tensor.base_type
    if base not in ggml_types.FLOAT_TYPES:
        raise _wrong(plan, f"{pointer}/base_type", base, "is no 16- or 32-bit type")
    if ggml_type not in ggml_types.PLANNABLE:
        raise _wrong(plan, f"{pointer}/ggml_type", ggml_type, "is no ggml type")
    if ggml_type in ggml_types.IMATRIX_TYPES and plan.imatrix is None:
        problem = "needs an importance matrix, and none is given"
        raise _wrong(plan, f"{pointer}/ggml_type", ggml_type, problem)
    made = plan_tensor(
        LayoutTensor(name=tensor.name, shape=tensor.shape, ggml_type=base),
        ggml_type,
        tensor.entropy,
        is_exact=tensor.is_exact and ggml_type in ggml_types.LATTICE_TYPES,
    )
    for key in PlanTensor.model_fields:
        value, needed = getattr(tensor, key), getattr(made, key)
        if value != needed:
            raise _wrong(plan, f"{pointer}/{key}", value, f"must be {needed}")


def _wrong(plan: Plan, pointer: str, value: object, problem: str) -> InputError:
    return InputError(
        "plan",
        plan.model.name,
        f"at {pointer}: {value} {problem}",
        "plan again instead of editing the file",
    )

"""Is a plan that came from a file one that `make_plan` could have made?"""

from __future__ import annotations

from ewq_gguf import ggml_types
from ewq_gguf.errors import InputError
from ewq_gguf.plan.assemble import ftype_of, plan_tensor, totals_of
from ewq_gguf.records import LayoutTensor, Plan, PlanTensor, Totals


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
    made = totals_of(plan.tensors, plan.totals.header_bytes)
    for key in Totals.model_fields:
        found, needed = getattr(plan.totals, key), getattr(made, key)
        if found != needed:
            raise _wrong(plan, f"/totals/{key}", found, f"must be {needed}")


def _check_tensor(plan: Plan, tensor: PlanTensor, pointer: str) -> None:
    if not tensor.shape or min(tensor.shape) < 1:
        raise _wrong(plan, f"{pointer}/shape", tensor.shape, "is no tensor's")
    asked, base = tensor.ggml_type, tensor.base_type
    if base not in ggml_types.FLOAT_TYPES:
        raise _wrong(plan, f"{pointer}/base_type", base, "is no 16- or 32-bit type")
    if asked not in ggml_types.PLANNABLE:
        raise _wrong(plan, f"{pointer}/ggml_type", asked, "is no ggml type")
    if asked in ggml_types.IMATRIX_TYPES and plan.imatrix is None:
        problem = "needs an importance matrix, and none is given"
        raise _wrong(plan, f"{pointer}/ggml_type", asked, problem)
    made = plan_tensor(
        LayoutTensor(name=tensor.name, shape=tensor.shape, ggml_type=base),
        asked,
        tensor.entropy,
    )
    for key in PlanTensor.model_fields:
        found, needed = getattr(tensor, key), getattr(made, key)
        if found != needed:
            raise _wrong(plan, f"{pointer}/{key}", found, f"must be {needed}")


def _wrong(plan: Plan, pointer: str, found: object, problem: str) -> InputError:
    return InputError(
        "plan",
        plan.model.name,
        f"at {pointer}: {found} {problem}",
        "plan again instead of editing the file",
    )

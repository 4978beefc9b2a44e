"""Types that somebody else chose: of the proof of concept's plans, and of GGUF files.

The proof of concept (github.com/namtb96/Entropy-Weighted-Quantization-PoC) writes
`quant_plan_<hash>.json` in three forms: `{"0": "raw", "1": "4-bit"}` by layer, the same
below a key `plan`, and `{"plan": {"blk.0.attn_q.weight": "Q8_0"}}` by tensor, beside a
summary. Values are `raw`, `8-bit`, `4-bit`, a ggml type in any case, or `COPY`. A plan
by tensor names norms too, some as no GGUF does (`blk.0.q_norm.weight`), and always the
output head, which a model with tied embeddings lacks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ewq_gguf import ggml_types
from ewq_gguf.errors import InputError
from ewq_gguf.ggml_types import n_dims
from ewq_gguf.plan.budget import FLOOR
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.tensor_names import is_quantizable, layer_idx, nearest_name

#: What the proof of concept and the paper call precisions, as ggml types.
_BY_BITS = {"8": "Q8_0", "4": "Q4_K", "3": "Q3_K", "2": "Q2_K", "1.58": FLOOR}
_BITS = re.compile(r"([0-9.]+)[-_ ]?bit")
_LAYER = re.compile(r"0|[1-9][0-9]{0,5}")
_PRESET = re.compile(r".+_(XS|S|M|L|XL)")
_HEAD = "output.weight"
#: Endings of names that the proof of concept writes for tensors no file has.
_MAY_LACK = ("norm.weight", ".bias")
_N_SHOWN = 3


@dataclass(frozen=True)
class Imported:
    """Types that a file asks for.

    Attributes:
        types: type by tensor name; tensors that are not named are raw.
        notes: one line for each part of the file that was not followed.
    """

    types: Mapping[str, str]
    notes: tuple[str, ...]


def poc_types(values: object, model: ModelTensors, file: str) -> Imported:
    """The types that a plan of the proof of concept asks for.

    A tensor may be named as in the GGUF or as in the checkpoint; its own entry wins
    over its layer's. Layers and tensors that are not named are raw.

    Args:
        values: the parsed JSON.
        model: the model.
        file: its name, for messages.

    Raises:
        InputError: it is no such plan, names a layer or tensor that the model lacks or
            a type that cannot be planned.
    """
    quantizable = set(_quantizable(model))
    layers: dict[int, list[str]] = defaultdict(list)
    fed: dict[str, list[str]] = defaultdict(list)
    for tensor in model.tensors:
        if (idx := layer_idx(tensor.name)) is not None and tensor.name in quantizable:
            layers[idx].append(tensor.name)
        for name in {tensor.name, *(source.hf_name for source in tensor.sources)}:
            fed[name].append(tensor.name)
    by_layer: dict[str, str] = {}
    by_name: dict[str, str] = {}
    left: list[str] = []
    for key, value in _entries(values, file).items():
        ggml_type = model.plain(_type_of(value, f"/{key}", file))
        if _LAYER.fullmatch(key):
            if int(key) not in layers:
                raise InputError(
                    "plan",
                    file,
                    f"names layer {key}, the model has {min(layers, default=0)} to "
                    f"{max(layers, default=0)}",
                    "give the plan of this model",
                )
            by_layer |= dict.fromkeys(layers[int(key)], ggml_type)
            continue
        names = fed.get(key, [])
        if not names and key != _HEAD and not key.endswith(_MAY_LACK):
            raise _unknown(key, list(fed), file)
        if not quantizable.intersection(names):
            left.append(key)
        for name in quantizable.intersection(names):
            if by_name.setdefault(name, ggml_type) != ggml_type:
                raise InputError(
                    "plan",
                    file,
                    f"at /{key}: {ggml_type}, and {by_name[name]} for another part of "
                    f"{name}",
                    "give all parts of one tensor one type",
                )
    types = by_layer | by_name
    raw = [name for name in _quantizable(model) if name not in types]
    return Imported(types, (*_left_note(left), *_raw_note(raw, model.raw_type)))


def gguf_types(
    tensors: Mapping[str, tuple[tuple[int, ...], str]], model: ModelTensors, file: str
) -> Imported:
    """The types of another GGUF file of the same model.

    Args:
        tensors: each tensor's shape, slowest dimension first, and type, by name.
        model: the model.
        file: its name, for messages.

    Raises:
        InputError: its tensors are not the model's, or a type cannot be planned.
    """
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    for name, (shape, _) in tensors.items():
        if name not in shapes:
            raise _unknown(name, list(shapes), file)
        if shape != shapes[name]:
            raise InputError(
                "plan",
                file,
                f"{name} has shape {shape}, the model's {shapes[name]}",
                "give a file of this model",
            )
    if missing := [name for name in shapes if name not in tensors]:
        raise InputError(
            "plan",
            file,
            f"lacks {len(missing)} of the model's {len(shapes)} tensors: "
            f"{_some(missing)}",
            "give a whole file of this model",
        )
    types = {
        name: _plannable(tensors[name][1], name, file) for name in _quantizable(model)
    }
    left = [
        tensor.name
        for tensor in model.tensors
        if tensor.name not in types and tensors[tensor.name][1] != tensor.ggml_type
    ]
    return Imported(types, _left_note(left))


def _quantizable(model: ModelTensors) -> list[str]:
    """Names of what llama-quantize quantises, in the file's order."""
    return [t.name for t in model.tensors if is_quantizable(t.name, n_dims(t.shape))]


def _entries(values: object, file: str) -> dict[str, object]:
    """The object that maps layers or tensors to types."""
    remedy = "give a quant_plan_*.json of the proof of concept, or a GGUF file"
    if not isinstance(values, dict):
        raise InputError("plan", file, "is not a JSON object", remedy)
    if "schema_name" in values:
        raise InputError(
            "plan", file, f"is an {values['schema_name']} file", "use it as it is"
        )
    entries = values.get("plan", values)
    if not isinstance(entries, dict) or not entries:
        raise InputError("plan", file, "names no layer and no tensor", remedy)
    return entries


def _type_of(value: object, pointer: str, file: str) -> str:
    """A value of the proof of concept as `raw` or a ggml type."""
    text = value.strip().lower() if isinstance(value, str) else ""
    if text in ("raw", "copy"):
        return "raw"
    bits = _BITS.fullmatch(text)
    name = _BY_BITS.get(bits[1], text) if bits else text.upper()
    if name not in ggml_types.PLANNABLE:
        what = "a preset for whole files" if _PRESET.fullmatch(name) else "no type"
        near = nearest_name(name, ggml_types.PLANNABLE)
        raise InputError(
            "plan",
            file,
            f"at {pointer}: {value!r} is {what}",
            f"use a ggml type such as {near}, or raw, 8-bit, 4-bit, 3-bit, 2-bit, "
            "1.58-bit",
        )
    return _plannable(name, pointer, file)


def _plannable(ggml_type: str, where: str, file: str) -> str:
    if ggml_type not in ggml_types.PLANNABLE:
        raise InputError(
            "plan", file, f"at {where}: {ggml_type} cannot be planned", "use another"
        )
    if ggml_type in ggml_types.IMATRIX_TYPES:
        raise InputError(
            "plan",
            file,
            f"at {where}: {ggml_type} needs an importance matrix, and none is given",
            "import types that need none, such as Q2_K or IQ3_S",
        )
    return ggml_type


def _unknown(name: str, names: Sequence[str], file: str) -> InputError:
    return InputError(
        "plan",
        file,
        f"the model has no tensor {name}",
        f"the nearest name is {nearest_name(name, names)}",
    )


def _left_note(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (
        f"{len(names)} left out, which llama-quantize never quantises or the model "
        f"lacks: {_some(names)}",
    )


def _raw_note(names: Sequence[str], raw_type: str) -> tuple[str, ...]:
    if not names:
        return ()
    return (f"{len(names)} not named, which stay {raw_type}: {_some(names)}",)


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _N_SHOWN else ""
    return ", ".join(names[:_N_SHOWN]) + more

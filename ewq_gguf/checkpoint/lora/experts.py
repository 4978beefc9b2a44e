"""Adapters of experts that the model in memory has in one tensor.

PEFT has one A (experts x rank, in) and one B (out, rank x experts) for them; a
checkpoint has them in one tensor too, or each expert's matrices for themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ewq_gguf.checkpoint.lora.adapter import Adapter
from ewq_gguf.checkpoint.lora.low_rank import Change, FloatArray, LowRank
from ewq_gguf.checkpoint.lora.names import Names
from ewq_gguf.checkpoint.lora.steps import LINEAR, Parts, Step

#: Families whose experts in one are stored as (experts, in, out).
_IN_OUT = ("GptOssForCausalLM", "Llama4ForConditionalGeneration", "Llama4ForCausalLM")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where one expert's matrix is in a checkpoint.

    Attributes:
        tensor: its name.
        matrix: The index of the matrix in a three-dimensional tensor.
        expert: whose it is.
        rows: The rows of the expert's B that belong to the matrix.
    """

    tensor: str
    matrix: int
    expert: int
    rows: slice


@dataclass(frozen=True)
class Experts:
    """Where a matrix of all experts of a module is in a checkpoint.

    Attributes:
        count: The number of experts.
        turn: their matrices are stored as (in, out).
        places: The places of the matrices.
    """

    count: int
    turn: bool
    places: tuple[Place, ...]

    @classmethod
    def find(
        cls,
        names: Names,
        parameter: str,
        n_rows: int,
        architecture: str,
        shape_of: Callable[[str], Shape],
    ) -> Experts | None:
        """Look for a parameter such as `mlp.experts.gate_up_proj`.

        Args:
            names: The names of the checkpoint's tensors.
            parameter: its name in the model in memory.
            n_rows: The number of rows of one expert's B.
            architecture: The model's architecture.
            shape_of: the shape of a tensor of the checkpoint.
        """
        if tensor := names.find_experts(parameter):
            count = shape_of(tensor)[0]
            places = [Place(tensor, e, e, slice(None)) for e in range(count)]
            return cls(count, architecture in _IN_OUT, tuple(places))
        module, _, name = parameter.rpartition(".")
        single = names.find_each_expert(module)
        places = []
        for e, (gate, up, down) in enumerate(single):
            if name == "gate_up_proj":  # the gate's rows come first
                places.append(Place(gate, 0, e, slice(0, n_rows // 2)))
                places.append(Place(up, 0, e, slice(n_rows // 2, n_rows)))
            elif name == "down_proj":
                places.append(Place(down, 0, e, slice(None)))
        return cls(len(single), False, tuple(places)) if places else None

    def fit(self, a: Shape, b: Shape, shape_of: Callable[[str], Shape]) -> bool:
        """Whether an A and a B have the right shapes for every matrix.

        Args:
            a: shape of A.
            b: shape of B.
            shape_of: the shape of a tensor of the checkpoint.
        """
        for place in self.places:
            n_rows = len(range(*place.rows.indices(b[0])))
            matrix = (a[1], n_rows) if self.turn else (n_rows, a[1])
            if shape_of(place.tensor)[-2:] != matrix:
                return False
        return a[0] % self.count == 0

    def step(self, adapter: Adapter, parts: Parts, place: Place, scale: float) -> Step:
        """The change of one matrix of one expert by an adapter."""

        def make(arrays: Mapping[str, FloatArray]) -> Change:
            a, b = (arrays[end] for end in LINEAR)
            rank = len(a) // self.count
            own_a = a[place.expert * rank : (place.expert + 1) * rank]
            own_b = b[place.rows, place.expert :: self.count]
            left, right = (own_a.T, own_b.T) if self.turn else (own_b, own_a)
            return LowRank(left, right, scale)

        return Step(adapter, parts, make, place.matrix)


def expert_parameters(adapter: Adapter, module: str) -> list[str]:
    """The parameters with all experts in one that may be meant at a module.

    Args:
        adapter: whose target_parameters they are among.
        module: such as `model.layers.0.mlp.experts`.

    Returns:
        Their names without the module's; none where the module has none.
    """
    told = adapter.config.get("target_parameters") or []
    module = module.removesuffix(".base_layer")
    if not isinstance(told, list) or not module.endswith("experts"):
        return []
    ends = {str(key): str(key).rpartition(".")[2] for key in told}
    return [
        end
        for key, end in sorted(ends.items())
        if f".{module}.{end}".endswith(f".{key}")
    ]

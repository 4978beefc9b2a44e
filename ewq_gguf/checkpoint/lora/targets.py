"""The tensors of a checkpoint that an adapter changes, by names and shapes alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.header import TensorHeader
from ewq_gguf.checkpoint.lora.adapter import Adapter, same_weights
from ewq_gguf.checkpoint.lora.config import MERGE_YOURSELF
from ewq_gguf.checkpoint.lora.experts import Experts, expert_parameters
from ewq_gguf.checkpoint.lora.low_rank import FLOAT_DTYPES
from ewq_gguf.checkpoint.lora.names import Names, is_embedding
from ewq_gguf.checkpoint.lora.steps import (
    BIAS,
    EMBEDDING,
    LINEAR,
    MAGNITUDE,
    ROWS,
    Parts,
    Step,
    bias_step,
    low_rank_step,
    rows_step,
)
from ewq_gguf.checkpoint.shards import ShardFile
from ewq_gguf.errors import InputError

#: The start of the names of families whose linear layers are Conv1D, (in, out).
_CONV1D = "GPT2"


@dataclass
class Target:
    """The changes of one tensor of the checkpoint.

    Attributes:
        shard: the file its weights are read from: the checkpoint's or an adapter's.
        tensor: its header in that file.
        steps: changes of it, in their order.
    """

    shard: ShardFile
    tensor: TensorHeader
    steps: list[Step] = field(default_factory=list)


class Targets:
    """The changes of a checkpoint's tensors, adapter after adapter.

    Attributes:
        by_name: the tensors that change, by their names in the checkpoint.
        notes: Sentences for the user.
    """

    def __init__(self, base: Checkpoint) -> None:
        """Nothing changes yet."""
        self.by_name: dict[str, Target] = {}
        self.notes: list[str] = []
        self._base = base
        self._found = {tensor.name: (shard, tensor) for shard, tensor in base.tensors}
        self._names = Names.of(self._found)

    @property
    def n_tokens(self) -> int | None:
        """Rows of the embedding; None where the checkpoint has none known here."""
        name = self._names.embedding
        return self._shape(name)[0] if name else None

    @property
    def is_resized(self) -> bool:
        """Whether an adapter brings an embedding with other rows than the base's."""
        name = self._names.embedding
        return name is not None and self._shape(name) != self._found[name][1].shape

    def add(self, adapter: Adapter) -> None:
        """Find what an adapter changes.

        Raises:
            InputError: it is no adapter of this checkpoint, or a change is of a
                kind that is not merged here.
        """
        self._check_names(adapter)
        for name, tensor in adapter.whole.items():
            self._replace(adapter, name, tensor)
        for module, parts in adapter.parts.items():
            if own := self._names.find(f"{module}.weight"):
                self._change(adapter, module, own, parts)
            else:
                self._change_experts(adapter, module, parts)
        self._check_vocabulary(adapter)

    def _check_names(self, adapter: Adapter) -> None:
        """Refuse another model's adapter, with some of what it would change."""
        missing = [name for name in adapter.whole if not self._names.find(name)]
        missing += [
            module
            for module in adapter.parts
            if not self._names.find(f"{module}.weight")
            and not expert_parameters(adapter, module)
        ]  # fmt: skip
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            n_all = len(adapter.parts) + len(adapter.whole)
            raise adapter.error(
                f"{len(missing)} of the {n_all} weights it changes are not in "
                f"{self._base.identity.name}: {shown}",
                adapter.right_base,
            )

    def _shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape after what was added so far."""
        target = self.by_name.get(name)
        return (target.tensor if target else self._found[name][1]).shape

    def _replace(self, adapter: Adapter, name: str, tensor: TensorHeader) -> None:
        own = self._names.find(name)
        assert own is not None
        if own == self._names.embedding and not is_embedding(name):
            self._check_same_head(adapter, name, tensor)
            return
        shape = self._found[own][1].shape
        is_vocabulary = own in (self._names.embedding, self._names.head)
        rows = slice(1 if is_vocabulary else 0, None)
        if len(tensor.shape) != len(shape) or tensor.shape[rows] != shape[rows]:
            raise self._misfit(adapter, name, tensor.shape, own)
        self._check(adapter, own)
        self.by_name[own] = Target(adapter.file, tensor)

    def _check_same_head(self, adapter: Adapter, name: str, head: TensorHeader) -> None:
        """A head that is saved beside a tied embedding has to be that once more."""
        own = self._names.embedding
        assert own is not None
        dtype = self._found[own][1].dtype
        saved = next((t for key, t in adapter.whole.items() if is_embedding(key)), None)
        embedding = (adapter.file, saved) if saved else self._found[own]
        if not same_weights((adapter.file, head), embedding, dtype):
            raise adapter.error(
                f"{name} is a head of its own, and the base's head is its embedding",
                "merge it with PEFT's merge_and_unload, set tie_word_embeddings to "
                "false, and give the merged folder",
            )

    def _change(self, adapter: Adapter, module: str, own: str, parts: Parts) -> None:
        self._check(adapter, own)
        left = {key: part for key, part in parts.items() if key != ROWS}
        if ROWS in parts:
            self._change_rows(adapter, module, own, parts[ROWS])
        if left:
            names = sorted(left.keys() - {MAGNITUDE, BIAS})
            if names not in ([*LINEAR], [*EMBEDDING]):
                problem = f"{module} has {', '.join(sorted(left))}, not an A and a B"
                raise adapter.error(problem, "download it again")
            self._add_low_rank(adapter, module, own, left)
        if BIAS in left:
            self._add_bias(adapter, module, left)

    def _add_low_rank(
        self, adapter: Adapter, module: str, own: str, parts: Parts
    ) -> None:
        ends = EMBEDDING if EMBEDDING[0] in parts else LINEAR
        a, b = _checked_product(adapter, module, *(parts[end].shape for end in ends))
        shape, straight, turned = self._shape(own), (b[0], a[1]), (a[1], b[0])
        # fan_in_fan_out is what PEFT met last: a head makes it false for all of GPT-2.
        is_conv1d = self._base.identity.hf_architecture.startswith(_CONV1D)
        is_conv1d &= own not in (self._names.embedding, self._names.head)
        turn = ends == EMBEDDING or is_conv1d
        if shape != (turned if turn else straight):
            raise self._misfit(adapter, module, turned if turn else straight, own)
        self._check_magnitude(adapter, module, own, parts, turn=turn)
        scale = adapter.scale(module, a[0])

        self._add_step(own, low_rank_step(adapter, parts, scale, turn=turn))

    def _check_magnitude(
        self, adapter: Adapter, module: str, own: str, parts: Parts, *, turn: bool
    ) -> None:
        """DoRA's norms are there where the config says so, one per row."""
        is_dora, found = bool(adapter.config.get("use_dora")), parts.get(MAGNITUDE)
        if is_dora != (found is not None):
            there = "there is no" if is_dora else "there is a"
            problem = f"{module}: use_dora is {is_dora}, and {there} {MAGNITUDE}"
            raise adapter.error(problem, "download it again")
        if found is not None and turn:
            problem = f"{module}: DoRA of an embedding or Conv1D is not merged here"
            raise adapter.error(problem, MERGE_YOURSELF)
        if found is not None and found.shape != self._shape(own)[:1]:
            raise self._misfit(adapter, found.name, found.shape, own)

    def _add_bias(self, adapter: Adapter, module: str, parts: Parts) -> None:
        """The bias of B (lora_bias): scale times it is added to the module's own."""
        own, bias = self._names.find(f"{module}.bias"), parts[BIAS]
        if own is None or self._shape(own) != bias.shape:
            there = "no bias" if own is None else f"one of {self._shape(own)}"
            problem = (
                f"{module}: its B has a bias of {bias.shape}, the base has {there}"
            )
            raise adapter.error(problem, adapter.right_base)
        self._check(adapter, own)
        scale = adapter.scale(module, parts["lora_A"].shape[0])

        self._add_step(own, bias_step(adapter, bias, scale))

    def _change_rows(
        self, adapter: Adapter, module: str, own: str, rows: TensorHeader
    ) -> None:
        """Rows of single tokens (trainable_token_indices)."""
        told = adapter.config.get("trainable_token_indices")
        if isinstance(told, dict):
            told = next(
                (v for k, v in told.items() if f".{module}".endswith(f".{k}")), None
            )
        shape = self._shape(own)
        if (
            not isinstance(told, list)
            or not all(type(i) is int and 0 <= i < shape[0] for i in told)
            or rows.shape != (len(told), *shape[1:])
        ):
            problem = f"{module}: trainable_token_indices do not fit {rows.shape}"
            raise adapter.error(problem, adapter.right_base)
        self._add_step(own, rows_step(adapter, rows, told))

    def _change_experts(self, adapter: Adapter, module: str, parts: Parts) -> None:
        """Experts that the model in memory has in one tensor (target_parameters)."""
        if sorted(parts) != [*LINEAR]:
            problem = f"{module} has {', '.join(sorted(parts))}, not an A and a B"
            raise adapter.error(problem, MERGE_YOURSELF)
        a, b = _checked_product(adapter, module, *(parts[end].shape for end in LINEAR))
        architecture = self._base.identity.hf_architecture
        module = module.removesuffix(".base_layer")
        for end in expert_parameters(adapter, module):
            parameter = f"{module}.{end}"
            experts = Experts.find(
                self._names, parameter, b[0], architecture, self._shape
            )
            if experts is None or not experts.fit(a, b, self._shape):
                continue
            scale = adapter.scale(parameter, a[0] // experts.count)
            for place in experts.places:
                self._check(adapter, place.tensor)
                step = experts.step(adapter, parts, place, scale)
                self._add_step(place.tensor, step)
            return
        raise adapter.error(
            f"{module}: A is {a} and B {b}, which fit no matrix of the base's experts",
            adapter.right_base,
        )

    def _add_step(self, own: str, step: Step) -> None:
        if own not in self.by_name:
            self.by_name[own] = Target(*self._found[own])
        self.by_name[own].steps.append(step)

    def _check(self, adapter: Adapter, own: str) -> None:
        """A tensor can be merged into; what is tied to it is told."""
        dtype = self._found[own][1].dtype
        if dtype not in FLOAT_DTYPES:
            raise adapter.error(
                f"the base's {own} is {dtype}, and only {', '.join(FLOAT_DTYPES)} are "
                "merged into",
                "give the BF16 or F16 checkpoint that the base was made from",
            )
        note = f"{own} is also the head: what is merged into it changes both"
        if own == self._names.embedding and self._names.head is None:
            self.notes += [] if note in self.notes else [note]

    def _check_vocabulary(self, adapter: Adapter) -> None:
        """The embedding and the head have one row per token, both of them."""
        embedding, head = self._names.embedding, self._names.head
        if embedding is None or head is None:
            return
        rows = {name: self._shape(name)[0] for name in (embedding, head)}
        before = {name: self._found[name][1].shape[0] for name in rows}
        if len(set(rows.values())) > 1 and len(set(before.values())) == 1:
            told = " and ".join(f"{name} with {n} rows" for name, n in rows.items())
            remedy = "save it with save_embedding_layers=True"
            raise adapter.error(f"leaves {told}", remedy)

    def _misfit(
        self, adapter: Adapter, name: str, found: tuple[int, ...], own: str
    ) -> InputError:
        return adapter.error(
            f"{name} is for {found}, the base's {own} has shape {self._shape(own)}",
            adapter.right_base,
        )


def _checked_product(
    adapter: Adapter, module: str, a: tuple[int, ...], b: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
        problem = f"{module}: A is {a} and B {b}, which make no product of matrices"
        raise adapter.error(problem, MERGE_YOURSELF)
    return a, b

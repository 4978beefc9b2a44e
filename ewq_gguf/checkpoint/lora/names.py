"""How weights of a model in memory are called in its checkpoint.

An adapter has the names of the model in memory; a checkpoint may have older ones, or
those of the text model alone, and single experts where the model has all in one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

#: The start of a name in memory and of the same one in a checkpoint, in the order in
#: which they are tried.
_STARTS = (
    ("", ""),
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "model.language_model."),
    ("model.", "language_model.model."),
    ("model.", ""),
    ("transformer.", ""),
    ("", "model."),
    ("", "transformer."),
)
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
_HEADS = ("lm_head", "embed_out", "output")
#: Modules with all experts, and how a checkpoint may call them.
_EXPERTS = (("", ""), (".mlp.experts.", ".block_sparse_moe.experts."))
#: Matrices of one expert in a checkpoint: the gate, the one beside it, the last one.
_EXPERT_MATRICES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@dataclass(frozen=True)
class Names:
    """The names of a checkpoint's tensors.

    Attributes:
        all: All names.
        embedding: the token embedding's; None where none is known here.
        head: the output head's; None where the embedding serves as one.
    """

    all: Collection[str]
    embedding: str | None
    head: str | None

    @classmethod
    def of(cls, names: Collection[str]) -> Names:
        """Look for the embedding and the head among all names."""
        return cls(names, _only(names, _EMBEDDINGS), _only(names, _HEADS))

    def find(self, name: str) -> str | None:
        """The checkpoint's name of a tensor of the model in memory."""
        for start, own in _STARTS:
            if name.startswith(start):
                found = own + name[len(start) :]
                if found in self.all:
                    return found
        # Without a head of its own a model has the embedding as its head.
        return self.embedding if is_of(name, _HEADS) and not self.head else None

    def find_experts(self, name: str) -> str | None:
        """The name of all experts' matrix in one, such as `mlp.experts.down_proj`."""
        for here, there in _EXPERTS:
            if found := self.find(name.replace(here, there) if here else name):
                return found
        return None

    def find_each_expert(self, module: str) -> list[tuple[str, str, str]]:
        """The three matrices of each expert of a module, where they are single ones."""
        for gate, up, down in _EXPERT_MATRICES:
            experts: list[tuple[str, str, str]] = []
            while True:
                names = [
                    self.find_experts(f"{module}.{len(experts)}.{matrix}.weight")
                    for matrix in (gate, up, down)
                ]
                if None in names:
                    break
                experts.append((str(names[0]), str(names[1]), str(names[2])))
            if experts:
                return experts
        return []


def is_embedding(name: str) -> bool:
    """Whether a tensor of the model in memory is its token embedding."""
    return is_of(name, _EMBEDDINGS)


def is_of(name: str, modules: Iterable[str]) -> bool:
    """Whether a weight's module is called like one of some."""
    return name.endswith(".weight") and name.split(".")[-2] in modules


def _only(names: Iterable[str], modules: Iterable[str]) -> str | None:
    """The one weight whose module is called so; None for none or several."""
    found = [n for n in names if is_of(n, modules) and "vision" not in n]
    return found[0] if len(found) == 1 else None

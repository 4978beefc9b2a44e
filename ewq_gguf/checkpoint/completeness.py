"""Whether a checkpoint holds every tensor that its config promises.

The rules need names alone, so they hold before a weight is read or anything is
converted. They are strict where a family's layers are known to be alike and careful
elsewhere: hybrids have layers of several kinds, and a first layer may be special.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.other_tensors import is_buffer
from ewq_gguf.errors import InputError
from ewq_gguf.tensor_names import ARCHITECTURES, can_be, has_role

_IN_LAYER = re.compile(r"(.+?)\.(\d+)\.(.+)")
_LAYER_LISTS = frozenset(
    {"layers", "h", "blocks", "block", "layer", "decoder_layer", "blk"}
)
#: Parts of a model that are no layers of its language model.
_OTHER_PARTS = re.compile(
    r"vis|audio|image|speech|mtp|talker|wav|projector|connector|resampler|merger|vit"
)
_EXPERT = re.compile(r"(?:^|(.*)\.)experts\.(\d+)\.(.+)")
_EXPERT_KEYS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
)  # fmt: skip
#: What a quantised weight has beside its codes, and one that was left as it is has not.
_COMPANION = re.compile(
    r"(_scale|_scale_inv|_scale_2|_scales|_zero_point|_shape|_global_scale"
    r"|\.scales|\.qzeros|\.g_idx|\.qscale_act|\.qscale_weight)$"
)
_CODES = re.compile(r"(weight_packed|qweight)$")
_NORM = re.compile(r"norm|(^|[._])ln(_|\d|$)")
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_SHOWN = 4


@dataclass(frozen=True)
class Layers:
    """The layers of a language model, by their tensors' names.

    Attributes:
        prefix: The beginning of their tensors' names, such as `model.layers`.
        names: by layer, what follows its number in the names of its tensors;
            experts are left out.
        experts: by layer and list of experts, the names of each expert's tensors.
    """

    prefix: str
    names: Mapping[int, frozenset[str]]
    experts: Mapping[int, Mapping[str, Mapping[int, frozenset[str]]]]


def check_complete(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that lacks tensors: half of a model makes no file.

    Raises:
        InputError: naming what is missing, and how many tensors.
    """
    names = [t.name for _, t in checkpoint.tensors if t.n_weights and not is_buffer(t)]
    is_embedder = "modules.json" in checkpoint.small_files
    identity = checkpoint.identity
    missing = missing_tensors(
        names,
        identity.hf_architecture,
        identity.n_layers,
        checkpoint.config,
        has_head=not is_embedder,
    )
    if not missing:
        return
    shown = ", ".join(
        "every layer" if name == "*" else name if count == 1 else f"{name} ({count})"
        for name, count in missing[:_SHOWN]
    )
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    total = sum(count for _, count in missing)
    raise InputError(
        "scan",
        checkpoint.folder,
        f"half a checkpoint: {total} of {total + len(names)} tensors that "
        f"{identity.hf_architecture} with {identity.n_layers} layers needs "
        f"{'is' if total == 1 else 'are'} missing: {shown}{more}",
        "download it again, or merge or save the model again",
    )


def missing_tensors(
    names: Collection[str],
    architecture: str,
    n_layers: int,
    config: Mapping[str, Any],
    *,
    has_head: bool = True,
) -> list[tuple[str, int]]:
    """Find the tensors that a checkpoint lacks, by the names that it has.

    Args:
        names: the names of its tensors; buffers are left out.
        architecture: The architecture in config.json, or in a GGUF.
        n_layers: The number of layers of the model.
        config: config.json; empty for a GGUF.
        has_head: whether a model without an output matrix would be incomplete.

    Returns:
        Names, and how many tensors each stands for: 1, or all of a layer's
        (`model.layers.2.*`).
    """
    names = {_CODES.sub("weight", n) for n in names if not _COMPANION.search(n)}
    all_layers = language_layers(names, architecture)
    found = [] if all_layers or not _is_uniform(architecture) else [("*", n_layers)]
    found += [
        entry
        for layers in all_layers
        for entry in _missing_in_layers(layers, architecture, n_layers, config)
    ]
    if _is_uniform(architecture) or architecture.endswith(_CAUSAL):
        is_tied = not has_head or _is_tied(config)
        top = _missing_at_top(names, architecture, is_tied=is_tied)
        found += [(name, 1) for name in top]
    return found


def language_layers(names: Iterable[str], architecture: str) -> list[Layers]:
    """The layers of the language model; an encoder-decoder has two lists of them."""
    lists: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        if match := _IN_LAYER.fullmatch(name):
            prefix, index, rest = match.groups()
            is_list = prefix.rpartition(".")[2] in _LAYER_LISTS
            if is_list and not _OTHER_PARTS.search(prefix):
                lists[prefix][int(index)].append(rest)
    if not lists:
        return []
    size = {prefix: sum(map(len, found.values())) for prefix, found in lists.items()}
    largest = max(sorted(lists), key=size.__getitem__)
    chosen = [largest]
    if "T5" in architecture:
        chosen = [p for p in sorted(lists) if re.search(r"(en|de)coder\.block$", p)]
    return [_layers(prefix, lists[prefix]) for prefix in chosen or [largest]]


def _layers(prefix: str, found: Mapping[int, Iterable[str]]) -> Layers:
    names, experts = {}, {}
    for index, rests in found.items():
        plain: set[str] = set()
        own: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for rest in rests:
            if match := _EXPERT.fullmatch(rest):
                own[f"{match[1]}." if match[1] else ""][int(match[2])].add(match[3])
            else:
                plain.add(rest)
        names[index] = frozenset(plain)
        experts[index] = {
            where: {expert: frozenset(rest) for expert, rest in lists.items()}
            for where, lists in own.items()
        }
    return Layers(prefix, names, experts)


def _missing_in_layers(
    layers: Layers, architecture: str, n_layers: int, config: Mapping[str, Any]
) -> Iterator[tuple[str, int]]:
    if layers.prefix.startswith("decoder."):
        n_layers = config.get("num_decoder_layers") or n_layers
    if not config:  # a GGUF's number of layers counts those that predict further tokens
        n_layers = min(n_layers, max(layers.names) + 1)
    sizes = Counter(
        len(names) + sum(len(found) for found in layers.experts[index].values())
        for index, names in layers.names.items()
    )
    for index in sorted(set(range(n_layers)) - layers.names.keys()):
        yield f"{layers.prefix}.{index}.*", sizes.most_common(1)[0][0]
    for index, rest in chain(
        _missing_of_layers(
            layers.names, n_layers, is_uniform=_is_uniform(architecture)
        ),
        _missing_of_experts(layers, config),
    ):
        yield f"{layers.prefix}.{index}.{rest}", 1


def _missing_of_layers(
    layers: Mapping[int, frozenset[str]], n_layers: int, *, is_uniform: bool
) -> Iterator[tuple[int, str]]:
    """The tensors that a layer lacks and the others have.

    Where all layers are alike, that is what most of them have. Elsewhere a single layer
    is at fault that has nothing of its own and lacks what all others have: several may
    be of another kind, and so may the first.
    """
    layers = {i: names for i, names in sorted(layers.items()) if i < n_layers}
    counts = Counter(rest for names in layers.values() for rest in names)
    for index, names in layers.items():
        is_plain = index > 0 and all(counts[rest] > 1 for rest in names)
        for rest, count in sorted(counts.items()):
            is_only_one = is_plain and count == len(layers) - 1 > 1
            if rest not in names and (
                is_only_one or (is_uniform and 2 * count >= len(layers))
            ):
                yield index, rest


def _missing_of_experts(
    layers: Layers, config: Mapping[str, Any]
) -> Iterator[tuple[int, str]]:
    stated = next(
        (
            source[key]
            for source in (config.get("text_config"), config)
            if isinstance(source, dict)
            for key in _EXPERT_KEYS
            if type(source.get(key)) is int
        ),
        0,
    )
    for index, lists in sorted(layers.experts.items()):
        for where, experts in lists.items():
            count = max(stated, max(experts) + 1)
            roles = frozenset().union(*experts.values())
            for expert in range(count):
                for rest in sorted(roles - experts.get(expert, frozenset())):
                    yield index, f"{where}experts.{expert}.{rest}"


def _missing_at_top(
    names: Collection[str], architecture: str, *, is_tied: bool
) -> Iterator[str]:
    """The embedding, the last norm, the output matrix; of decoders only."""
    is_gguf = architecture in ARCHITECTURES.values()
    top = [name for name in names if not _IN_LAYER.fullmatch(name)]
    has_norms = any(_NORM.search(name) for name in names if name not in top)
    prefix = "model." if any(name.startswith("model.") for name in names) else ""
    if _is_uniform(architecture):
        gguf_architecture = ARCHITECTURES.get(architecture, architecture)
        if not any(has_role(name, "token_embd") for name in top):
            yield "token_embd.weight" if is_gguf else f"{prefix}embed_tokens.weight"
        has_norms = has_norms and can_be(gguf_architecture, "output_norm")
        is_normed = any(has_role(name, "output_norm") for name in top)
    else:
        is_normed = any(_NORM.search(name) for name in top)
    if has_norms and not is_normed:
        yield "output_norm.weight" if is_gguf else f"{prefix}norm.weight"
    # Weights that were saved without their head lack the prefix too.
    if prefix and not is_tied and not any(has_role(name, "output") for name in top):
        yield "lm_head.weight"


def _is_uniform(architecture: str) -> bool:
    """Whether all layers of the family are alike; by its name there or in a GGUF."""
    return architecture in {*ARCHITECTURES, *ARCHITECTURES.values()}


def _is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the embedding is the output matrix too; so unless it says otherwise."""
    text = config.get("text_config")
    sources = [config, text if isinstance(text, dict) else {}]
    stated = [s["tie_word_embeddings"] for s in sources if "tie_word_embeddings" in s]
    return not stated or any(stated)

"""Tensors that are no weights of the model they lie beside, and where they come from.

Adapters, the states of quantisers and optimisers, wrappers' prefixes: each is known by
its names, so the true cause is said before anything is read or converted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ewq_gguf.checkpoint.files import read_json_object
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.fp8 import quantisation_of
from ewq_gguf.checkpoint.header import TensorHeader
from ewq_gguf.checkpoint.model_config import ADAPTER_CONFIG, adapter_error
from ewq_gguf.checkpoint.other_tensors import FLOATS, is_buffer
from ewq_gguf.errors import InputError
from ewq_gguf.tensor_names import ARCHITECTURES, gguf_name

_UNQUANTISED = (
    "use the BF16 or F16 checkpoint it was made from, or dequantise and save the model"
)
_ADAPTER = re.compile(r"\b(lora_|loha_|lokr_|hada_|ia3_|oft_|vera_lambda|prompt_emb)")
#: Models that have adapters of their own, which the converter reads.
_WITH_ADAPTERS = ("GraniteSwitchForCausalLM", "XLMRobertaModel")


@dataclass(frozen=True)
class _Leftover:
    """Names of one origin.

    Attributes:
        names: The pattern that is searched for in a name.
        problem: The fault of the checkpoint; `{n}` and `{first}` are filled in.
        remedy: The way to mend it.
        is_quantiser: whether a `quantization_config` explains them.
    """

    names: re.Pattern[str]
    problem: str
    remedy: str
    is_quantiser: bool = False


def _quantised(names: str, method: str) -> _Leftover:
    problem = f"is quantised ({method}: {{first}}), and config.json does not say so"
    return _Leftover(re.compile(names), problem, _UNQUANTISED, is_quantiser=True)


_LEFTOVERS = (
    _Leftover(
        re.compile(r"\.base_layer\.|^base_model\.model\."),
        "was saved from a PEFT model with its adapter beside the weights ({first})",
        "call merge_and_unload() before save_pretrained()",
    ),
    _Leftover(
        _ADAPTER,
        "holds tensors of an adapter beside the weights ({n}, such as {first})",
        "merge the adapter with merge_and_unload() and save again; where it is merged "
        "already, remove them",
    ),
    _quantised(r"\.(SCB|weight_format)$", "bitsandbytes, 8 bits"),
    _quantised(
        r"\.(nested_)?(absmax|quant_map)$|\.quant_state\.", "bitsandbytes, 4 bits"
    ),
    _quantised(r"\.g_idx$", "GPTQ"),
    _quantised(r"\.(qweight|qzeros)$", "GPTQ or AWQ"),
    _quantised(r"\.(W_q|W_nbits|zero_scale)$", "HQQ"),
    _quantised(r"\.weight\.(_data|_scale|_shift)$|\._qdata$", "quanto"),
    _Leftover(
        re.compile(r"(^|\.)_orig_mod\."),
        "was saved from a compiled model ({n} names with _orig_mod, such as {first})",
        "save model._orig_mod, or rename the tensors",
    ),
    _Leftover(
        re.compile(r"(^|\.)_(fsdp|checkpoint)_wrapped_module\.|^_fsdp|\._flat_param"),
        "was saved from wrapped modules ({n} names such as {first})",
        "gather the model's full state dict and save that",
    ),
    _Leftover(
        re.compile(r"^module\."),
        "was saved from DistributedDataParallel's or DeepSpeed's wrapper ({n} names "
        "such as {first})",
        "save model.module, or rename the tensors",
    ),
    _Leftover(
        re.compile(
            r"^optimizer|(^|\.)(exp_avg|exp_avg_sq|momentum_buffer|max_exp_avg_sq)(\.|$)"
        ),
        "holds states of an optimiser ({n} tensors, such as {first})",
        "save the model alone, with save_pretrained()",
    ),
    _Leftover(
        re.compile(r"^(ema|model_ema|ema_model)\.|\.ema(_|\.|$)"),
        "holds averaged copies of weights (EMA: {n} tensors, such as {first})",
        "save the copy you want alone, under the model's own names",
    ),
    _Leftover(
        re.compile(r"^v_head\.|^value_head\."),
        "holds a value head of reinforcement learning ({first})",
        "save model.pretrained_model, which leaves it out",
    ),
)


def check_names(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint with tensors that no model of its kind has.

    Raises:
        InputError: an adapter, quantised weights, a wrapper's names, other leftovers.
    """
    identity = checkpoint.identity
    if identity.is_gguf or identity.hf_architecture in _WITH_ADAPTERS:
        return
    tensors = [tensor for _, tensor in checkpoint.tensors if not is_buffer(tensor)]
    names = [tensor.name for tensor in tensors]
    if names and all(map(_ADAPTER.search, names)):
        raise _adapter(checkpoint, names)
    for leftover in _LEFTOVERS:
        matches = [name for name in names if leftover.names.search(name)]
        if matches and not (leftover.is_quantiser and is_quantised(checkpoint)):
            problem = leftover.problem.format(n=len(matches), first=matches[0])
            raise InputError("scan", checkpoint.folder, problem, leftover.remedy)
    _check_integers(checkpoint, tensors)
    architecture = ARCHITECTURES.get(identity.hf_architecture)
    if architecture and checkpoint.is_mapped_by_name:
        lost = [
            name
            for name in names
            if gguf_name(architecture, identity.n_layers, name) is None
        ]
        if lost:
            raise no_place(checkpoint, lost)


def no_place(checkpoint: Checkpoint, names: Sequence[str]) -> InputError:
    """The error for tensors that the model's GGUF has no place for.

    Args:
        checkpoint: they are in.
        names: The names of the tensors, at least one.
    """
    identity = checkpoint.identity
    layers = {int(m[1]) for name in names if (m := re.search(r"\.(\d+)\.", name))}
    beyond = [layer for layer in layers if layer >= identity.n_layers]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    if beyond:
        return InputError(
            "scan",
            checkpoint.folder,
            f"config.json says {identity.n_layers} layers, the weights have "
            f"{max(beyond) + 1}: {names[0]}{more}",
            "take config.json and the weights of one model",
        )
    return InputError(
        "scan",
        checkpoint.folder,
        f"{names[0]}{more} {'have' if more else 'has'} no place in a GGUF of "
        f"{identity.hf_architecture}",
        "check architectures in config.json; remove what is no weight of the model",
    )


def is_quantised(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint says that its weights are codes, or they are FP8."""
    told = quantisation_of(checkpoint.folder, checkpoint.config)
    return checkpoint.fp8 is not None or bool(told)


def _check_integers(checkpoint: Checkpoint, tensors: Collection[TensorHeader]) -> None:
    """Whole numbers under a matrix's name are codes, whoever made them."""
    codes = [
        tensor
        for tensor in tensors
        if tensor.dtype not in FLOATS
        and tensor.name.endswith(".weight")
        and len(tensor.shape) > 1
    ]
    if codes and not is_quantised(checkpoint):
        raise InputError(
            "scan",
            checkpoint.folder,
            f"is quantised ({len(codes)} matrices of whole numbers, such as "
            f"{codes[0].name} {codes[0].dtype}), and config.json does not say how",
            _UNQUANTISED,
        )


def _adapter(checkpoint: Checkpoint, names: Sequence[str]) -> InputError:
    values = {}
    if ADAPTER_CONFIG in checkpoint.small_files:
        values = read_json_object(checkpoint.folder, ADAPTER_CONFIG)
    return adapter_error(checkpoint.folder, values, f" ({names[0]})")

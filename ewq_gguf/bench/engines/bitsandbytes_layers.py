"""bitsandbytes' layers in a transformers model: put there, written, and read again.

Only child processes import this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ewq_gguf.bench.engines.precision import Precision
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.errors import InputError, VerificationError

#: Activations beyond it are multiplied in 16 bits: transformers' default, and that of
#: the LLM.int8() paper (arXiv:2208.07339 section 3.2).
INT8_THRESHOLD = 6.0
#: Weights that share a scale in nf4, and rows that the CPU's kernel packs together.
_NF4_BLOCK, _PACKED_ROWS = 64, 32

_WEIGHT = ".weight"
_INT8_MARK = ".SCB"
_NF4_MARK = ".weight.quant_state.bitsandbytes__nf4"


def quantise(
    model: Any, precisions: Mapping[str, Precision], device: torch.device
) -> int:
    """Replace a model's Linear modules; the rest of it stays where it is.

    Args:
        model: a model of transformers, on the CPU.
        precisions: by the names of parameters.
        device: where the new modules go.

    Returns:
        How many of the parameters are embeddings, which stay as they are.

    Raises:
        InputError: a parameter is no Linear module's and no embedding.
    """
    modules = dict(model.named_modules())
    n_kept = 0
    for name, precision in precisions.items():
        module = modules.get(name.removesuffix(_WEIGHT))
        if isinstance(module, nn.Embedding):
            n_kept += 1
            continue
        if not name.endswith(_WEIGHT) or not isinstance(module, nn.Linear):
            kind = "no module" if module is None else f"a {type(module).__name__}"
            raise InputError(
                STAGE,
                name,
                f"is {kind} in transformers, and bitsandbytes quantises Linear only",
                "plan it raw",
            )
        layer = _empty_layer(module, precision)
        weight = module.weight.data
        if precision == "int8":
            parameter = bnb.nn.Int8Params(weight, requires_grad=False)
        else:
            parameter = bnb.nn.Params4bit(
                weight,
                requires_grad=False,
                quant_type="nf4",
                compress_statistics=False,
                blocksize=_NF4_BLOCK,
                module=layer,
            )
        layer.weight = parameter.to(device)
        layer.bias = module.bias
        model.set_submodule(name.removesuffix(_WEIGHT), layer)
    return n_kept


def move_rest(model: Any, device: torch.device) -> None:
    """Move what is not quantised; bitsandbytes' weights are on the device already."""
    for module in model.modules():
        is_quantised = isinstance(module, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit)
        if is_quantised and module.bias is not None:
            module.bias.data = module.bias.data.to(device)
        elif not is_quantised:
            module._apply(lambda tensor: tensor.to(device), recurse=False)


def count_modules(model: Any) -> dict[str, int]:
    """Linear modules by what they are: `int8`, `nf4` or `raw`."""
    kinds = Counter[str]()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            kinds["int8"] += 1
        elif isinstance(module, bnb.nn.Linear4bit):
            kinds["nf4"] += 1
        elif isinstance(module, nn.Linear):
            kinds["raw"] += 1
    return dict(kinds)


def stored(model: Any) -> dict[str, torch.Tensor]:
    """A model's parameters, buffers and statistics, what is shared only once.

    Call it before the first forward pass: on some CPUs that packs 4-bit weights anew.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() == 0 or place not in seen:
            tensors[name] = tensor
        seen.add(place)
    return tensors


def write(model: Any, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a model's weights into a file."""
    tensors = {name: tensor.contiguous() for name, tensor in stored(model).items()}
    save_file(tensors, path, metadata=dict(metadata))


def read(model: Any, path: Path, device: torch.device) -> None:
    """Fill a model that has no weights yet from such a file.

    Args:
        model: made under `no_weights`.
        path: the file.
        device: where all of it goes.

    Raises:
        VerificationError: the file is of another model.
    """
    with safe_open(path, framework="pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    modules = dict(model.named_modules())
    for mark, precision in ((_INT8_MARK, "int8"), (_NF4_MARK, "nf4")):
        for name in [n.removesuffix(mark) for n in tensors if n.endswith(mark)]:
            if not isinstance(modules.get(name), nn.Linear):
                raise _of_another_model(path, name)
            layer = _empty_layer(modules[name], precision)
            data = tensors.pop(name + _WEIGHT)
            if precision == "int8":
                tensors.pop(f"{name}.weight_format")
                layer.weight = bnb.nn.Int8Params(
                    data, requires_grad=False, CB=data, SCB=tensors.pop(name + mark)
                )
            else:
                prefix = f"{name}{_WEIGHT}."
                keys = [key for key in tensors if key.startswith(prefix)]
                layer.weight = bnb.nn.Params4bit.from_prequantized(
                    data,
                    {key.removeprefix(prefix): tensors.pop(key) for key in keys},
                    device=device,
                    module=layer,
                )
            # Its bias, where it has one, comes with the rest.
            model.set_submodule(name, layer)
    left = model.load_state_dict(tensors, strict=False, assign=True)
    if left.unexpected_keys:
        raise _of_another_model(path, left.unexpected_keys[0])
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise _of_another_model(path, name)
    move_rest(model, device)


@contextmanager
def no_weights() -> Iterator[None]:
    """Modules made in this block have parameters without memory, but real buffers.

    Buffers that no file holds, such as the frequencies of positions, are computed when
    a module is made.
    """
    every: Any = nn.Module
    register = every.register_parameter

    def on_meta(module: Any, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None:
            empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
            module._parameters[name] = empty

    every.register_parameter = on_meta
    try:
        yield
    finally:
        every.register_parameter = register


def _empty_layer(linear: Any, precision: str) -> Any:
    """The layer that takes a Linear's place, its weight still to come."""
    shape = (linear.in_features, linear.out_features, linear.bias is not None)
    if precision == "int8":
        layer = bnb.nn.Linear8bitLt(
            *shape, has_fp16_weights=False, threshold=INT8_THRESHOLD, device="meta"
        )
        return layer.eval()
    layer = bnb.nn.Linear4bit(
        *shape,
        compute_dtype=linear.weight.dtype,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    # The CPU's own kernel takes whole blocks only, and fails on others.
    if linear.in_features % _NF4_BLOCK or linear.out_features % _PACKED_ROWS:
        layer.support_avx512bf16_for_cpu = False
    return layer.eval()


def _of_another_model(path: Path, name: str) -> VerificationError:
    problem = f"does not fit its config.json: {name}"
    return VerificationError(STAGE, path, problem, "save it again")

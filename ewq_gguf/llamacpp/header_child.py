"""Child process: the header of the GGUF the converter would make, and its sources.

Run with the converter's folder and its own gguf-py on PYTHONPATH. It does what the
converter's `ModelBase.write` does, up to and without the tensors' data. The converter
works on lazy tensors, so the graph behind each GGUF tensor tells which checkpoint
tensors feed it; no weight is read for that.

    python -m ewq_gguf.llamacpp.header_child STAGED NAME OUTTYPE OUT SOURCES [FLAG...]

OUT is the header; SOURCES is JSON: for each GGUF tensor its name, whether its weights
are `moved` only, and its sources, each as {"file", "offset", "box"}. `offset` is the
checkpoint tensor's first byte in its file, `box` the part of it that is used: one
[start, stop, step] per dimension, or null for all of it. A FLAG is one of the
converter's own that choose what it writes.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from ewq_gguf.llamacpp.left_out_child import leave_out
from ewq_gguf.llamacpp.pre_child import use_named_pre

Box = list[list[int]]
Key = tuple[str, int]

#: Functions of torch that move or widen weights and compute none.
_MOVES = frozenset({
    "__getitem__", "broadcast_to", "cat", "chunk", "concat", "concatenate",
    "contiguous", "expand", "flatten", "float", "flip", "movedim", "narrow", "numpy",
    "permute", "repeat_interleave", "reshape", "select", "split", "squeeze", "stack",
    "swapaxes", "t", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view",
})  # fmt: skip


def main(
    staged: Path,
    name: str,
    outtype: str,
    out: Path,
    sources: Path,
    flags: Sequence[str] = (),
) -> None:
    """Write the header of `staged`'s GGUF to `out`, and its sources."""
    import gguf
    import torch

    logging.basicConfig(level=logging.INFO)
    leave_out()
    use_named_pre()
    ftypes = {
        "F32": gguf.LlamaFileType.ALL_F32,
        "F16": gguf.LlamaFileType.MOSTLY_F16,
        "BF16": gguf.LlamaFileType.MOSTLY_BF16,
        "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    with torch.inference_mode():
        model_class = _model_class(staged, flags)
        model = model_class(staged, ftypes[outtype], out, model_name=name)
        writer = model.gguf_writer
        written: dict[str, Any] = {}
        add_tensor = writer.add_tensor

        def record(name: str, tensor: Any, *args: Any, **kwargs: Any) -> None:
            written[name] = tensor
            add_tensor(name, tensor, *args, **kwargs)

        writer.add_tensor = record
        model.prepare_tensors()
        model.prepare_metadata(vocab_only=False)
        writer.write_header_to_file(path=out)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        sources.write_text(json.dumps(_sources(written, staged)))


def _model_class(staged: Path, flags: Sequence[str]) -> Any:
    """The converter's class for a checkpoint, told what the flags tell.

    Raises:
        SystemExit: the class has no such choice.
    """
    from conversion import (  # type: ignore[import-not-found]
        ModelBase,
        ModelType,
        get_model_architecture,
        get_model_class,
    )

    is_mmproj = "--mmproj" in flags
    hparams = ModelBase.load_hparams(staged, False)
    architecture = get_model_architecture(
        hparams, ModelType.MMPROJ if is_mmproj else ModelType.TEXT
    )
    model_class: Any = get_model_class(architecture, mmproj=is_mmproj)
    for flag, attribute in (("--mtp", "mtp_only"), ("--no-nextn", "no_mtp")):
        if flag in flags:
            if not model_class.supports_mtp_export:
                raise SystemExit(f"{flag} is not supported for {architecture}")
            setattr(model_class, attribute, True)
    return model_class


def _sources(written: dict[str, Any], staged: Path) -> list[dict[str, Any]]:
    """Each GGUF tensor's sources, in the order they were combined."""
    scales = _scales(staged)
    leaves = {name: list(_leaves(tensor)) for name, tensor in written.items()}
    uses = Counter(_key(leaf) for found in leaves.values() for leaf in found)
    result = []
    for name, tensor in written.items():
        entries = [
            {"file": _key(leaf)[0], "offset": _key(leaf)[1], "box": box}
            for leaf in leaves[name]
            for box in (
                _boxes(tensor, leaf, scales)
                if uses[_key(leaf)] > 1 and _key(leaf) not in scales
                else [None]
            )
        ]
        moved = _is_moved(tensor)
        result.append({"name": name, "moved": moved, "sources": entries})
    return result


def _is_moved(node: Any) -> bool:
    """Whether the weights of a GGUF tensor are the files', only in another order."""
    import gguf

    todo: list[Any] = [_torch_node(node)]
    while todo:
        item = todo.pop()
        if isinstance(item, (list, tuple)):
            todo.extend(item)
        elif isinstance(item, gguf.LazyBase):
            is_leaf = any(isinstance(a, gguf.utility.LocalTensor) for a in item._args)
            if not is_leaf and _function_name(item._func) not in _MOVES:
                return False
            todo.extend(() if is_leaf else item._args)
        elif type(item).__name__ == "Tensor":
            return False  # a constant takes part
    return True


def _function_name(function: Any) -> str:
    """The name of the function that a node of the graph calls.

    gguf's LazyBase wraps it: a method is called by a lambda that holds its `name`, and
    one of several results is taken by a function that holds `fn`.
    """
    code = getattr(function, "__code__", None)
    if code is not None:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        held = dict(zip(code.co_freevars, cells, strict=True))
        if "fn" in held:
            return _function_name(held["fn"])
        if "name" in held:
            return str(held["name"])
    return getattr(function, "__name__", "")


def _scales(staged: Path) -> set[Key]:
    """The tensors that hold scales, which go wherever their weight goes."""
    import gguf

    return {
        _key(tensor)
        for path in staged.glob("*.safetensors")
        for name, tensor in gguf.utility.SafetensorsLocal(path).tensors.items()
        if name.endswith(("_scale", "_scale_inv"))
    }


def _key(leaf: Any) -> Key:
    return Path(leaf.data_range.filename).name, int(leaf.data_range.offset)


def _leaves(node: Any) -> Iterator[Any]:
    """The files' tensors that a lazy tensor is made of, each once."""
    import gguf

    seen: set[int] = set()
    found: dict[Key, Any] = {}
    todo = [node]
    while todo:
        item = todo.pop()
        if isinstance(item, gguf.utility.LocalTensor):
            found.setdefault(_key(item), item)
        elif isinstance(item, (list, tuple)):
            todo.extend(reversed(item))
        elif isinstance(item, gguf.LazyBase) and id(item) not in seen:
            seen.add(id(item))
            todo.append(item._args)
    yield from found.values()


def _boxes(node: Any, leaf: Any, scales: set[Key]) -> list[Box | None]:
    """The parts of a file's tensor that reach a GGUF tensor.

    The graph is evaluated with the source replaced by its own indices along one
    dimension at a time: what arrives says what was taken. Rows that are taken
    head by head make several boxes.

    Raises:
        ValueError: the parts are not boxes.
    """
    import torch

    shape = tuple(leaf.shape)
    runs: list[Box] = []
    n_taken = 0
    for dim in range(len(shape)):
        view = [-1 if d == dim else 1 for d in range(len(shape))]
        indices = torch.arange(shape[dim], dtype=torch.float32).view(view).expand(shape)
        arrived = _evaluate(_torch_node(node), leaf, indices, scales, {})
        n_taken = arrived.numel()
        for d in range(arrived.ndim):  # copies of one value, which need no memory
            if arrived.stride(d) == 0:
                arrived = arrived.narrow(d, 0, 1)
        runs.append(_runs(torch.unique(arrived).to(torch.int64).tolist()))
    counts = [sum(len(range(*run)) for run in part) for part in runs]
    if prod(counts) != n_taken:
        raise ValueError(f"{_key(leaf)}: {n_taken} weights are taken, not boxes")
    return [None] if n_taken == prod(shape) else [list(box) for box in product(*runs)]


def _runs(values: list[int]) -> Box:
    """Rising numbers as ranges [start, stop, step], as few as a step allows."""
    runs: Box = []
    start = 0
    while start < len(values):
        end = start + 1
        step = values[end] - values[start] if end < len(values) else 1
        while end < len(values) and values[end] - values[end - 1] == step:
            end += 1
        runs.append([values[start], values[end - 1] + 1, step])
        start = end
    return runs


def _torch_node(node: Any) -> Any:
    """The last torch tensor before numpy: what comes after changes values."""
    import gguf

    while isinstance(node, gguf.LazyNumpyTensor):
        node = next(arg for arg in node._args if isinstance(arg, gguf.LazyBase))
    return node


def _evaluate(
    item: Any, leaf: Any, indices: Any, scales: set[Key], done: dict[int, Any]
) -> Any:
    """A lazy graph's value with a file's tensor replaced by `indices`, scales by 1."""
    import gguf
    import torch

    if isinstance(item, (list, tuple)):
        values = [_evaluate(part, leaf, indices, scales, done) for part in item]
        return tuple(values) if isinstance(item, tuple) else values
    if not isinstance(item, gguf.LazyBase):
        return item
    if id(item) not in done:
        if any(isinstance(a, gguf.utility.LocalTensor) for a in item._args):
            other = item._args[0]
            is_leaf = _key(other) == _key(leaf)
            if not is_leaf and _key(other) not in scales:
                raise ValueError(f"{_key(leaf)}: is combined with another tensor")
            done[id(item)] = indices if is_leaf else torch.ones(tuple(other.shape))
        else:
            args = _evaluate(item._args, leaf, indices, scales, done)
            assert item._func is not None
            done[id(item)] = item._func(*args, **item._kwargs)
    return done[id(item)]


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        sys.argv[2],
        sys.argv[3],
        Path(sys.argv[4]),
        Path(sys.argv[5]),
        sys.argv[6:],
    )

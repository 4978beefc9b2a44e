"""Child process: run the converter without a checkpoint's buffers, and as told.

The converter stops at a tensor that it has no name for. Buffers that PyTorch saved
beside the weights are passed over instead; every other unknown tensor still stops it.

    python -m ewq_gguf.llamacpp.left_out_child convert_hf_to_gguf.py ARGUMENT...

The environment names a JSON file of (name, dtype), so that header_child is told alike;
it may name a pre-tokenizer too.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

from ewq_gguf.llamacpp.pre_child import use_named_pre

VARIABLE = "EWQ_LEFT_OUT"
Modify = Callable[[Any, str, "int | None"], Iterable[Any]]
_UNREADABLE = ("U16", "U32", "U64")  # torch has no such tensors


def leave_out() -> None:
    """Let the converter pass over the tensors that the environment's file names."""
    path = os.environ.get(VARIABLE)
    if path is None:
        return
    from conversion.base import ModelBase  # type: ignore[import-not-found]

    named = dict(json.loads(Path(path).read_text()))
    # The converter takes this part out of names.
    dtypes = named | {n.replace("language_model.", ""): d for n, d in named.items()}
    prepare = ModelBase.prepare_tensors

    def prepare_without(self: Any) -> None:
        for name, dtype in dtypes.items():
            if dtype in _UNREADABLE:
                self.model_tensors.pop(name, None)
        self.modify_tensors = _passing_over(dtypes, self.modify_tensors)
        prepare(self)

    ModelBase.prepare_tensors = prepare_without


def _passing_over(names: Container[str], modify: Modify) -> Modify:
    """The converter's function for one tensor, which gives none for unknown buffers."""

    def modify_known(data: Any, name: str, bid: int | None) -> Iterable[Any]:
        try:
            return list(modify(data, name, bid))
        except ValueError as error:
            if name not in names or "Can not map tensor" not in str(error):
                raise
            return ()

    return modify_known


def main(script: str, arguments: list[str]) -> None:
    """Run the converter's script as Python would."""
    sys.path.insert(0, str(Path(script).parent))
    leave_out()
    use_named_pre()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

"""Child process: import the packages that are there, one after another.

python -m ewq_gguf.doctor.imports_child
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable

from ewq_gguf.packages import installed_version


def _torch_and_numpy() -> None:
    import torch

    # A torch made for another numpy imports and fails here.
    torch.zeros(1).numpy()


def _module(name: str) -> Callable[[], object]:
    return lambda: importlib.import_module(name)


#: What others import comes first: the one that is broken is named.
_IMPORTS: dict[str, Callable[[], object]] = {
    "numpy": _module("numpy"),
    "sentencepiece": _module("sentencepiece"),
    "gguf": _module("gguf"),
    "safetensors": _module("safetensors"),
    "numba": _module("numba"),
    "huggingface_hub": _module("huggingface_hub"),
    "torch": _torch_and_numpy,
    "transformers": _module("transformers.models.auto.tokenization_auto"),
}


def main() -> None:
    """Print `{package: problem}` of those that do not load as the last line."""
    broken = {}
    for name, load in _IMPORTS.items():
        if installed_version(name) is None:
            continue
        sys.stdout.write(f"\n>{name}\n")  # the last one names what crashed
        sys.stdout.flush()
        try:
            load()
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            broken[name] = f"{type(error).__name__}: {first}"
    sys.stdout.write(f"\n{json.dumps(broken)}\n")


if __name__ == "__main__":
    main()

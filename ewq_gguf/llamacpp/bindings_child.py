"""Child process: load the bindings and start llama.cpp's backends.

python -m ewq_gguf.llamacpp.bindings_child
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """Print the path of the library that was loaded as the last line of stdout."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    path = Path(llama_cpp.llama_cpp._lib._name).resolve()
    sys.stdout.write(f"\n{path}\n")


if __name__ == "__main__":
    main()

"""Child process: headers and whole base GGUFs of many checkpoints, one torch import.

Run with the converter's folder and its own gguf-py on PYTHONPATH.

    python -m tests.family_child STAGED_FOLDER...

Beside each staged folder it writes header.gguf, sources.json and base.gguf, or
error.txt where the converter refuses it.
"""

import os
import runpy
import sys
import traceback
from pathlib import Path

from ewq_gguf.llamacpp import header_child, left_out_child


def main(converter: str, folders: list[str]):
    for folder in map(Path, folders):
        out = folder.parent
        os.environ.pop(left_out_child.VARIABLE, None)
        if (out / "left_out.json").exists():
            os.environ[left_out_child.VARIABLE] = str(out / "left_out.json")
        try:
            header_child.main(
                folder, folder.name, "BF16", out / "header.gguf", out / "sources.json"
            )
            sys.argv = [converter, str(folder), "--outfile", str(out / "base.gguf")]
            sys.argv += ["--outtype", "bf16", "--model-name", folder.name]
            runpy.run_path(converter, run_name="__main__")
        except BaseException:
            (out / "error.txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

"""Child process: write the header of the GGUF that the converter would make.

Run with the converter's folder and its own gguf-py on PYTHONPATH. It does what the
converter's `ModelBase.write` does, up to and without the tensors' data.

    python -m ewq_gguf.llamacpp.header_child STAGED NAME OUTTYPE OUT
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any


def main(staged: Path, name: str, outtype: str, out: Path) -> None:
    """Write the header of `staged`'s GGUF to `out`."""
    import gguf
    import torch
    from conversion import (  # type: ignore[import-not-found]
        ModelBase,
        ModelType,
        get_model_architecture,
        get_model_class,
    )

    logging.basicConfig(level=logging.INFO)
    ftypes = {
        "F32": gguf.LlamaFileType.ALL_F32,
        "F16": gguf.LlamaFileType.MOSTLY_F16,
        "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    }
    with torch.inference_mode():
        hparams = ModelBase.load_hparams(staged, False)
        architecture = get_model_architecture(hparams, ModelType.TEXT)
        model_class: Any = get_model_class(architecture)
        model = model_class(staged, ftypes[outtype], out, model_name=name)
        model.prepare_tensors()
        model.prepare_metadata(vocab_only=False)
        writer = model.gguf_writer
        writer.write_header_to_file(path=out)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))

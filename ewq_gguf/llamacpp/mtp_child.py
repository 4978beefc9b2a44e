"""Child process: can the converter write a model without its heads for further tokens?

    python -m ewq_gguf.llamacpp.mtp_child STAGED ANSWER

Run with the converter's folder on PYTHONPATH. ANSWER is JSON: true or false.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(staged: Path, answer: Path) -> None:
    """Write true or false."""
    from conversion import (  # type: ignore[import-not-found]
        ModelBase,
        ModelType,
        get_model_architecture,
        get_model_class,
    )

    hparams = ModelBase.load_hparams(staged, False)
    architecture = get_model_architecture(hparams, ModelType.TEXT)
    can = bool(get_model_class(architecture).supports_mtp_export)
    answer.write_text(json.dumps(can))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

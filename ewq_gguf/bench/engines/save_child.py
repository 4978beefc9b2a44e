"""Child process: load a checkpoint, quantise it, write it.

python -m ewq_gguf.bench.engines.save_child JOB
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError

from ewq_gguf.bench.engines.precision import SAVED_NAME
from ewq_gguf.bench.engines.saving import SaveJob
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.job import Failure
from ewq_gguf.disk import advice
from ewq_gguf.errors import EwqError, ResourceError

#: What a tokenizer and a config are read from.
_SMALL = frozenset({".json", ".model", ".txt", ".jinja"})


def main(path: Path) -> int:
    """Do the job that a file describes; 1 where it failed and said why."""
    job = SaveJob.model_validate_json(path.read_bytes())
    try:
        _save(job)
    except EwqError as error:
        Path(job.failure).write_text(Failure.of(error).model_dump_json())
        return 1
    return 0


def _save(job: SaveJob) -> None:
    from ewq_gguf.bench.engines.transformers_model import TransformersModel

    source, out = Path(job.model), Path(job.out)
    model = TransformersModel(source, job.setup, job.precisions)
    try:
        for file in sorted(source.iterdir()):
            is_index = file.name.endswith(".index.json")
            if file.suffix in _SMALL and file.is_file() and not is_index:
                shutil.copyfile(file, out / file.name)
        model.save(out / SAVED_NAME, job.metadata)
        with (out / SAVED_NAME).open("rb") as written:
            os.fsync(written.fileno())
    except (OSError, SafetensorError) as error:
        problem = f"cannot be written ({error})"
        remedy = f"free some space, or {advice(out)}"
        raise ResourceError(STAGE, out.name, problem, remedy) from error


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

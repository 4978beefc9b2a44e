"""Plans from other people's files; no weight is read."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.errors import InputError, VerificationError
from ewq_gguf.plan.assemble import assemble
from ewq_gguf.plan.imported import Imported, gguf_types, poc_types
from ewq_gguf.plan.model_tensors import ModelTensors
from ewq_gguf.records import ImportedPolicy, Plan
from ewq_gguf.stages.run import Run
from ewq_gguf.strict_json import read_json

_MAGIC = b"GGUF"


def import_plan(run: Run, file: Path, *, raw_type: str = "auto") -> Plan:
    """The plan that asks for the types of a file.

    Args:
        run: the model, or a scan of it, and the options.
        file: a `quant_plan_*.json` of the proof of concept, or a GGUF of the model.
        raw_type: meaning of `raw`: `F16`, `BF16`, or `auto` for the source's own.

    Raises:
        InputError: the file is neither, or not of this model.
    """
    model = _model_tensors(run, raw_type)
    policy, imported = _read(file, model)
    for note in imported.notes:
        run.progress.note(f"{file.name}: {note}")
    return assemble(model, policy, imported.types)


def _model_tensors(run: Run, raw_type: str) -> ModelTensors:
    if run.given_scan is not None:
        model = ModelTensors.of_scan(run.given_scan, run.known_layout, raw_type)
        # The types depend on no weight, whoever has measured them.
        return replace(model, weights_sha256=None)
    layout = run.layout
    return ModelTensors.of_tensors(run.identity, layout.tensors, layout, raw_type)


def _read(file: Path, model: ModelTensors) -> tuple[ImportedPolicy, Imported]:
    """Read a file as the format that its first bytes name."""
    if not file.is_file():
        raise InputError("plan", file, "is no file", "check the path")
    try:
        with file.open("rb") as stream:
            is_gguf = stream.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise InputError(
            "plan", file, f"cannot be read ({error.strerror})", "check the path"
        ) from error
    if is_gguf:
        return _read_gguf(file, model)
    remedy = "give a quant_plan_*.json of the proof of concept, or a GGUF file"
    text, values = read_json(file, "plan", remedy)
    imported = poc_types(values, model, file.name)
    return _policy("poc", file, text), imported


def _read_gguf(file: Path, model: ModelTensors) -> tuple[ImportedPolicy, Imported]:
    try:
        header = read_gguf(file, header_only=True)
    except VerificationError as error:
        raise InputError("plan", file, error.problem, "download it again") from error
    n_files = header.kv.get("split.count", 1)
    if n_files not in (0, 1):
        raise InputError(
            "plan",
            file,
            f"is one of {n_files} parts",
            "join them first: `llama-gguf-split --merge`",
        )
    tensors = {t.name: (t.shape, t.ggml_type) for t in header.tensors}
    imported = gguf_types(tensors, model, file.name)
    with file.open("rb") as stream:
        return _policy("gguf", file, stream.read(header.data_offset)), imported


def _policy(
    source: Literal["poc", "gguf"], file: Path, content: bytes
) -> ImportedPolicy:
    return ImportedPolicy(
        source=source,
        file_name=file.name,
        file_sha256=hashlib.sha256(content).hexdigest(),
    )

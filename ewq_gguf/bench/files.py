"""Identity of a GGUF file or checkpoint, all its parts included."""

from __future__ import annotations

import re
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.bench.engines.precision import AppliedPlan
from ewq_gguf.bench.engines.scorer import STAGE
from ewq_gguf.bench.reference_file import check_asked, is_reference, read_reference
from ewq_gguf.checkpoint.files import model_name, read_json_object
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.checkpoint.model_config import longest_context
from ewq_gguf.errors import InputError, UsageError, VerificationError
from ewq_gguf.file_memory import read_once
from ewq_gguf.records import BenchedFile, BenchParameters

#: llama_split_path in src/llama.cpp.
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
#: What a checkpoint is loaded from, its own weights and tokenizer.
_CHECKPOINT = frozenset({".json", ".safetensors", ".model", ".txt", ".jinja"})


def identify(path: Path, plan: AppliedPlan | None = None) -> BenchedFile:
    """Check a file's header, and those of its other parts, and hash them.

    A folder is a checkpoint: what it is loaded from is hashed, and the plan that
    bitsandbytes follows with it.

    Raises:
        InputError: there is no such file, it is a reference and no model, or the
            folder holds no checkpoint.
        VerificationError: it is not a sound GGUF file, or parts are missing or of
            another file.
    """
    if not path.exists():
        raise InputError(STAGE, path, "no such file", "check the path")
    if path.is_dir():
        file = _identify_folder(path)
        if plan is None:
            return file
        sha256 = store.sha256_text(f"{file.sha256} {plan.sha256}")
        return file.model_copy(update={"name": plan.name, "sha256": sha256})
    if is_reference(read_gguf(path)):
        raise InputError(
            STAGE, path, "is a reference and no model", "give it as --base"
        )
    return _hashed(path)


def check_measurable(path: Path, n_ctx: int) -> None:
    """Refuse a model that nothing here measures, or in such a long context.

    Raises:
        InputError: it does not write one token after another.
        UsageError: it was made for a shorter context.
    """
    if path.is_dir():
        most = longest_context(read_json_object(path, "config.json"))
    else:
        header = read_gguf(path)
        most = header.n_ctx_train
        if not header.is_writer:
            raise InputError(
                STAGE,
                path,
                f"{header.architecture} does not write one token after another, and "
                "only models that do are measured here",
                "measure an encoder with a test of its own task",
            )
    if most is not None and n_ctx > most:
        raise UsageError(
            STAGE,
            path,
            f"the model was made for {most} tokens of context, {n_ctx} are asked for",
            f"give --ctx {most} or fewer",
        )


def identify_base(path: Path, parameters: BenchParameters) -> BenchedFile:
    """The same for what a file is compared with: a model, or a reference of one.

    Raises:
        InputError: there is no such file, or a reference is of something else
            than what is asked.
        VerificationError: as of `identify`.
    """
    if not path.is_file() or not is_reference(read_gguf(path)):
        return identify(path)
    reference = read_reference(path)
    if "kld" in parameters.tasks:
        check_asked(reference, parameters)
    model = reference.record.model.sha256
    return _hashed(path).model_copy(update={"reference_of": model})


def _hashed(path: Path) -> BenchedFile:
    parts = parts_of(path)
    hashes = [_sha256(part) for part in parts]
    return BenchedFile(
        name=path.name,
        size_bytes=sum(part.stat().st_size for part in parts),
        sha256=hashes[0] if len(hashes) == 1 else store.sha256_text(" ".join(hashes)),
    )


def _identify_folder(path: Path) -> BenchedFile:
    files = sorted(p for p in path.iterdir() if p.suffix in _CHECKPOINT and p.is_file())
    weights = [file for file in files if file.suffix == ".safetensors"]
    if not weights or not (path / "config.json").is_file():
        problem = "holds no config.json, or no *.safetensors"
        raise InputError(STAGE, path, problem, "give the folder of a checkpoint")
    hashes = [f"{file.name} {_sha256(file)}" for file in files]
    return BenchedFile(
        name=model_name(path),
        size_bytes=sum(file.stat().st_size for file in weights),
        sha256=store.sha256_text(" ".join(hashes)),
    )


#: The base of many files is hashed once.
_sha256 = read_once(64)(store.sha256_file)


def parts_of(path: Path) -> list[Path]:
    """A split file's parts in order, or the file alone.

    Raises:
        VerificationError: parts are missing or of another file.
    """
    count = int(read_gguf(path).kv.get("split.count", 1))
    if count <= 1:
        return [path]
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count or int(match[2]) != 1:
        raise VerificationError(
            STAGE,
            path,
            f"is of {count} parts, and is not called like the first of them",
            f"give NAME-00001-of-{count:05}.gguf, or join them with llama-gguf-split",
        )
    parts = [
        path.with_name(f"{match[1]}-{i:05}-of-{count:05}.gguf")
        for i in range(1, count + 1)
    ]
    missing = [part.name for part in parts if not part.exists()]
    wrong = [
        part.name
        for i, part in enumerate(parts)
        if part.exists() and not _is_part(part, i, count)
    ]
    if missing or wrong:
        error = VerificationError(
            STAGE,
            path,
            f"{len(missing)} of its {count} parts are missing, {len(wrong)} are of "
            "another file",
            "put all parts into one folder",
        )
        error.differences = (
            *(f"{name}: missing" for name in missing),
            *(f"{name}: of another file" for name in wrong),
        )
        raise error
    return parts


def _is_part(path: Path, number: int, count: int) -> bool:
    kv = read_gguf(path).kv
    return (kv.get("split.no"), kv.get("split.count")) == (number, count)

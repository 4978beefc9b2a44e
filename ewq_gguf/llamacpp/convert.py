"""From a checkpoint to a base GGUF, and to its header alone, by llama.cpp's converter.

The converter sees a staging folder of links: fixed names, no code, no `auto_map`, so
that nothing of the repository runs and no path of this machine enters the file.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ewq_gguf import ggml_types, store
from ewq_gguf.checkpoint.buffers import buffers_of
from ewq_gguf.checkpoint.folder import Checkpoint, ShardFile
from ewq_gguf.checkpoint.fp8 import (
    QUANT_FILE,
    is_fp8,
    quantisation_of,
    without_quantisation,
)
from ewq_gguf.checkpoint.gguf_file import GgufFile, read_gguf
from ewq_gguf.checkpoint.small_files import MORE_TEMPLATES
from ewq_gguf.errors import InputError, ToolError
from ewq_gguf.llamacpp.converter import Content, content_flags, run_converter
from ewq_gguf.llamacpp.left_out_child import VARIABLE as LEFT_OUT
from ewq_gguf.llamacpp.logs import child_log
from ewq_gguf.llamacpp.toolchain import Toolchain
from ewq_gguf.process import python_argv
from ewq_gguf.records import Source
from ewq_gguf.tensor_names import is_dropped

_EMBEDDING = "model.embed_tokens.weight"
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "vocab.json", "vocab.txt", "tekken.json", "rwkv_vocab_v20230424.txt",
)  # fmt: skip
_PERCENT = re.compile(r"Writing:\s+(\d+)%")


def base_type(checkpoint: Checkpoint) -> str:
    """The base GGUF's float type: the one most weights of the checkpoint have."""
    weights: Counter[str] = Counter()
    for _, tensor in checkpoint.tensors:
        weights[ggml_types.base_type(tensor.dtype)] += tensor.n_weights
    return weights.most_common(1)[0][0]


def convert_argv(
    toolchain: Toolchain,
    staged: Path,
    name: str,
    outtype: str,
    out: Path,
    flags: Sequence[str] = (),
) -> list[str]:
    """The converter's command line, without the Python in front."""
    return [
        str(toolchain.converter),
        str(staged),
        "--outfile",
        str(out),
        "--outtype",
        outtype.lower(),
        f"--model-name={name}",
        *flags,
    ]


def convert(
    checkpoint: Checkpoint,
    toolchain: Toolchain,
    out: Path,
    *,
    outtype: str,
    content: Content = "text",
    on_progress: Callable[[float], None] | None = None,
) -> list[str]:
    """Write the base GGUF, or what goes beside it.

    Args:
        checkpoint: opened by `open_checkpoint`.
        toolchain: whose converter to use.
        out: the final path; replaced when the new file is whole.
        outtype: `F16`, `BF16`, `F32` or `Q8_0`.
        content: what is written.
        on_progress: told the finished share, 0 to 1.

    Returns:
        What the converter warned of.

    Raises:
        ToolError: the converter's own packages are missing.
        InputError: the checkpoint has no tokenizer, the converter refuses it or does
            not know its tokenizer, or it is a GGUF file already.
        ChildError: the converter failed.
        ResourceError: the disk is full.
    """
    check_is_no_gguf(checkpoint)
    check_packages()
    check_tokenizer(checkpoint)
    check_is_local(checkpoint)
    checkpoint.check_unchanged("convert")
    store.check_distinct(out, [shard.path for shard in checkpoint.shards], "convert")
    # FP8 weights have twice their bytes in the base.
    total = sum(max(t.end - t.begin, 2 * t.n_weights) for _, t in checkpoint.tensors)
    store.check_free(store.ensure_dir(out.parent, "convert"), total, "convert")

    def line(text: str) -> None:
        if on_progress and (match := _PERCENT.search(text)):
            on_progress(int(match[1]) / 100)

    with (
        store.work_dir(out, stage="convert") as folder,
        child_log("convert", out) as log_path,
    ):
        staged = stage_checkpoint(checkpoint, folder)
        temporary = folder / "base.gguf"
        flags = content_flags(checkpoint, content)
        argv = convert_argv(
            toolchain, staged, checkpoint.identity.name, outtype, temporary, flags
        )
        left_out = left_out_env(checkpoint, folder)
        if left_out or "pre" in checkpoint.identity.chosen:
            argv = python_argv("ewq_gguf.llamacpp.left_out_child", *argv)
        else:
            argv = [_python(), *argv]
        warnings = run_converter(
            checkpoint, toolchain, argv, log_path, env=left_out, on_line=line
        )
        read_gguf(temporary)  # a whole file, or an error
        checkpoint.check_unchanged("convert")
        store.publish(temporary, out)
    return warnings


def left_out_env(checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """The variable that names the checkpoint's buffers to the converter, if any."""
    found = [t for t in buffers_of(checkpoint) if not is_dropped(t.name)]
    if not found:
        return {}
    path = folder / "left_out.json"
    path.write_text(json.dumps([(tensor.name, tensor.dtype) for tensor in found]))
    return {LEFT_OUT: str(path)}


@dataclass(frozen=True)
class BaseHeader:
    """What the converter would write, without data.

    Attributes:
        path: a file of the base GGUF's size with a hole for the data.
        gguf: its header.
        sources: what each GGUF tensor is made of, by its name.
        warnings: what the converter warned of.
        computed: the tensors whose weights are not the checkpoint's own.
    """

    path: Path
    gguf: GgufFile
    sources: Mapping[str, tuple[Source, ...]]
    warnings: tuple[str, ...] = ()
    computed: frozenset[str] = frozenset()


@contextmanager
def header_of(
    checkpoint: Checkpoint,
    toolchain: Toolchain,
    *,
    outtype: str,
    content: Content = "text",
) -> Iterator[BaseHeader]:
    """The base GGUF's header as the converter would write it, with a hole for data.

    No weight is read: the converter works on lazy tensors and is stopped before it
    writes data. The file has its full size but occupies the header's bytes only, so
    llama-quantize can plan on it (`--dry-run`).

    Yields:
        The header; its file is removed afterwards.

    Raises:
        ToolError: the converter's own packages are missing.
        InputError: the checkpoint has no tokenizer, or one the converter does not know.
        ChildError: the converter refuses the checkpoint.
    """
    check_packages()
    check_tokenizer(checkpoint)
    out = store.cache_dir("layouts") / f"{checkpoint.identity.fingerprint}.gguf"
    with (
        store.work_dir(out, stage="convert") as folder,
        child_log("convert", out) as log_path,
    ):
        staged = stage_checkpoint(checkpoint, folder)
        path = folder / "header.gguf"
        argv = python_argv(
            "ewq_gguf.llamacpp.header_child",
            staged,
            checkpoint.identity.name,
            outtype,
            path,
            folder / "sources.json",
            *content_flags(checkpoint, content),
        )
        left_out = left_out_env(checkpoint, folder)
        warnings = run_converter(checkpoint, toolchain, argv, log_path, env=left_out)
        header = read_gguf(path, header_only=True)
        if not header.tensors:
            raise InputError(
                "convert",
                checkpoint.folder,
                "llama.cpp's converter knows none of its tensors by name",
                "check the checkpoint's files, or use a newer llama.cpp",
            )
        end = max(tensor.offset + tensor.size_bytes for tensor in header.tensors)
        with path.open("r+b") as file:
            file.truncate(-(-end // 32) * 32)
        sources = folder / "sources.json"
        entries = json.loads(sources.read_text())
        yield BaseHeader(
            path,
            header,
            read_sources(checkpoint, sources),
            tuple(warnings),
            frozenset(e["name"] for e in entries if not e["moved"]),
        )


def converter_architectures(
    toolchain: Toolchain, content: Content = "text"
) -> frozenset[str]:
    """The Hugging Face architectures of which the converter can write a content.

    Read from its source, because importing it imports torch.
    """
    table = "MMPROJ_MODEL_MAP" if content == "mmproj" else "TEXT_MODEL_MAP"
    path = toolchain.source_dir / "conversion" / "__init__.py"
    if not path.is_file():
        return frozenset()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and node.target.id == table
            and isinstance(node.value, ast.Dict)
        ):
            return frozenset(
                str(key.value)
                for key in node.value.keys
                if isinstance(key, ast.Constant)
            )
    return frozenset()


def check_is_local(checkpoint: Checkpoint) -> None:
    """Refuse to convert a checkpoint whose weights stay on a server.

    Raises:
        InputError: they do.
    """
    for shard in checkpoint.shards:
        if shard.remote is not None:
            raise InputError(
                "convert",
                shard.remote.url,
                "its weights are not on this machine",
                "download the checkpoint, or leave --stream away",
            )


def check_is_no_gguf(checkpoint: Checkpoint) -> None:
    """Refuse to convert what is a base GGUF already.

    Raises:
        InputError: it is.
    """
    if checkpoint.identity.is_gguf:
        raise InputError(
            "convert",
            checkpoint.folder,
            "is a base GGUF already",
            "give it to `ewq gguf` or `ewq quantize` as it is",
        )


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that no GGUF can be made of, before the converter starts.

    Raises:
        InputError: there is no tokenizer file, one is not JSON, or its tokens are not
            the rows of the embedding.
    """
    names = checkpoint.small_files
    if not any(n in _TOKENIZERS or n.endswith(".tiktoken") for n in names):
        raise InputError(
            "convert",
            checkpoint.folder,
            f"has no tokenizer ({', '.join(_TOKENIZERS)})",
            "download the checkpoint's tokenizer files too",
        )
    for name in ("tokenizer_config.json", *_TOKENIZERS):
        if name in names and name.endswith(".json"):
            _check_json(names[name])
    _check_vocab(checkpoint)


def _check_json(path: Path) -> None:
    """Its first mistake by line; the converter's own words would be a traceback."""
    try:
        json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        problem = f"is not JSON at line {error.lineno}: {error.msg}"
    except (ValueError, RecursionError) as error:
        problem = f"is not JSON ({error})"
    else:
        return
    raise InputError("convert", path, problem, "download it again")


def _check_vocab(checkpoint: Checkpoint) -> None:
    """Where the names are known, the embedding has a row for each token."""
    vocab = checkpoint.config.get("vocab_size")
    if not checkpoint.is_mapped_by_name or type(vocab) is not int:
        return
    for _, tensor in checkpoint.tensors:
        if tensor.name == _EMBEDDING and tensor.shape[:1] != (vocab,):
            raise InputError(
                "convert",
                checkpoint.folder / "config.json",
                f"vocab_size is {vocab}, {_EMBEDDING} has shape {tensor.shape}",
                "download config.json and the weights of one revision",
            )


def stage_checkpoint(checkpoint: Checkpoint, folder: Path) -> Path:
    """Make the converter's view of a checkpoint: links under fixed names.

    JSON files that name code to run (`auto_map`) are copied without it, and config.json
    with what the converter understands of the FP8 weights' scales. A chat template that
    was chosen stands alone.
    """
    staged = folder / (checkpoint.identity.name or "model")
    staged.mkdir()
    told = quantisation_of(checkpoint.folder, checkpoint.config)
    in_fp8 = checkpoint.fp8 is not None or is_fp8(told)
    has_template = "chat_template" in checkpoint.identity.chosen
    for name, path in checkpoint.small_files.items():
        (staged / name).parent.mkdir(exist_ok=True)
        if in_fp8 and name == QUANT_FILE:
            continue  # config.json says it
        if has_template and name.startswith(f"{MORE_TEMPLATES}/"):
            continue
        changed = None
        if path.suffix == ".json":
            changed = _changed(checkpoint, name, path, is_fp8=in_fp8)
        if changed is None:
            (staged / name).symlink_to(path.resolve())
        else:
            (staged / name).write_text(json.dumps(changed), encoding="utf-8")
    for name, shard in _staged_shards(checkpoint).items():
        if shard.remote is None:
            (staged / name).symlink_to(shard.path.resolve())
        else:
            _write_hollow(staged / name, shard)
    return staged


def _write_hollow(path: Path, shard: ShardFile) -> None:
    """A file with a remote shard's header and a hole for its data."""
    with path.open("wb") as file:
        file.write(len(shard.header.raw).to_bytes(8, "little") + shard.header.raw)
        file.truncate(shard.header.file_bytes)


def _staged_shards(checkpoint: Checkpoint) -> dict[str, ShardFile]:
    """The shards under the names the converter looks for."""
    count = len(checkpoint.shards)
    if count == 1:
        return {"model.safetensors": checkpoint.shards[0]}
    return {
        f"model-{i:05}-of-{count:05}.safetensors": shard
        for i, shard in enumerate(checkpoint.shards, 1)
    }


def read_sources(checkpoint: Checkpoint, path: Path) -> dict[str, tuple[Source, ...]]:
    """What header_child found, with the checkpoint's own names."""
    names = {
        (file, tensor.begin): tensor.name
        for file, shard in _staged_shards(checkpoint).items()
        for tensor in shard.header.tensors
    }
    return {
        entry["name"]: tuple(
            Source(
                hf_name=names[source["file"], source["offset"]],
                box=source["box"] and tuple(tuple(part) for part in source["box"]),
            )
            for source in entry["sources"]
        )
        for entry in json.loads(path.read_text())
    }


def _changed(
    checkpoint: Checkpoint, name: str, path: Path, *, is_fp8: bool
) -> dict[str, Any] | None:
    """A JSON file's values as the converter gets them, None where it gets the file."""
    hidden = ["auto_map"]
    if "chat_template" in checkpoint.identity.chosen:
        hidden.append("chat_template")
    text = path.read_bytes()
    if name != "config.json" and not any(f'"{key}"'.encode() in text for key in hidden):
        return None
    try:
        values: Any = json.loads(text)
    except ValueError:
        return None  # the converter reports it, with its own words
    if not isinstance(values, dict):
        return None
    changed = {key: value for key, value in values.items() if key not in hidden}
    if name == "config.json" and is_fp8:
        changed = without_quantisation(changed)
        if checkpoint.fp8 is not None:
            changed["quantization_config"] = checkpoint.fp8.converter_config
    return None if changed == values else changed


def check_packages() -> None:
    """Refuse where the converter's own packages are missing.

    Raises:
        ToolError: naming them.
    """
    missing = [
        name
        for name in ("torch", "transformers", "sentencepiece")
        if find_spec(name) is None
    ]
    if missing:
        raise ToolError(
            "convert",
            None,
            f"the converter needs {', '.join(missing)}",
            "pip install 'ewq-gguf[convert]'",
        )


def _python() -> str:
    return python_argv("")[0]

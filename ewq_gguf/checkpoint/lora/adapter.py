"""A LoRA adapter as PEFT saves it: adapter_config.json and adapter_model.safetensors.

Only headers and the config are read here, but for one pass that looks for NaN and
infinities. What an adapter does that would change the merge and is not known here is
refused by the name of its setting, never skipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ewq_gguf import store
from ewq_gguf.checkpoint.files import check_regular, model_name
from ewq_gguf.checkpoint.header import DTYPE_BYTES, TensorHeader, read_header
from ewq_gguf.checkpoint.hub import snapshot
from ewq_gguf.checkpoint.hub_names import hub_name
from ewq_gguf.checkpoint.lora.config import (
    CONFIG,
    MERGE_YOURSELF,
    STAGE,
    WEIGHTS,
    bad_adapter,
    read_adapter_config,
    scale_of,
)
from ewq_gguf.checkpoint.lora.low_rank import FLOAT_DTYPES, decode, encode
from ewq_gguf.checkpoint.reader import RangeReader
from ewq_gguf.checkpoint.shards import ShardFile
from ewq_gguf.checkpoint.source import hub_endpoint
from ewq_gguf.errors import InputError
from ewq_gguf.records import AdapterIdentity

_PICKLE = "adapter_model.bin"
#: Files of a tokenizer, which PEFT's users save beside the adapter.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model",
    "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector|trainable_tokens_delta)(?:\.default)?"
    r"(?:\.(?P<leaf>weight|bias))?"
)
_WRAPPERS = re.compile(r"\.(?:modules_to_save|token_adapter|base_layer)(?:\.default)?")
_PIECE_WEIGHTS = 1 << 17

#: A tensor's file and header.
Stored = tuple[ShardFile, TensorHeader]


@dataclass(frozen=True)
class Adapter:
    """An adapter whose config and header are sound.

    Attributes:
        folder: where it lies.
        origin: the DIR or Hub id that opens it again, also on another machine.
        config: adapter_config.json.
        file: its weights.
        parts: Its trained tensors, by the module's name in the model and
            the part's: `lora_A`, `lora_B`, ...
        whole: tensors that it replaces, by their name in the model.
        identity: The adapter's identity, the same wherever it lies.
    """

    folder: Path
    origin: str
    config: Mapping[str, Any] = field(repr=False)
    file: ShardFile = field(repr=False)
    parts: Mapping[str, Mapping[str, TensorHeader]] = field(repr=False)
    whole: Mapping[str, TensorHeader] = field(repr=False)
    identity: AdapterIdentity

    @property
    def base(self) -> str:
        """The model it was trained on, as its config has it."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def right_base(self) -> str:
        """The remedy where it does not fit the base."""
        trained_on = f", {self.base}" if self.base else ""
        return f"give the base that it was trained on{trained_on}"

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """The tokenizer's files beside it, by name."""
        files = [self.folder / name for name in TOKENIZER_FILES]
        files += sorted(self.folder.glob("*.tiktoken"))
        found = {path.name: path for path in files if path.is_file()}
        for path in found.values():
            check_regular(self.folder, path)
        return found

    def error(self, problem: str, remedy: str) -> InputError:
        """The error about something in it."""
        return bad_adapter(self.folder, problem, remedy)

    def scale(self, module: str, rank: int) -> float:
        """The factor of a module's product B A.

        Args:
            module: its name in the model.
            rank: The rank of its A in the file.

        Raises:
            InputError: the config says another rank, or no number.
        """
        return scale_of(self.config, self.folder, module, rank)


def open_adapter(adapter: str, say: Callable[[str], None] | None = None) -> Adapter:
    """Find an adapter, read its config and header, and look through its weights.

    Args:
        adapter: a folder, or a Hub id (`org/name[@revision]`).
        say: told about a download; None for nobody.

    Raises:
        InputError: there is none, it is not sound, or it is of a kind that is not
            merged here.
        NetworkError, ResourceError: the Hub refused, or the download failed.
    """
    folder, hub_id = Path(adapter), None
    if folder.is_file() and folder.name in (CONFIG, WEIGHTS):
        folder = folder.parent
    if not folder.exists() and (hub := hub_name(adapter, hub_endpoint())):
        hub_id = hub.hub_id
        if say is not None:
            say(f"fetching {hub_id} from the Hub")
        patterns = (CONFIG, WEIGHTS, *TOKENIZER_FILES, "*.tiktoken")
        folder = snapshot(hub_id, hub.revision, patterns)
    if not folder.is_dir():
        raise InputError(
            STAGE,
            adapter,
            "no such adapter",
            f"give a folder with {CONFIG} and {WEIGHTS}, or a Hub id",
        )
    config = read_adapter_config(folder)
    path = folder / WEIGHTS
    _check_weights_file(folder)
    with path.open("rb") as file:
        shard = ShardFile(path, read_header(file.fileno(), path))
    parts, whole = _sorted_tensors(folder, shard)
    _check_finite(folder, shard)
    identity = AdapterIdentity(
        name=hub_id.rpartition("/")[2] if hub_id else model_name(folder),
        hub_id=hub_id,
        revision=folder.name if hub_id else None,
        config_sha256=store.sha256_file(folder / CONFIG),
        weights_sha256=store.sha256_file(path),
    )
    origin = f"{hub_id}@{folder.name}" if hub_id else str(folder.absolute())
    return Adapter(folder, origin, config, shard, parts, whole, identity)


def _check_weights_file(folder: Path) -> None:
    if (folder / WEIGHTS).exists():
        check_regular(folder, folder / WEIGHTS)
    elif (folder / _PICKLE).exists():
        raise bad_adapter(
            folder,
            f"holds a pickle ({_PICKLE}), which can run code and is never loaded",
            "save it as safetensors: save_pretrained(DIR, safe_serialization=True)",
        )
    else:
        raise bad_adapter(folder, f"has no {WEIGHTS}", "download it again")


def _sorted_tensors(
    folder: Path, shard: ShardFile
) -> tuple[dict[str, dict[str, TensorHeader]], dict[str, TensorHeader]]:
    """The file's tensors as parts of modules, and as whole tensors of the model."""
    parts: dict[str, dict[str, TensorHeader]] = {}
    whole: dict[str, TensorHeader] = {}
    for tensor in shard.header.tensors:
        if tensor.dtype not in FLOAT_DTYPES:
            problem = f"{tensor.name} is {tensor.dtype}, not {', '.join(FLOAT_DTYPES)}"
            raise bad_adapter(folder, problem)
        name = tensor.name.removeprefix("base_model.model.")
        match = _PART.fullmatch(name)
        if match:
            module = match["module"].removesuffix(".token_adapter")
            part = match["part"] + (".bias" if match["leaf"] == "bias" else "")
            entry = parts.setdefault(module, {})
            clash = entry.setdefault(part, tensor)
        elif "lora_" in name:
            problem = f"{tensor.name} is no part of a LoRA known here"
            raise bad_adapter(folder, problem, MERGE_YOURSELF)
        elif ".original_module." in name:  # the base's weights, beside trained ones
            continue
        else:
            clash = whole.setdefault(_WRAPPERS.sub("", name), tensor)
        if clash is not tensor and not same_weights(
            (shard, clash), (shard, tensor), tensor.dtype
        ):
            problem = f"{clash.name} and {tensor.name} are the same weight"
            raise bad_adapter(folder, problem)
    if not parts and not whole:
        raise bad_adapter(folder, f"{WEIGHTS} holds no tensors")
    return parts, whole


def same_weights(one: Stored, two: Stored, dtype: str) -> bool:
    """Whether two tensors are the same, rounded to a type.

    Args:
        one: a tensor's file and header.
        two: another one's.
        dtype: One of FLOAT_DTYPES.
    """
    if one[1].shape != two[1].shape:
        return False
    with RangeReader() as reader:
        pieces = (_pieces(reader, *stored, dtype) for stored in (one, two))
        return all(np.array_equal(a, b) for a, b in zip(*pieces, strict=True))


def _pieces(
    reader: RangeReader, shard: ShardFile, tensor: TensorHeader, dtype: str
) -> Iterator[NDArray[Any]]:
    """A tensor's weights in a type, some at a time."""
    reader.open(shard)
    buffer = np.empty(_PIECE_WEIGHTS * DTYPE_BYTES[tensor.dtype], np.uint8)
    for chunk in reader.chunks(shard, tensor.begin, tensor.end, buffer):
        yield encode(decode(chunk, tensor.dtype), dtype)


def _check_finite(folder: Path, shard: ShardFile) -> None:
    with RangeReader() as reader:
        for tensor in shard.header.tensors:
            for piece in _pieces(reader, shard, tensor, "F64"):
                if not np.isfinite(piece).all():
                    problem = f"{tensor.name} holds NaN or infinite weights"
                    raise bad_adapter(folder, problem, "train it again")

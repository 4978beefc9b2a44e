"""LoRA adapters merged into a checkpoint: a copy in the cache, which then is the model.

Only weight files with a changed tensor are written again, tensor by tensor; every other
tensor's bytes are copied as they are, and no file of the original is touched. Each
weight is computed in float64 from all adapters, and rounded to its own type once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ewq_gguf import store
from ewq_gguf.checkpoint.folder import Checkpoint
from ewq_gguf.checkpoint.header import read_header
from ewq_gguf.checkpoint.leftovers import is_quantised
from ewq_gguf.checkpoint.lora.adapter import Adapter, open_adapter
from ewq_gguf.checkpoint.lora.config import STAGE
from ewq_gguf.checkpoint.lora.targets import Targets
from ewq_gguf.checkpoint.lora.tokenizer import tokenizer_changes
from ewq_gguf.checkpoint.lora.writing import merged_file
from ewq_gguf.checkpoint.reader import RangeReader
from ewq_gguf.checkpoint.shards import ShardFile
from ewq_gguf.checkpoint.source import Opening, open_checkpoint
from ewq_gguf.errors import InputError, UsageError
from ewq_gguf.records import ModelIdentity, Shard

_METHOD = "1"  # of the arithmetic; a change makes every cached copy anew


def open_merged(
    model: str,
    adapters: Sequence[str],
    opening: Opening | None = None,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
    check: Callable[[Checkpoint], None] = lambda base: None,
) -> Checkpoint:
    """Find a model and adapters, and merge them; or the copy that was merged before.

    Args:
        model: as for `open_checkpoint`; its weights have to be on this machine.
        adapters: folders or Hub ids, in the order in which they are merged; without
            any the model is opened as it is.
        opening: how to.
        on_bytes: told the bytes done and all bytes, while weights are written.
        check: raises where the model as it is will not do.

    Raises:
        UsageError: the model is to be streamed.
        InputError: an adapter or the model is not sound, or they do not fit.
        NetworkError, ResourceError: as of `open_checkpoint`; the cache's disk is full.
    """
    opening = opening or Opening()
    if not adapters:
        base = open_checkpoint(model, opening)
        check(base)
        return base
    if opening.is_streamed:
        raise UsageError(
            STAGE,
            model,
            "--stream leaves the weights on their server, and --adapter changes them",
            "leave --stream away: the model is downloaded",
        )
    # The adapters first: what is not merged is refused before a model is downloaded.
    try:
        opened = [open_adapter(adapter, opening.say) for adapter in adapters]
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        remedy = "check its name and permissions"
        raise InputError(STAGE, error.filename, problem, remedy) from error
    base = open_checkpoint(model, replace(opening, reads_weights=True))
    check(base)
    _check_base(base)
    targets = Targets(base)
    for adapter in opened:
        targets.add(adapter)
    say = opening.say or (lambda note: None)
    for adapter in opened:
        if adapter.base and not _is_same_name(adapter.base, base.identity.name):
            say(f"{adapter.identity.name} was trained on {adapter.base}")
    for note in targets.notes:
        say(note)
    return _Merge(base, opened, targets, say).checkpoint(on_bytes)


def _check_base(base: Checkpoint) -> None:
    if base.identity.is_gguf:
        raise InputError(
            STAGE,
            base.folder,
            "is a GGUF file, and adapters are merged into checkpoints",
            "give the checkpoint that it was made from",
        )
    if is_quantised(base):
        raise InputError(
            STAGE,
            base.folder,
            "has quantised weights, and adapters are merged into floats",
            "give the BF16 or F16 checkpoint that it was made from",
        )
    for shard in base.shards:
        if shard.remote is not None:
            raise InputError(
                STAGE,
                shard.remote.url,
                "its weights are not on this machine, and merging changes them",
                "download the checkpoint and give its folder",
            )


def _is_same_name(trained_on: str, name: str) -> bool:
    """Whether two names are of one model, quantised for the training or not."""
    stem = trained_on.rstrip("/").rsplit("/", 1)[-1].lower()
    return stem.removesuffix("-bnb-4bit").removesuffix("-unsloth") == name.lower()


@dataclass
class _Merge:
    """A base, what becomes of its tensors, and where the copy lies.

    Attributes:
        base: the checkpoint.
        adapters: in their order.
        targets: The changes of the tensors.
        say: told what a user should know.
    """

    base: Checkpoint
    adapters: Sequence[Adapter]
    targets: Targets
    say: Callable[[str], None]
    _done: int = field(default=0, init=False)

    def checkpoint(self, on_bytes: Callable[[int, int], None]) -> Checkpoint:
        """The merged checkpoint; what the cache lacks of it is written."""
        base = self.base
        name = "-".join([base.identity.name, *(a.identity.name for a in self.adapters)])
        folder = store.cache_dir("merged", f"{name[:150]}-{self._key()[:16]}")
        with store.locked(folder, stage=STAGE, wait=True):
            small_files = self._small_files(folder)
            shards = self._shards(folder, on_bytes)
            # Whole for a converter that is started by hand (`convert --dry-run`).
            files = small_files | {shard.path.name: shard.path for shard in shards}
            for file, path in files.items():
                link = folder / file
                if not path.is_relative_to(folder) and not link.exists():
                    link.unlink(missing_ok=True)
                    store.ensure_dir(link.parent, STAGE)
                    link.symlink_to(path.resolve())
        return replace(
            base,
            folder=folder,
            config=json.loads(small_files["config.json"].read_bytes()),
            small_files=small_files,
            shards=shards,
            identity=self._identity(name, small_files, shards),
            opened="",
            adapters=tuple(adapter.origin for adapter in self.adapters),
        )

    def _key(self) -> str:
        """A hash of all that decides the copy's bytes, and of the files it links to."""
        parts = [_METHOD, self.base.signature, *self.base.small_files.values()]
        parts += [shard.path.resolve() for shard in self.base.shards]
        parts += [adapter.identity for adapter in self.adapters]
        parts += [_hash_small(adapter) for adapter in self.adapters]
        return store.sha256_text(repr(parts))

    def _identity(
        self, name: str, small_files: Mapping[str, Path], shards: Sequence[ShardFile]
    ) -> ModelIdentity:
        return self.base.identity.model_copy(
            update={
                "name": name,
                "files_sha256": {
                    file: store.sha256_file(path) for file, path in small_files.items()
                },
                "shards": tuple(
                    Shard(
                        name=shard.path.name,
                        size_bytes=shard.header.file_bytes,
                        header_sha256=hashlib.sha256(shard.header.raw).hexdigest(),
                    )
                    for shard in shards
                ),
                "adapters": tuple(adapter.identity for adapter in self.adapters),
            }
        )

    def _small_files(self, folder: Path) -> dict[str, Path]:
        """The base's small files, where the adapters do not change them."""
        files = dict(self.base.small_files)
        changes: dict[str, bytes] = {}
        for adapter in self.adapters:
            changes |= tokenizer_changes(
                self.base, adapter, is_resized=self.targets.is_resized, say=self.say
            )
        if self.targets.is_resized:
            changes["config.json"] = _with_vocabulary(
                self.base.config, self.targets.n_tokens
            )
        for name, data in changes.items():
            files[name] = folder / name
            if not files[name].is_file() or files[name].read_bytes() != data:
                with store.replacing(files[name], stage=STAGE) as temporary:
                    temporary.write_bytes(data)
        return dict(sorted(files.items()))

    def _shards(
        self, folder: Path, on_bytes: Callable[[int, int], None]
    ) -> tuple[ShardFile, ...]:
        changed = [shard for shard in self.base.shards if self._changes(shard)]
        missing = [s for s in changed if not (folder / s.path.name).is_file()]
        total = sum(shard.header.file_bytes for shard in missing)
        if missing:
            store.check_free(folder, total, STAGE)
        with RangeReader() as reader:
            for shard in missing:
                self._write(shard, folder / shard.path.name, reader, on_bytes, total)
        return tuple(
            _open(folder / shard.path.name) if shard in changed else shard
            for shard in self.base.shards
        )

    def _changes(self, shard: ShardFile) -> bool:
        return any(
            tensor.name in self.targets.by_name for tensor in shard.header.tensors
        )

    def _write(
        self,
        shard: ShardFile,
        path: Path,
        reader: RangeReader,
        on_bytes: Callable[[int, int], None],
        total: int,
    ) -> None:
        """One weight file, merged."""
        with store.replacing(path, stage=STAGE) as temporary:
            with temporary.open("wb") as file:
                for piece in merged_file(shard, self.targets.by_name, reader):
                    file.write(piece)
                    self._done += len(piece)
                    on_bytes(self._done, total)
            self.base.check_unchanged(STAGE)


def _open(path: Path) -> ShardFile:
    with path.open("rb") as file:
        return ShardFile(path, read_header(file.fileno(), path))


def _with_vocabulary(config: Mapping[str, Any], n_tokens: int | None) -> bytes:
    """config.json with another number of tokens."""
    changed = dict(config)
    text = changed.get("text_config")
    if isinstance(text, dict) and "vocab_size" in text:
        changed["text_config"] = {**text, "vocab_size": n_tokens}
    if "vocab_size" in changed or not isinstance(text, dict):
        changed["vocab_size"] = n_tokens
    return json.dumps(changed, indent=2).encode()


def _hash_small(adapter: Adapter) -> list[str]:
    """Hashes of an adapter's tokenizer files."""
    return [store.sha256_file(path) for path in adapter.tokenizer_files.values()]

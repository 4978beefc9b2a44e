"""Identity of a model: names and hashes, but no path of any machine."""

from __future__ import annotations

import hashlib
from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer

from ewq_gguf.records.base import Part


class Shard(Part):
    """One weight file.

    Attributes:
        name: the file's name without its folder.
        size_bytes: size of the whole file.
        header_sha256: hash of the safetensors header; for a GGUF file of all bytes
            before the data.
    """

    name: str
    size_bytes: int
    header_sha256: str


class AdapterIdentity(Part):
    """A LoRA adapter that was merged into a checkpoint.

    Attributes:
        name: the Hub repository's or the folder's name.
        hub_id: `org/name` of a Hub adapter, else None.
        revision: its commit, else None.
        config_sha256: hash of adapter_config.json.
        weights_sha256: hash of adapter_model.safetensors.
    """

    name: str
    hub_id: str | None
    revision: str | None
    config_sha256: str
    weights_sha256: str


class ModelIdentity(Part):
    """Identity of a checkpoint, wherever its files are.

    Attributes:
        name: the Hub repository's or the folder's name; becomes `general.name`. Of a
            GGUF file its `general.name`, or the file's own.
        hub_id: `org/name` of a Hub checkpoint, else None.
        revision: its commit, else None.
        hf_architecture: `architectures[0]` of config.json; of a GGUF file its
            `general.architecture`.
        n_layers: transformer layers.
        files_sha256: hash of every small file that goes into a conversion, by name.
        shards: the weight files, by name.
        adapters: merged into the weights, in this order; `name` ends with theirs.
        chosen: settings of the converter beside the files, by option: `pre`, `mtp`,
            and `chat_template` (the SHA-256 of the file that was given).
    """

    name: str
    hub_id: str | None
    revision: str | None
    hf_architecture: str
    n_layers: int
    files_sha256: dict[str, str]
    shards: tuple[Shard, ...]
    adapters: tuple[AdapterIdentity, ...] = ()
    chosen: dict[str, str] = {}

    @model_serializer(mode="wrap")
    def _without_what_is_empty(
        self, handler: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        """Leave out empty `adapters` and `chosen`: older plans keep their hash."""
        values: dict[str, Any] = handler(self)
        for name in ("adapters", "chosen"):
            if not values[name]:
                del values[name]
        return values

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file: the one source without a config.json."""
        return not self.files_sha256

    @property
    def as_found(self) -> ModelIdentity:
        """The same files without a choice."""
        return self.model_copy(update={"chosen": {}})

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what decides a conversion: files, name, adapters, choices."""
        parts: tuple[object, ...] = (
            self.name,
            sorted(self.files_sha256.items()),
            [(s.name, s.size_bytes, s.header_sha256) for s in self.shards],
        )
        if self.adapters:
            parts += ([(a.config_sha256, a.weights_sha256) for a in self.adapters],)
        if self.chosen:
            parts += (sorted(self.chosen.items()),)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

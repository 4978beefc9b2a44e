"""Which model: names and hashes, and no path of any machine."""

from __future__ import annotations

import hashlib

from ewq_gguf.records.base import Part


class Shard(Part):
    """One weight file.

    Attributes:
        name: of the file, without its folder.
        size_bytes: of the whole file.
        header_sha256: of the safetensors header's bytes; of a GGUF file of all bytes
            before the data.
    """

    name: str
    size_bytes: int
    header_sha256: str


class ModelIdentity(Part):
    """What a checkpoint is, wherever it lies.

    Attributes:
        name: the Hub repository's or the folder's name; becomes `general.name`. Of a
            GGUF file its `general.name`, or the file's own.
        hub_id: `org/name` of a Hub checkpoint, else None.
        revision: its commit, else None.
        hf_architecture: `architectures[0]` of config.json; of a GGUF file its
            `general.architecture`.
        n_layers: transformer layers.
        files_sha256: of every small file that goes into a conversion, by name.
        shards: the weight files, by name.
    """

    name: str
    hub_id: str | None
    revision: str | None
    hf_architecture: str
    n_layers: int
    files_sha256: dict[str, str]
    shards: tuple[Shard, ...]

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file: the one source without a config.json."""
        return not self.files_sha256

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what decides a conversion's layout: files, headers, name."""
        text = repr(
            (
                self.name,
                sorted(self.files_sha256.items()),
                [(s.name, s.size_bytes, s.header_sha256) for s in self.shards],
            )
        )
        return hashlib.sha256(text.encode()).hexdigest()

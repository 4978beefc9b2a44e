"""Where the children's logs are kept."""

from __future__ import annotations

from pathlib import Path

from ewq_gguf import store


def log_file(what: str, path: Path) -> Path:
    """The log of what is done to a file; no other file's run writes to it."""
    key = store.sha256_text(str(path.absolute()))[:8]
    return store.cache_dir("logs") / f"{what}-{path.stem[:80]}-{key}.log"

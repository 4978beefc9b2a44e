"""Where the children's logs are kept."""

from __future__ import annotations

import os
from pathlib import Path

from ewq_gguf import store


def log_file(what: str, path: Path) -> Path:
    """The log of what this process does to a file; no other run writes to it."""
    key = store.sha256_text(str(path.absolute()))[:8]
    name = f"{what}-{path.stem[:80]}-{key}-{os.getpid()}.log"
    return store.cache_dir("logs") / name

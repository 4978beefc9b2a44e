"""Where the children's logs are kept; of what succeeded none is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ewq_gguf import store


def log_file(what: str, path: Path) -> Path:
    """The log of what this process does to a file; no other run writes to it."""
    key = store.sha256_text(str(path.absolute()))[:8]
    name = f"{what}-{path.stem[:80]}-{key}-{os.getpid()}.log"
    return store.cache_dir("logs") / name


@contextmanager
def child_log(what: str, path: Path) -> Iterator[Path]:
    """That log for one child: removed when the block succeeds, kept when it fails."""
    log_path = log_file(what, path)
    yield log_path
    log_path.unlink(missing_ok=True)

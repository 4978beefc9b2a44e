"""The text that perplexities are usually told of: the test part of wikitext-2."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.checkpoint.hub_data import data_file
from ewq_gguf.errors import InputError

#: Below the folder that EWQ_TEXT_DIR names, and in the archive.
WIKITEXT = Path("wikitext-2-raw", "wiki.test.raw")

# The archive that llama-perplexity's source names.
_REPOSITORY, _ARCHIVE = "ggml-org/ci", "wikitext-2-raw-v1.zip"
_INSTEAD = "give a text with --text NAME=FILE"
_MAX_BYTES = 16 << 20


def wikitext(stage: str) -> Path:
    """The text of EWQ_TEXT_DIR, else the cache's, from the Hub on first use.

    Raises:
        NetworkError, ResourceError: it cannot be fetched.
        InputError: the archive is not what it was.
    """
    if folder := os.environ.get("EWQ_TEXT_DIR"):
        return Path(folder) / WIKITEXT
    path = store.cache_dir("texts") / WIKITEXT.name
    if not path.exists():
        archive = data_file(_REPOSITORY, _ARCHIVE, stage, instead=_INSTEAD)
        with store.replacing(path, stage=stage) as temporary:
            temporary.write_bytes(_member(archive, stage))
    return path


def _member(archive: Path, stage: str) -> bytes:
    """The text in the archive, which may be anything."""
    remedy = f"remove it, or {_INSTEAD}"
    try:
        with zipfile.ZipFile(archive) as files, files.open(str(WIKITEXT)) as file:
            data = file.read(_MAX_BYTES + 1)
    except (KeyError, zipfile.BadZipFile) as error:
        problem = f"is no archive with {WIKITEXT}"
        raise InputError(stage, archive, problem, remedy) from error
    if len(data) > _MAX_BYTES:
        problem = f"{WIKITEXT} in it is larger than {_MAX_BYTES:,} bytes"
        raise InputError(stage, archive, problem, remedy)
    return data

"""Data sets of the Hub that models are measured with, from its cache where they are."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.checkpoint.hub import hub_error
from ewq_gguf.errors import InputError

_MMLU = "cais/mmlu"
_BILLSUM, _BILLS = "FiscalNote/billsum", "data/test-00000-of-00001.parquet"


def mmlu_folder(stage: str) -> Path:
    """MMLU's questions of all subjects: a folder with test-* and dev-*.parquet.

    Raises:
        NetworkError, ResourceError: they cannot be fetched.
    """
    name = "all/{}-00000-of-00001.parquet"
    instead = "name a folder with test/ and dev/ with --mmlu DIR"
    test = data_file(_MMLU, name.format("test"), stage, instead=instead)
    # Both of one commit: snapshots/COMMIT/all/test-...
    commit = test.parents[1].name
    data_file(_MMLU, name.format("dev"), stage, instead=instead, revision=commit)
    return test.parent


def billsum_file(stage: str) -> Path:
    """BillSum's test part: bills of the US Congress and their summaries, as parquet.

    Raises:
        NetworkError, ResourceError: it cannot be fetched.
    """
    instead = "name a file of prompts with --prompts FILE"
    return data_file(_BILLSUM, _BILLS, stage, instead=instead)


def data_file(
    repository: str,
    name: str,
    stage: str,
    *,
    instead: str,
    revision: str | None = None,
) -> Path:
    """A file of a data set, fetched on first use.

    Args:
        repository: The data set's repository.
        name: The name of the file in it.
        stage: for messages.
        instead: Advice for working without the Hub.
        revision: a commit; None for the newest.

    Raises:
        NetworkError, ResourceError: it cannot be fetched.
    """
    from huggingface_hub import errors, hf_hub_download
    from huggingface_hub.utils import logging

    # What it says of each attempt; why the last one failed is in our error.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    try:
        return Path(
            hf_hub_download(repository, name, repo_type="dataset", revision=revision)
        )
    except (OSError, http_error) as error:
        raise hub_error(repository, error, stage, instead) from error


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

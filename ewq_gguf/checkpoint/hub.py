"""Repositories of the Hub: their files, and what its client's errors mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ewq_gguf.checkpoint.remote import RemoteFile
from ewq_gguf.errors import InputError, NetworkError, ResourceError

#: What a conversion needs of a Hub repository; no code, no pickles.
HUB_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "README.md")


def snapshot(hub_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The folder of a repository's files in the Hub's cache, downloaded if need be.

    Raises:
        InputError: the Hub allows no such name.
        NetworkError: it refused or cannot be reached.
        ResourceError: the download cannot be written.
    """
    from huggingface_hub import errors, snapshot_download

    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns))
        )
    except errors.HFValidationError as error:
        raise InputError(
            "scan",
            hub_id,
            "no such file or folder, and no name that the Hub allows",
            "check the spelling",
        ) from error
    except (OSError, http_error) as error:
        raise hub_error(hub_id, error) from error


def opener(hub_id: str, revision: str | None) -> Callable[[str], RemoteFile]:
    """Opens a repository's files where they are."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers

    headers = build_hf_headers()
    return lambda name: RemoteFile(hf_hub_url(hub_id, name, revision=revision), headers)


def check_has_weights(hub_id: str, folder: Path) -> None:
    """Refuse a repository of GGUF files alone, and say what they were made from.

    Args:
        hub_id: `org/name`.
        folder: The folder of its small files, named as its commit.

    Raises:
        InputError: it has GGUF files and no safetensors.
    """
    from huggingface_hub import HfApi, errors

    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    try:
        names = HfApi().list_repo_files(hub_id, revision=folder.name)
    except (OSError, http_error, errors.HfHubHTTPError, errors.OfflineModeIsEnabled):
        return  # what is cached is looked at
    ggufs = [name for name in names if name.endswith(".gguf")]
    if not ggufs or any(name.endswith(".safetensors") for name in names):
        return
    base = _base_model(folder)
    raise InputError(
        "scan",
        hub_id,
        f"holds GGUF files only ({ggufs[0]}{', ...' if len(ggufs) > 1 else ''}), and "
        "ewq makes its own of unquantised weights",
        f"give the model that they were made from{f', {base}' if base else ''}"
        "; of a BF16 or F16 file its address works for scans and plans",
    )


def _base_model(folder: Path) -> str | None:
    """The model that a repository's card says it was made from."""
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    try:
        found = (metadata_load(card) or {}).get("base_model") if card.exists() else None
    except Exception:  # somebody's YAML
        return None
    first = found[0] if isinstance(found, list) and found else found
    return first if isinstance(first, str) and "/" in first else None


def hub_error(
    hub_id: str,
    error: Exception,
    stage: str = "scan",
    instead: str = "give a local folder",
) -> NetworkError | ResourceError:
    """An error of the Hub's client as one line with a remedy."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, OSError) and error.errno is not None:
        return ResourceError(
            stage,
            error.filename or hub_id,
            f"the download cannot be written ({error.strerror})",
            "free some space, or set HF_HOME to another folder",
        )
    # "Not cached" is all it says itself; its cause says why the Hub did not help.
    if isinstance(error, LocalEntryNotFoundError) and isinstance(
        error.__cause__, Exception
    ):
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = str(error).partition("\n")[0] or type(error).__name__
    if isinstance(error, GatedRepoError):
        problem, remedy = (
            "the repository is gated",
            "ask for access on its page, then run `hf auth login`",
        )
    elif isinstance(error, RepositoryNotFoundError):
        problem, remedy = (
            "no such repository, or it is private",
            "check the spelling, or run `hf auth login`",
        )
    elif isinstance(error, RevisionNotFoundError):
        problem, remedy = ("no such revision", "check what follows the @")
    elif isinstance(error, OfflineModeIsEnabled):
        problem, remedy = (
            "HF_HUB_OFFLINE is set and it is not cached",
            f"unset it, or {instead}",
        )
    elif status in (401, 403):
        problem, remedy = (f"the Hub refused ({reason})", "run `hf auth login`")
    elif status is not None:
        problem, remedy = (
            f"the Hub refused ({reason})",
            f"try again later, or {instead}",
        )
    else:
        problem, remedy = (
            f"the Hub cannot be reached ({reason}) and it is not cached",
            f"check the network, or {instead}",
        )
    return NetworkError(stage, hub_id, problem, remedy)

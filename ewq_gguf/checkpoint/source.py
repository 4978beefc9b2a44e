"""What MODEL names: a folder, a single file, a Hub id or the built-in model."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable
from pathlib import Path

from ewq_gguf.checkpoint.demo import DEMO_NAME, demo_checkpoint
from ewq_gguf.checkpoint.folder import Checkpoint, open_folder, read_config
from ewq_gguf.errors import InputError, NetworkError, ResourceError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

#: What a conversion needs of a Hub repository; no code, no pickles.
_HUB_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "README.md")


def open_checkpoint(
    model: str, *, on_line: Callable[[str], None] | None = None
) -> Checkpoint:
    """Find a model and read its config and headers, and no weight.

    Args:
        model: a folder, a .safetensors file, a Hub id, or `demo`.
        on_line: told about downloads.

    Raises:
        InputError: there is no such model, or it is not a sound checkpoint.
        NetworkError: the Hub refused or cannot be reached.
        ResourceError: a download cannot be written.
    """
    if model == "demo":
        return open_folder(demo_checkpoint(on_line=on_line), name=DEMO_NAME)
    try:
        return _open(model, on_line)
    except OSError as error:
        raise InputError(
            "scan",
            error.filename or model,
            f"cannot be read ({error.strerror})",
            "check its name and permissions",
        ) from error


def _open(model: str, on_line: Callable[[str], None] | None) -> Checkpoint:
    path = Path(model)
    if path.is_dir():
        return open_folder(path, name=path.resolve().name)
    if path.exists():
        return _open_file(path)
    if _HUB_ID.fullmatch(model):
        return _open_hub(model, on_line)
    raise InputError(
        "scan",
        model,
        "no such file or folder",
        "give a folder with config.json and *.safetensors, a Hub id, or `demo`",
    )


def _open_file(path: Path) -> Checkpoint:
    if not stat.S_ISREG(path.stat().st_mode) or path.suffix != ".safetensors":
        raise InputError(
            "scan",
            path,
            "is neither a folder nor a .safetensors file",
            "give the checkpoint's folder",
        )
    folder = path.parent
    return open_folder(folder, name=folder.resolve().name, only=path.name)


def _open_hub(hub_id: str, on_line: Callable[[str], None] | None) -> Checkpoint:
    if on_line is not None:
        on_line(f"fetching {hub_id} from the Hub")
    # The small files first: what cannot be converted is refused before its weights.
    folder = _snapshot(hub_id, None, _HUB_FILES)
    read_config(folder)
    for weights in ("model*.safetensors", "*.safetensors"):
        folder = _snapshot(hub_id, folder.name, (*_HUB_FILES, weights))
        if any(folder.glob(weights)):
            break
    return open_folder(
        folder, name=hub_id.split("/")[1], hub_id=hub_id, revision=folder.name
    )


def _snapshot(hub_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
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
        raise _hub_error(hub_id, error) from error


def _hub_error(hub_id: str, error: Exception) -> NetworkError | ResourceError:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if isinstance(error, OSError) and error.errno is not None:
        return ResourceError(
            "scan",
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
    elif isinstance(error, OfflineModeIsEnabled):
        problem, remedy = ("HF_HUB_OFFLINE is set and it is not cached", "unset it")
    elif status in (401, 403):
        problem, remedy = (f"the Hub refused ({reason})", "run `hf auth login`")
    elif status is not None:
        problem, remedy = (f"the Hub refused ({reason})", "try again later")
    else:
        problem, remedy = (
            f"the Hub cannot be reached ({reason}) and it is not cached",
            "check the network, or give a local folder",
        )
    return NetworkError("scan", hub_id, problem, remedy)

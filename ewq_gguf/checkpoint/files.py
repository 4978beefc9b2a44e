"""What may be opened in a checkpoint's folder, and its small JSON files.

Nothing outside the folder is, whatever the index or a link says, except the blobs of
the Hub's own cache; only regular files are.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from ewq_gguf.checkpoint.header import loads_strict
from ewq_gguf.errors import InputError

MAX_SMALL_BYTES = 64 << 20


def check_regular(folder: Path, path: Path) -> None:
    """Refuse what is no regular file inside the folder, or a blob of the Hub's cache.

    Raises:
        InputError: it is not, or cannot be looked at.
    """
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise InputError(
            "scan", path, f"cannot be read ({error})", "check the folder"
        ) from error
    root = folder.resolve()
    blobs = root.parent.parent / "blobs"
    if not real.is_relative_to(root) and not (
        root.parent.name == "snapshots" and real.is_relative_to(blobs)
    ):
        raise InputError(
            "scan",
            path,
            f"is a link that leaves the folder, to {real}",
            "copy the file into the folder",
        )
    if not stat.S_ISREG(mode):
        raise InputError("scan", path, "is not a regular file", "replace it")


def read_json_object(folder: Path, name: str) -> dict[str, Any]:
    """The object a JSON file holds, read as strictly as a header.

    Raises:
        InputError: it is too large, is not JSON, or is no object.
    """
    path = folder / name
    check_regular(folder, path)
    if path.stat().st_size > MAX_SMALL_BYTES:
        raise InputError(
            "scan",
            path,
            f"{path.stat().st_size:,} bytes are more than {MAX_SMALL_BYTES:,}",
            "download it again",
        )
    try:
        values = loads_strict(path.read_bytes())
    except json.JSONDecodeError as error:
        raise InputError(
            "scan",
            path,
            f"is not JSON at line {error.lineno}: {error.msg}",
            "download it again",
        ) from error
    except ValueError as error:
        raise InputError("scan", path, f"{error}", "download it again") from error
    if not isinstance(values, dict):
        raise InputError("scan", path, "is not a JSON object", "download it again")
    return values

"""What may be opened in a checkpoint's folder, and its small JSON files.

Nothing outside the folder is, whatever the index or a link says, except the blobs of
the Hub's own cache; only regular files are.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

from ewq_gguf.errors import InputError, printable
from ewq_gguf.strict_json import parse_json, read_json

MAX_SMALL_BYTES = 64 << 20
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def model_name(folder: Path) -> str:
    """What people call the model in a folder: no commit's hash of the Hub's cache."""
    *above, name = ("model", *folder.resolve().parts[1:])
    while _HASH.fullmatch(name) or name == "snapshots":
        *above, name = above
    return name.rpartition("--")[2] if name.startswith("models--") else name


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


def no_checkpoint(folder: Path, problem: str) -> InputError:
    """The error for a folder that lacks something; its GGUF files may be meant."""
    ggufs = sorted(folder.glob("*.gguf"))
    remedy = "give the folder of a Hugging Face checkpoint"
    if ggufs:
        remedy = f"give an unquantised GGUF file itself, such as {printable(ggufs[0])}"
    return InputError("scan", folder, problem, remedy)


def read_json_object(folder: Path, name: str) -> dict[str, Any]:
    """The object a JSON file holds; of a key that repeats the last value.

    Raises:
        InputError: it is too large, is not JSON, or is no object.
    """
    path = folder / name
    check_regular(folder, path)
    _, values = read_json(
        path, "scan", "download it again", max_bytes=MAX_SMALL_BYTES, repeated=[]
    )
    if not isinstance(values, dict):
        raise InputError("scan", path, "is not a JSON object", "download it again")
    return values


def note_on_repeated_keys(path: Path) -> str | None:
    """A note on keys that a JSON file has twice; None without, or if it is no JSON."""
    found: list[str] = []
    try:
        parse_json(path.read_bytes(), found)
    except ValueError:
        return None
    if not found:
        return None
    keys = printable(", ".join(dict.fromkeys(found)), 200)
    return f"{printable(path)}: has {keys} twice; the last value is taken"

"""The files of a checkpoint's folder that may be opened; the small ones beside weights.

Nothing outside the folder is opened, whatever the index or a link says, except the
blobs of the Hub's own cache; only regular files are. Code is never among the small
files, so that none can run in a conversion.
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
    """The name of the model in a folder; never a commit's hash of the Hub's cache."""
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


_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".md"})
#: Where the converter reads more chat templates.
MORE_TEMPLATES = "additional_chat_templates"
_SUBFOLDER = re.compile(r"\w[\w.-]*")


def small_files_of(folder: Path) -> dict[str, Path]:
    """Config, tokenizer and card; no code, so that none can run in a conversion.

    Those of subfolders too that the converter reads, by their path in the folder.
    """
    found = list(folder.iterdir())
    for name in _subfolders(folder):
        if (folder / name).is_dir():
            found += (folder / name).iterdir()
    files = {}
    for path in sorted(found):
        if (
            path.suffix in _SUFFIXES
            and not path.name.endswith(".index.json")
            and path.is_file()
            and path.stat().st_size <= MAX_SMALL_BYTES
        ):
            check_regular(folder, path)
            files[path.relative_to(folder).as_posix()] = path
    return files


def _subfolders(folder: Path) -> list[str]:
    """The folders of chat templates and of modules of sentence-transformers."""
    return [MORE_TEMPLATES, *(str(module["path"]) for module in _modules(folder))]


def _modules(folder: Path) -> list[dict[str, Any]]:
    """The modules of modules.json that have a folder of their own.

    Raises:
        InputError: it is no list of modules, or one's path is no plain name.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return []
    check_regular(folder, path)
    try:
        modules = parse_json(path.read_bytes(), [])
        found = [module for module in modules if module["path"]]
        paths = [str(module["path"]) for module in found]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            "scan",
            path,
            f"is no list of sentence-transformers' modules ({error!r})",
            "download it again",
        ) from error
    for name in paths:
        if not _SUBFOLDER.fullmatch(name):
            raise InputError(
                "scan",
                path,
                f"a module's path is {name!r}, needed is a folder's name",
                "do not use this checkpoint",
            )
    return found


def note_on_modules(folder: Path) -> tuple[str, ...]:
    """Weights of sentence-transformers' own layers have no place in the GGUF."""
    left = [
        f"{module['path']} ({str(module.get('type')).rpartition('.')[2]})"
        for module in _modules(folder)
        if any((folder / module["path"]).glob("*.safetensors"))
    ]
    if not left:
        return ()
    text = f"{folder}: the GGUF is without the modules {', '.join(left)}"
    return (printable(text, 1000),)

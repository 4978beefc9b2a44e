"""What a conversion needs beside the weights, subfolders included; never code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ewq_gguf.checkpoint.files import MAX_SMALL_BYTES, check_regular
from ewq_gguf.errors import InputError, printable
from ewq_gguf.strict_json import parse_json

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
    """Of more chat templates, and of sentence-transformers' modules (`1_Pooling`)."""
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

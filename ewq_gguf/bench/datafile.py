"""Text files that users give: read whole, or refused where characters would be lost."""

from __future__ import annotations

from pathlib import Path

from ewq_gguf.errors import InputError

_BOM = b"\xef\xbb\xbf"


def read_text(path: Path, stage: str) -> str:
    """A UTF-8 file's text, line ends as they are.

    Args:
        path: of the file.
        stage: for messages.

    Raises:
        InputError: it cannot be read, is empty, begins with a byte order mark, holds a
            NUL, or is not UTF-8.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(
            stage, path, f"cannot be read ({error.strerror})", "check the path"
        ) from error
    if not raw.strip():
        raise InputError(stage, path, "is empty", "give a file with content")
    remedy = "save it as UTF-8 without a byte order mark"
    if raw.startswith(_BOM):
        raise InputError(stage, path, "begins with a byte order mark", remedy)
    if (place := raw.find(b"\0")) >= 0:
        raise InputError(stage, path, f"has a NUL at byte {place}", remedy)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 at byte {error.start}"
        raise InputError(stage, path, problem, remedy) from error

"""Results of reading files, remembered while the files stay as they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])
#: Two writes within the tick of a file system's clock leave a file the same times.
_CLOCK_TICK_NS = 2_000_000_000


def read_once(maxsize: int) -> Callable[[F], F]:
    """Let a function that reads a file remember its result while the file stays so.

    A file that was written a moment ago is read again: another write may leave it the
    same size and times.

    Args:
        maxsize: The number of files whose results are remembered, the latest ones.
    """

    def decorate(read: F) -> F:
        @lru_cache(maxsize)
        def remembered(_state: object, path: Path, **more: Any) -> Any:
            return read(path, **more)

        @wraps(read)
        def read_or_remember(path: Path, **more: Any) -> Any:
            try:
                found = path.stat()
            except OSError:
                return read(path, **more)
            times = found.st_mtime_ns, found.st_ctime_ns
            if time.time_ns() - max(times) < _CLOCK_TICK_NS:
                return read(path, **more)
            state = (path.absolute(), found.st_ino, found.st_size, times)
            return remembered(state, path, **more)

        return cast(F, read_or_remember)

    return decorate

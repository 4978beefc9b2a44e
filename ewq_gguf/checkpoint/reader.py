"""Reading ranges of weight files into reused buffers: preadv or HTTP, never mmap.

A mapped file that shrinks under its reader ends the process with SIGBUS; a read that
comes up short is an error with a name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.checkpoint.shards import ShardFile
from ewq_gguf.errors import InputError, ResourceError

#: Small enough to stay in the cache between the read and the count.
BUFFER_BYTES = 1 << 20


class RangeReader:
    """Open weight files, read by range; safe to share between threads."""

    def __init__(self) -> None:
        """Open nothing yet."""
        self._fds: dict[Path, int] = {}

    def __enter__(self) -> RangeReader:
        """Return the reader."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close every file."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def open(self, shard: ShardFile) -> None:
        """Open a file for reading; call before threads share the reader.

        Raises:
            InputError: it cannot be opened.
        """
        path = shard.path
        if shard.remote is None and path not in self._fds:
            try:
                self._fds[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise InputError(
                    "scan", path, f"cannot be read ({error.strerror})", "check it"
                ) from error

    def chunks(
        self, shard: ShardFile, begin: int, end: int, buffer: NDArray[np.uint8]
    ) -> Iterator[NDArray[np.uint8]]:
        """Bytes begin..end of a file, a full buffer at a time.

        Args:
            shard: opened before.
            begin: first byte.
            end: one past the last.
            buffer: (n,) uint8, reused: each chunk is a view of it.

        Raises:
            InputError: the file ends before `end`.
            ResourceError: the disk or the network file system failed.
            NetworkError: the server refused or failed too often.
        """
        if shard.remote is not None:
            yield from shard.remote.chunks(begin, end, buffer)
            return
        path, fd = shard.path, self._fds[shard.path]
        view = buffer.data
        for offset in range(begin, end, buffer.size):
            size = min(buffer.size, end - offset)
            filled = 0
            while filled < size:
                try:
                    n = os.preadv(fd, [view[filled:size]], offset + filled)
                except OSError as error:
                    raise ResourceError(
                        "scan",
                        path,
                        f"reading byte {offset + filled} failed ({error.strerror})",
                        "check the disk and run again",
                    ) from error
                if n == 0:
                    raise InputError(
                        "scan",
                        path,
                        f"ends at byte {offset + filled}, its header needs {end}: it "
                        "changed while it was read",
                        "run again when nothing writes it",
                    )
                filled += n
            yield buffer[:size]

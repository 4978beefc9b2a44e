"""Weight files that stay where they are: byte ranges over HTTP.

Nothing is stored. A range is streamed into the caller's buffer; a connection that
drops goes on where it stopped, and a server that is busy is asked again, a bounded
number of times.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ewq_gguf.errors import InputError, NetworkError, printable

_ATTEMPTS = 6
_MAX_WAIT_SECONDS = 60.0
_TIMEOUT_SECONDS = 30.0
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})


class RemoteFile:
    """One file on a server that answers range requests.

    Attributes:
        url: without credentials in it.
        size_bytes: The size of the whole file.
        etag: The ETag of the version that was opened, or None if the server gives none.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        wait_seconds: float = 1.0,
    ) -> None:
        """Ask for the size.

        Args:
            url: http or https.
            headers: The headers of every request, such as the Hub's authorisation.
            wait_seconds: before the second attempt; doubled for each further one.

        Raises:
            NetworkError: the server refuses, or does not answer range requests.
        """
        self.url = url
        self._headers = dict(headers or {})
        self._wait_seconds = wait_seconds
        self.etag: str | None = None
        self.size_bytes = -1
        self.read(0, 1)

    def read(self, begin: int, end: int) -> bytes:
        """Bytes begin..end, fewer where the file ends before."""
        buffer = np.empty(end - begin, np.uint8)
        return b"".join(chunk.tobytes() for chunk in self.chunks(begin, end, buffer))

    def chunks(
        self, begin: int, end: int, buffer: NDArray[np.uint8]
    ) -> Iterator[NDArray[np.uint8]]:
        """Bytes begin..end of the file, a full buffer at a time.

        Raises:
            NetworkError: the server refuses, or fails too often.
            InputError: the file changed since it was opened.
        """
        if self.size_bytes >= 0:
            end = min(end, self.size_bytes)
        filled, position, failures = 0, begin, 0
        while position < end:
            try:
                for data in self._stream(position, end):
                    failures = 0
                    position += len(data)
                    view = np.frombuffer(data, np.uint8)
                    while view.size:
                        taken = min(buffer.size - filled, view.size)
                        buffer[filled : filled + taken] = view[:taken]
                        filled, view = filled + taken, view[taken:]
                        if filled == buffer.size:
                            yield buffer
                            filled = 0
                if position < end and self.size_bytes >= 0:
                    end = min(end, self.size_bytes)
                    if position < end:
                        raise _Again("the connection ended early", None)
            except _Again as again:
                failures += 1
                if failures == _ATTEMPTS:
                    raise self._error(
                        f"{again.problem}, {failures} times in a row at byte "
                        f"{position}",
                        "try again later; what was measured is kept",
                    ) from again
                time.sleep(self._pause(failures, again.retry_after))
        if filled:
            yield buffer[:filled]

    def _stream(self, begin: int, end: int) -> Iterator[bytes]:
        """One request; what it brings, until it ends or breaks."""
        from huggingface_hub import errors, get_session

        http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
        headers = {
            **self._headers,
            "Range": f"bytes={begin}-{end - 1}",
            "Accept-Encoding": "identity",
        }
        try:
            with get_session().stream(
                "GET",
                self.url,
                headers=headers,
                timeout=_TIMEOUT_SECONDS,
                follow_redirects=True,
            ) as response:
                self._check(response, begin)
                yield from response.iter_raw()
        except http_error as error:
            raise _Again(printable(error) or type(error).__name__, None) from error

    def _check(self, response: Any, begin: int) -> None:
        status = response.status_code
        if status in _BUSY:
            raise _Again(f"answered {status}", response.headers.get("Retry-After"))
        if status == 200:
            raise self._error(
                "the server ignores Range and would send the whole file",
                "download the checkpoint and give its folder",
            )
        if status in (401, 403):
            raise self._error(f"answered {status}: not allowed", "run `hf auth login`")
        if status != 206:
            raise self._error(f"answered {status}", "check the address")
        unit, _, total = response.headers.get("Content-Range", "").partition("/")
        if unit.split("-")[0] != f"bytes {begin}" or not total.isdecimal():
            raise self._error(
                f"answered another range ({printable(unit)}) than from byte {begin}",
                "download the checkpoint and give its folder",
            )
        etag = response.headers.get("ETag")
        if self.size_bytes < 0:
            self.size_bytes, self.etag = int(total), etag
        elif (self.size_bytes, self.etag) != (int(total), etag):
            raise InputError("scan", self.url, "changed while it was read", "run again")

    def _pause(self, failures: int, retry_after: str | None) -> float:
        """Seconds to wait: what the server asks for, else twice as long each time."""
        wanted: float = self._wait_seconds * 2 ** (failures - 1)
        if retry_after and retry_after.isdecimal():
            wanted = float(retry_after)
        return min(wanted, _MAX_WAIT_SECONDS)

    def _error(self, problem: str, remedy: str) -> NetworkError:
        return NetworkError("scan", self.url, problem, remedy)


def fetch_small(url: str, limit_bytes: int = 64 << 20) -> bytes | None:
    """A small file as a whole, or None where the server has none.

    Raises:
        NetworkError: the server refuses, or the file is larger than `limit_bytes`.
    """
    from huggingface_hub import errors, get_session

    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    try:
        with get_session().stream(
            "GET", url, timeout=_TIMEOUT_SECONDS, follow_redirects=True
        ) as response:
            if response.status_code == 404:
                return None
            problem = f"answered {response.status_code}"
            if response.status_code == 200:
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > limit_bytes:
                        break
                else:
                    return bytes(data)
                problem = f"is larger than {limit_bytes:,} bytes"
    except http_error as error:
        problem = printable(error) or type(error).__name__
    raise NetworkError("scan", url, problem, "check the address")


class _Again(Exception):
    """A failure worth another attempt."""

    def __init__(self, problem: str, retry_after: str | None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.retry_after = retry_after

"""A real HTTP server of one folder, with byte ranges and faults on demand."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Faults:
    """What the server does wrong, and what it saw.

    `statuses` are answered to the next requests for weights, one each; `drop_after`
    cuts every answer after so many bytes, `drops` times; `before_weights` is called
    before weights are sent, headers left out.
    """

    statuses: list[int] = field(default_factory=list)
    retry_after: str | None = None
    drop_after: int = 0
    drops: int = 0
    ignore_range: bool = False
    etag: str = '"one"'
    requests: list[str] = field(default_factory=list)
    before_weights: Callable[[], object] = lambda: None


@contextmanager
def running(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server on loopback with these answers; its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serve(folder: Path, faults: Faults) -> Iterator[str]:
    """Serve a folder on loopback; its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = folder / self.path.lstrip("/")
            faults.requests.append(f"{self.path} {self.headers.get('Range')}")
            if not path.is_file():
                self.answer(404, b"")
            elif path.suffix == ".safetensors" and faults.statuses:
                self.answer(faults.statuses.pop(0), b"")
            else:
                self.send_part(path.read_bytes())

        def answer(self, status, body, **headers):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if status in (429, 503) and faults.retry_after:
                self.send_header("Retry-After", faults.retry_after)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def send_part(self, data):
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted is None or faults.ignore_range:
                self.answer(200, data, ETag=faults.etag)
                return
            begin, end = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
            part = data[begin:end]
            if begin >= 8 + int.from_bytes(data[:8], "little"):
                faults.before_weights()
            content_range = f"bytes {begin}-{end - 1}/{len(data)}"
            if faults.drops and len(part) > faults.drop_after:
                faults.drops -= 1
                self.send_response(206)
                self.send_header("Content-Length", str(len(part)))
                self.send_header("Content-Range", content_range)
                self.send_header("ETag", faults.etag)
                self.end_headers()
                self.wfile.write(part[: faults.drop_after])
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True
                return
            self.answer(206, part, Content_Range=content_range, ETag=faults.etag)

    with running(Handler) as url:
        yield url

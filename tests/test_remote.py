"""Weight files over HTTP: exact bytes, whatever the server does."""

from pathlib import Path

import numpy as np
import pytest

from ewq_gguf.checkpoint.remote import RemoteFile
from ewq_gguf.errors import InputError, NetworkError
from tests.range_server import Faults, serve

DATA = np.random.default_rng(0).bytes(300_001)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "w.safetensors").write_bytes(DATA)
    return tmp_path


def read_all(url: str, begin: int = 0, end: int = len(DATA), size: int = 4096) -> bytes:
    file = RemoteFile(f"{url}/w.safetensors", wait_seconds=0.001)
    buffer = np.empty(size, np.uint8)
    return b"".join(chunk.tobytes() for chunk in file.chunks(begin, end, buffer))


@pytest.mark.parametrize(
    ("begin", "end", "size"),
    [(0, len(DATA), 4096), (1, 70_000, 8191), (299_999, 300_001, 10), (5, 5, 4)],
)
def test_a_range_is_exactly_its_bytes(folder: Path, begin: int, end: int, size: int):
    with serve(folder, Faults()) as url:
        assert read_all(url, begin, end, size) == DATA[begin:end]


def test_every_chunk_but_the_last_fills_the_buffer(folder: Path):
    with serve(folder, Faults()) as url:
        file = RemoteFile(f"{url}/w.safetensors")
        sizes = [c.size for c in file.chunks(0, 100_000, np.empty(30_000, np.uint8))]
    assert sizes == [30_000, 30_000, 30_000, 10_000]


def test_a_dropped_connection_goes_on_where_it_stopped(folder: Path):
    faults = Faults(drop_after=50_000, drops=4)
    with serve(folder, faults) as url:
        assert read_all(url) == DATA
    begins = [request.split("bytes=")[1].split("-")[0] for request in faults.requests]
    assert begins == ["0", "0", "50000", "100000", "150000", "200000"]


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_busy_server_is_asked_again(folder: Path, status: int):
    faults = Faults(statuses=[status, status])
    with serve(folder, faults) as url:
        assert read_all(url) == DATA
    assert len(faults.requests) == 4


def test_retry_after_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch):
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    with serve(folder, Faults(statuses=[429], retry_after="7")) as url:
        assert read_all(url) == DATA
    assert waited == [7.0]


def test_attempts_are_bounded(folder: Path):
    faults = Faults(statuses=[503] * 100)
    with (
        serve(folder, faults) as url,
        pytest.raises(NetworkError, match="503, 6 times"),
    ):
        read_all(url)
    assert len(faults.requests) == 6


def test_a_server_that_ignores_ranges_is_refused(folder: Path):
    with (
        serve(folder, Faults(ignore_range=True)) as url,
        pytest.raises(NetworkError, match="ignores Range"),
    ):
        read_all(url)


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "hf auth login"), (403, "hf auth login"), (404, "404")],
)
def test_a_refusal_is_final(folder: Path, status: int, message: str):
    faults = Faults(statuses=[status])
    with serve(folder, faults) as url, pytest.raises(NetworkError, match=message):
        read_all(url)
    assert len(faults.requests) == 1


def test_a_file_that_changes_between_requests_is_an_error(folder: Path):
    faults = Faults()
    with serve(folder, faults) as url:
        file = RemoteFile(f"{url}/w.safetensors", wait_seconds=0.001)
        faults.etag = '"two"'
        with pytest.raises(InputError, match="changed while it was read"):
            file.read(0, 10)


def test_nobody_there_is_a_network_error(folder: Path):
    with serve(folder, Faults()) as url:
        pass
    with pytest.raises(NetworkError, match="6 times in a row"):
        RemoteFile(f"{url}/w.safetensors", wait_seconds=0.001)

"""Scans on a Dask cluster: real schedulers, real workers, killed ones too."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ewq_gguf import api, errors
from ewq_gguf._version import __version__
from ewq_gguf.api import Options
from ewq_gguf.checkpoint import dask_scan as ours
from ewq_gguf.checkpoint import dask_worker
from ewq_gguf.checkpoint.mapping import map_tensors
from ewq_gguf.checkpoint.scan import Work, scan_checkpoint
from ewq_gguf.checkpoint.source import open_checkpoint
from ewq_gguf.cli import main
from ewq_gguf.errors import EwqError, InputError, ResourceError, ToolError
from ewq_gguf.records import Layout, Measures, Scan, TensorScan
from tests.checkpoints import write_llama
from tests.range_server import Faults, serve

ROOT = Path(__file__).parent.parent
SECONDS = 30

pytest.importorskip("distributed")


@dataclass
class Cluster:
    """A scheduler and its workers, each a process of its own.

    `prefixes` come before the command of each process: where it runs.
    """

    folder: Path
    protocol: str = "tcp"
    host: str = "127.0.0.1"
    prefixes: list[list[str]] = field(default_factory=lambda: [[], [], []])
    variables: dict[str, str] = field(default_factory=dict)
    preloads: dict[int, Path] = field(default_factory=dict)
    address: str = ""
    scheduler: subprocess.Popen[bytes] | None = None
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def env(self) -> dict[str, str]:
        own = {"PYTHONPATH": str(ROOT), "EWQ_CACHE": str(self.folder / "cache")}
        return {**os.environ, **own, **self.variables}

    def child(self, index: int, *args: str) -> subprocess.Popen[bytes]:
        kind = "worker" if index else "scheduler"
        if index in self.preloads:
            args = (*args, "--preload", str(self.preloads[index]))
        module = [sys.executable, "-m", f"distributed.cli.dask_{kind}"]
        with (self.folder / f"{kind}-{index}.log").open("wb") as log:
            return subprocess.Popen(
                [*self.prefixes[index], *module, *args, "--no-dashboard"],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start(self) -> None:
        file = self.folder / "scheduler.json"
        at = ["--host", self.host, "--port", "0", "--protocol", self.protocol]
        self.scheduler = self.child(0, *at, "--scheduler-file", str(file))
        wait_for(lambda: file.is_file() and file.stat().st_size)
        self.address = json.loads(file.read_text())["address"]
        for index in range(1, len(self.prefixes)):
            local = ["--local-directory", str(self.folder / f"worker-{index}")]
            own = ["--no-nanny", "--nthreads", "1", "--death-timeout", "60"]
            worker = self.child(index, self.address, *own, *local)
            self.workers.append(worker)
        for index in range(1, len(self.prefixes)):
            log = self.folder / f"worker-{index}.log"
            wait_for(lambda log=log: "Registered to" in log.read_text())

    def stop(self) -> None:
        for child in filter(None, [*self.workers, self.scheduler]):
            child.kill()
            child.wait(SECONDS)

    def ewq(self, *args: str | Path) -> subprocess.Popen[str]:
        """`ewq scan` with the cluster, with a cache of its own."""
        return subprocess.Popen(
            [
                *self.prefixes[0],
                *(sys.executable, "-m", "ewq_gguf", "scan"),
                *(str(arg) for arg in args),
                *("--scheduler", self.address),
            ],
            env=self.env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@contextmanager
def running(folder: Path, **values) -> Iterator[Cluster]:
    folder.mkdir()
    found = Cluster(folder, **values)
    try:
        found.start()
        yield found
    finally:
        found.stop()


def wait_for(condition) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


class Held:
    """A server that sends `n_free` ranges of weights and then waits for `go_on`."""

    def __init__(self, n_free: int) -> None:
        self.url = ""
        self.go_on = threading.Event()
        self.n_waiting = -n_free
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            self.n_waiting += 1
            must_wait = self.n_waiting > 0
        if must_wait:
            self.go_on.wait(SECONDS)


@contextmanager
def holding(folder: Path, n_free: int = 0) -> Iterator[Held]:
    held = Held(n_free)
    with serve(folder, Faults(before_weights=held.wait)) as held.url:
        try:
            yield held
        finally:
            held.go_on.set()


def finish(child: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr."""
    try:
        _, stderr = child.communicate(timeout=SECONDS)
    finally:
        child.kill()
        child.wait()
    return child.returncode, stderr


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("dask") / "cluster") as found:
        yield found


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path / "cache"))
    return write_llama(tmp_path / "tiny", n_layers=3, n_shards=2)


def local_bytes(model: Path | str) -> bytes:
    return scan_checkpoint(open_checkpoint(str(model))).to_json().encode()


def on_cluster(scheduler: str, model: Path | str, **values) -> Scan:
    layout = values.pop("layout", None)
    checkpoint = open_checkpoint(str(model))
    work = Work(**values)
    return ours.scan_on_cluster(scheduler, checkpoint, Measures(), layout, work)


# The same bytes.


@pytest.mark.slow
def test_the_cluster_finds_the_local_bytes(cluster, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the workers run elsewhere
    assert main(["scan", "tiny", "-q", "--scheduler", cluster.address, "-o", "c"]) == 0
    assert Path("c").read_bytes() == local_bytes(tiny)


@pytest.mark.slow
def test_a_part_a_file_and_a_layout_go_to_the_cluster_too(cluster, tiny):
    checkpoint = open_checkpoint(str(tiny))
    part = Work(part=(2, 3))
    assert on_cluster(cluster.address, tiny, part=(2, 3)) == (
        scan_checkpoint(checkpoint, work=part)
    )
    file = next(tiny.glob("*.safetensors"))
    assert on_cluster(cluster.address, file) == scan_checkpoint(
        open_checkpoint(str(file))
    )
    layout = by_layout(tiny)
    found = on_cluster(cluster.address, tiny, layout=layout)
    assert found == scan_checkpoint(checkpoint, layout=layout)
    assert found.tensors[0].n_weights == 10 * 64


def by_layout(folder: Path) -> Layout:
    """What a converter might say that takes ten rows of the embedding."""
    checkpoint = open_checkpoint(str(folder))
    tensors = []
    for tensor in map_tensors(checkpoint)[0]:
        source: dict[str, object] = {"hf_name": tensor.hf_names[0]}
        shape = list(tensor.shape)
        if tensor.name == "token_embd.weight":
            shape[0] = 10
            source["box"] = [[0, 10, 1], [0, shape[1], 1]]
        values = {"name": tensor.name, "shape": shape, "ggml_type": "BF16"}
        tensors.append({**values, "sources": [source]})
    record: dict[str, object] = {
        "converter_commit": "none",
        "model_fingerprint": checkpoint.identity.fingerprint,
        "kv_bytes": 0,
        "added_kv_bytes": 0,
        "tensors": tensors,
        "preset_bytes": {},
    }
    return Layout.model_validate_json(json.dumps(record))


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_changes_no_byte(tiny, tmp_path):
    """Both workers hold a part, their server keeps them waiting, one is killed."""
    with holding(tiny.parent) as held, running(tmp_path / "c") as cluster:
        child = cluster.ewq(f"{held.url}/tiny", "-o", "c.json")
        wait_for(lambda: held.n_waiting == 2)
        cluster.workers[0].kill()
        cluster.workers[0].wait(SECONDS)
        held.go_on.set()
        assert finish(child)[0] == 0
        log = (cluster.folder / "scheduler-0.log").read_text()
    assert log.count("Remove worker") == 1
    assert (tmp_path / "c" / "c.json").read_bytes() == local_bytes(tiny)


# Resuming.


@pytest.mark.slow
def test_a_client_that_was_stopped_asks_for_no_tensor_twice(cluster, tiny, tmp_path):
    class Stopped(Exception):
        pass

    known: dict[str, TensorScan] = {}

    def stop(tensor: TensorScan) -> None:
        known[tensor.name] = tensor
        if len(known) == 10:
            raise Stopped

    with pytest.raises(Stopped):
        on_cluster(cluster.address, tiny, on_tensor=stop)
    before = set(known)
    again: list[str] = []
    n_bytes: list[int] = []
    found = on_cluster(
        cluster.address,
        tiny,
        known=known,
        on_tensor=lambda tensor: again.append(tensor.name),
        on_bytes=n_bytes.append,
    )
    assert found.to_json().encode() == local_bytes(tiny)
    assert not before & set(again)
    assert len(before) + len(again) == len(found.tensors)
    sizes = {t.name: 2 * t.n_weights for t in found.tensors}
    assert sum(n_bytes) == sum(sizes[name] for name in again)


def test_what_is_known_needs_no_cluster(tiny):
    whole = scan_checkpoint(open_checkpoint(str(tiny)))
    known = {tensor.name: tensor for tensor in whole.tensors}
    assert on_cluster("tcp://127.0.0.1:1", tiny, known=known) == whole


def test_the_cluster_has_the_local_cache(tiny):
    checkpoint = open_checkpoint(str(tiny))
    first = api.scan(api.Run(checkpoint))
    options = Options(scheduler="tcp://127.0.0.1:1")
    assert api.scan(api.Run(checkpoint, options)) == first


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_client_cancels_and_goes_on_later(tiny, tmp_path, number):
    with holding(tiny.parent, n_free=12) as held, running(tmp_path / "c") as cluster:
        child = cluster.ewq(f"{held.url}/tiny")
        scans = cluster.folder / "cache" / "scans"
        wait_for(lambda: any(f.stat().st_size for f in scans.glob("*.journal")))
        wait_for(lambda: held.n_waiting == 2)
        started = time.monotonic()
        child.send_signal(number)
        code, error = finish(child)
        assert time.monotonic() - started < 5
        if number == signal.SIGINT:
            assert (code, error.splitlines()[-1]) == (130, "ewq: interrupted")
            log = (cluster.folder / "scheduler-0.log").read_text()
            assert re.search(r"requests to cancel \d keys", log)
        held.go_on.set()
        code, error = finish(cluster.ewq(f"{held.url}/tiny", "-o", "c.json"))
    assert code == 0
    assert re.search(r"ewq: [1-9]\d* tensors were measured before", error)
    assert (tmp_path / "c" / "c.json").read_bytes() == local_bytes(tiny)
    assert list(scans.glob("*.journal")) == []


# Errors.


def spoil(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-2:] = b"\xc0\x7f"
    shard.write_bytes(data)


@pytest.mark.slow
def test_a_workers_error_is_the_local_one(cluster, tiny, tmp_path, capsys):
    spoil(tiny)
    assert main(["scan", str(tiny), "-q"]) == 3
    local = capsys.readouterr().err
    assert "holds 1 NaN or infinite weights" in local
    assert finish(cluster.ewq(tiny, "-q")) == (3, local)
    options = Options(scheduler=cluster.address, allow_nonfinite=True)
    found = api.scan(api.Run(str(tiny), options))
    assert sum(tensor.n_nonfinite for tensor in found.tensors) == 1


KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, EwqError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_travel(kind: type[EwqError]):
    error = kind("scan", Path("a\x1b"), "p" * 3000 + "\n", "r")
    error.log_tail = ("a",)  # type: ignore[attr-defined]
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (kind, str(error), vars(error))
    assert copy.exit_code == error.exit_code


def request(folder: Path, **values) -> str:
    checkpoint = open_checkpoint(str(folder))
    standard: dict[str, object] = {
        "run": str(folder),
        "origin": checkpoint.origin,
        "is_streamed": False,
        "fingerprint": checkpoint.identity.fingerprint,
        "names": ["output_norm.weight"],
        "measures": {},
        "allow_nonfinite": False,
        "layout": None,
    }
    return json.dumps(standard | values)


def test_a_worker_answers_with_the_tensors_it_was_asked_for(tiny):
    text = dask_worker.measure_part(dask_worker.VERSION, request(tiny))
    answer = json.loads(text)
    assert [t["name"] for t in answer["tensors"]] == ["output_norm.weight"]


def test_a_worker_with_another_version_or_model_says_so(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    with pytest.raises(ToolError, match=r"node7: has ewq .*, the client ewq 0"):
        dask_worker.measure_part("ewq 0 on Python 3", request(tiny))
    with pytest.raises(InputError, match="for the worker on node7, and 123456789abc "):
        dask_worker.measure_part(
            dask_worker.VERSION, request(tiny, fingerprint="123456789abcdef")
        )
    gone = request(tiny, origin=str(tmp_path / "no"))
    with pytest.raises(InputError, match="on worker node7: no such file or folder"):
        dask_worker.measure_part(dask_worker.VERSION, gone)


@pytest.mark.parametrize("answer", ["", "{}", '{"tensors": []}'])
def test_a_foreign_answer_is_refused(tiny, answer):
    part = map_tensors(open_checkpoint(str(tiny)))[0][:2]
    with pytest.raises(InputError, match="answer is not about the tensors"):
        ours._checked(answer, part)


@pytest.mark.parametrize(
    ("scheduler", "code", "message"),
    [
        ("localhost", 2, "is not a scheduler's address"),
        ("http://a:1", 2, "is not a scheduler's address"),
        ("tcp://127.0.0.1:1", 7, "the scheduler cannot be reached"),
        ("tls://127.0.0.1:1", 7, "no certificate is configured"),
    ],
)
def test_a_scheduler_that_is_none(tiny, monkeypatch, capsys, scheduler, code, message):
    monkeypatch.setattr(ours, "_CONNECT_SECONDS", 0.5)
    started = time.monotonic()
    assert main(["scan", str(tiny), "-q", "--scheduler", scheduler]) == code
    assert time.monotonic() - started < 10
    error = capsys.readouterr().err
    assert error.startswith(f"ewq: scan: {scheduler}: ")
    assert message in error
    assert error.count("\n") == 1


def test_without_its_package_the_extra_is_named(tiny, monkeypatch, capsys):
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    assert main(["scan", str(tiny), "--scheduler", "tcp://a:1"]) == 4
    assert "pip install 'ewq-gguf[cluster]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cluster_that_has_or_keeps_no_worker(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "_LOOK_SECONDS", 0.3)
    monkeypatch.setattr(ours, "_WORKER_SECONDS", 1)
    with running(tmp_path / "c", prefixes=[[]]) as cluster:
        wanted = f"no worker for 1 s; start some with `dask worker {cluster.address}`"
        with pytest.raises(ResourceError, match=wanted):
            on_cluster(cluster.address, tiny)
    with (
        holding(tiny.parent, n_free=20) as held,
        running(tmp_path / "d", prefixes=[[], []]) as cluster,
        pytest.raises(ResourceError, match="no worker for 1 s"),
    ):
        on_cluster(
            cluster.address,
            f"{held.url}/tiny",
            on_tensor=lambda tensor: cluster.workers[0].kill(),
        )


@pytest.mark.slow
def test_a_scheduler_that_goes_away_is_an_error(tiny, tmp_path):
    with holding(tiny.parent) as held, running(tmp_path / "c") as cluster:
        child = cluster.ewq(f"{held.url}/tiny")
        wait_for(lambda: held.n_waiting == 2)
        assert cluster.scheduler is not None
        cluster.scheduler.kill()
        code, error = finish(child)
    assert code == 7
    assert error == (
        "ewq: scan\n"
        f"ewq: scan: {cluster.address}: the connection to the scheduler was lost; run "
        "again when it is back: what was measured is kept\n"
    )


DEADLY = """import os
from ewq_gguf.checkpoint import dask_worker
dask_worker.measure = lambda *args: os._exit(1)
"""
OLDER = "from ewq_gguf import _version; _version.__version__ = '0'"
WITHOUT = "import sys; sys.modules['ewq_gguf'] = None"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "preload", "code", "message"),
    [
        (1, DEADLY, 6, "1 workers died of the same part"),
        (1, OLDER, 4, f"has ewq 0, the client ewq {__version__}"),
        (1, WITHOUT, 4, f"has no ewq, the client ewq {__version__}"),
        (0, WITHOUT, 4, f"has no ewq, the client ewq {__version__}"),
    ],
    ids=["deadly", "older", "without", "scheduler-without"],
)
def test_machines_that_cannot(tiny, tmp_path, index, preload, code, message):
    file = tmp_path / "preload.py"
    file.write_text(preload)
    with running(
        tmp_path / "c",
        prefixes=[[], []],
        preloads={index: file},
        variables={"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"},
    ) as cluster:
        found, error = finish(cluster.ewq(tiny, "-q"))
    assert message in error
    assert (found, error.count("\n")) == (code, 1)


# Networks.


def openssl(folder: Path, *args: str) -> None:
    subprocess.run(
        ["openssl", *args],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=SECONDS,
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_a_cluster_behind_tls(tiny, tmp_path):
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for name in ("ours", "foreign"):
        files = ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", "/CN=ewq"]
        openssl(tmp_path, "req", "-x509", *curve, *files, "-days", "1")

    def settings(name: str) -> dict[str, str]:
        prefix = "DASK_DISTRIBUTED__COMM__TLS__"
        values = {f"{prefix}CA_FILE": str(tmp_path / f"{name}.pem")}
        for who in ("SCHEDULER", "WORKER", "CLIENT"):
            values[f"{prefix}{who}__CERT"] = str(tmp_path / f"{name}.pem")
            values[f"{prefix}{who}__KEY"] = str(tmp_path / f"{name}.key")
        return values

    ours_only = settings("ours")
    with running(tmp_path / "c", protocol="tls", variables=ours_only) as cluster:
        assert cluster.address.startswith("tls://")
        assert finish(cluster.ewq(tiny, "-q", "-o", "c.json")) == (0, "")
        cluster.variables = {**settings("foreign"), "EWQ_CACHE": str(tmp_path / "no")}
        code, error = finish(cluster.ewq(tiny, "-q"))
    assert (tmp_path / "c" / "c.json").read_bytes() == local_bytes(tiny)
    assert (code, error.count("\n")) == (7, 1)
    assert "the scheduler cannot be reached" in error


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, timeout=SECONDS)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Three network namespaces on one bridge, 10.213.7.1 to 3: the client's first."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs root and `ip` for hosts of their own")
    names = [f"ewq{os.getpid()}h{i}" for i in (1, 2, 3)]
    with ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
            make_network(names)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        yield names


def make_network(names: list[str]) -> None:
    """A bridge in the first host; the others are plugged into it."""
    first = ["-n", names[0]]
    ip(*first, "link", "add", "hub", "type", "bridge")
    ip(*first, "addr", "add", "10.213.7.1/24", "dev", "hub")
    for device in ("hub", "lo"):
        ip(*first, "link", "set", device, "up")
    for i, name in enumerate(names[1:], 2):
        peer = ["peer", "name", "eth0", "netns", name]
        ip(*first, "link", "add", f"port{i}", "type", "veth", *peer)
        ip(*first, "link", "set", f"port{i}", "master", "hub", "up")
        ip("-n", name, "addr", "add", f"10.213.7.{i}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            ip("-n", name, "link", "set", device, "up")


@pytest.mark.slow
def test_workers_on_hosts_of_their_own(hosts, tiny, tmp_path):
    prefixes = [["ip", "netns", "exec", name] for name in hosts]
    where = {"prefixes": prefixes, "host": "10.213.7.1"}
    with running(tmp_path / "c", **where) as cluster:
        assert finish(cluster.ewq(tiny, "-q", "-o", "c.json")) == (0, "")
        log = (cluster.folder / "scheduler-0.log").read_text()
    assert len(set(re.findall(r"Register worker addr: tcp://([\d.]+):", log))) == 2
    assert (tmp_path / "c" / "c.json").read_bytes() == local_bytes(tiny)

"""Checkpoints from the Hub, over a real local server that speaks its API."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from ewq_gguf.checkpoint.scan import scan_checkpoint
from ewq_gguf.checkpoint.source import open_checkpoint
from ewq_gguf.records import Plan, Scan, load_record
from tests.adapters import factors, write_adapter
from tests.checkpoints import write_llama
from tests.gguf_files import write_gguf
from tests.lattices import compressed, compressed_config, write_packed_llama

REVISION = "0123456789abcdef0123456789abcdef01234567"
HUB_ID = "org/tiny"


class FakeHub:
    """A server of one repository.

    Attributes:
        url: of its root.
        requests: method and path of each, in order.
        range_bytes: how many of them were asked for by range.
        refusal: (status, X-Error-Code) that every request is answered with.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[str] = []
        self.refusal: tuple[int, str] | None = None
        self.range_bytes = 0
        self.url = ""

    def weights(self) -> list[str]:
        """Requests for weight files."""
        return [line for line in self.requests if line.endswith(".safetensors")]


def make_handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            prefix = f"/{HUB_ID}/resolve/{REVISION}/"
            if hub.refusal:
                status, code = hub.refusal
                self.answer(status, b"{}", {"X-Error-Code": code})
            elif path.startswith(f"/api/models/{HUB_ID}/tree/"):
                files = [self.entry(file) for file in sorted(hub.folder.iterdir())]
                self.answer(200, json.dumps(files).encode())
            elif path.startswith(f"/api/models/{HUB_ID}"):
                files = [{"rfilename": f.name} for f in sorted(hub.folder.iterdir())]
                info = {"id": HUB_ID, "sha": REVISION, "siblings": files}
                self.answer(200, json.dumps(info).encode())
            elif path.startswith(prefix) and self.file(path).is_file():
                content = self.file(path).read_bytes()
                etag = f'"{sha256(content).hexdigest()}"'
                headers = {"ETag": etag, "X-Repo-Commit": REVISION}
                wanted = re.fullmatch(
                    r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")
                )
                if wanted is None:
                    self.answer(200, content, headers)
                    return
                begin, end = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
                hub.range_bytes += len(content[begin:end])
                headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
                self.answer(206, content[begin:end], headers)
            else:
                self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

        def file(self, path):
            return hub.folder / path.rpartition("/")[2]

        def entry(self, file):
            digest = sha256(file.read_bytes()).hexdigest()
            size = file.stat().st_size
            return {"type": "file", "oid": digest, "size": size, "path": file.name}

        def answer(self, status, body, headers=None):
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    return Handler


@contextmanager
def serving(folder: Path) -> Iterator[FakeHub]:
    hub = FakeHub(folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), make_handler(hub)) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def hub(tmp_path) -> Iterator[FakeHub]:
    """A Hub with one sound repository."""
    with serving(write_llama(tmp_path / "remote", n_layers=1)) as server:
        yield server


@pytest.fixture
def ewq(tmp_path, hub):
    """A function that runs `ewq` in a child, with a Hub cache of the test's own."""

    def run(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("HF_") and "proxy" not in name.lower()
        }
        env |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "EWQ_CACHE": str(tmp_path / "cache"),
            **variables,
        }
        return subprocess.run(
            [sys.executable, "-m", "ewq_gguf", *args],
            capture_output=True,
            text=True,
            env=env,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )

    return run


def edit_config(hub: FakeHub, **changes: object) -> None:
    path = hub.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load_scan(tmp_path: Path) -> Scan:
    return load_record(Scan, tmp_path / "plans" / "tiny.scan.json", "test")


def test_a_hub_id_is_fetched_once_and_known_by_its_commit(tmp_path, hub, ewq):
    first = ewq("scan", HUB_ID)
    assert (first.returncode, first.stdout) == (0, "plans/tiny.scan.json\n")
    assert "ewq: fetching org/tiny from the Hub" in first.stderr
    found = load_scan(tmp_path)
    assert (found.model.name, found.model.hub_id) == ("tiny", HUB_ID)
    assert found.model.revision == REVISION
    assert found.tensors == scan_of(hub.folder).tensors
    assert any(line.startswith("GET") for line in hub.weights())

    hub.requests.clear()
    (tmp_path / "plans" / "tiny.scan.json").unlink()
    again = ewq("scan", HUB_ID, "-q", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert load_scan(tmp_path) == found
    assert hub.requests == []


def scan_of(folder: Path) -> Scan:
    return scan_checkpoint(open_checkpoint(str(folder)))


def test_quiet_says_nothing_while_it_fetches(ewq):
    run = ewq("scan", HUB_ID, "-q")
    assert (run.returncode, run.stderr) == (0, "")


def test_only_what_a_conversion_needs_is_fetched(tmp_path, hub, ewq):
    for name in ("modeling_tiny.py", "pytorch_model.bin", "consolidated.safetensors"):
        (hub.folder / name).write_bytes(b"x")
    assert ewq("scan", HUB_ID, "-q").returncode == 0
    fetched = {line.rpartition("/")[2] for line in hub.requests if "/resolve/" in line}
    assert fetched == {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    }


def test_weights_of_another_name_are_fetched_where_none_is_called_model(
    tmp_path, hub, ewq
):
    (hub.folder / "model.safetensors").rename(hub.folder / "weights.safetensors")
    assert ewq("scan", HUB_ID, "-q").returncode == 0
    assert [s.name for s in load_scan(tmp_path).model.shards] == ["weights.safetensors"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "already (gptq)"),
        ({"architectures": ["LlamaForClassification"]}, "is not supported"),
        ({"architectures": []}, "architectures is []"),
    ],
)
@pytest.mark.fault(32, 34, 35)
def test_a_config_that_cannot_be_used_is_refused_before_the_weights(
    hub, ewq, changes, message
):
    edit_config(hub, **changes)
    run = ewq("scan", HUB_ID, "-q")
    assert run.returncode == 3
    assert message in run.stderr
    assert "GET /org/tiny/resolve" in "\n".join(hub.requests)
    assert hub.weights() == []


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((401, "RepoNotFound"), "no such repository, or it is private"),
        ((401, ""), "the Hub refused (Client error '401"),
        ((403, "GatedRepo"), "the repository is gated"),
        ((403, ""), "the Hub refused ("),
        ((404, "RepoNotFound"), "no such repository, or it is private"),
    ],
)
def test_a_refusal_names_the_login_command(hub, ewq, refusal, message):
    hub.refusal = refusal
    run = ewq("scan", HUB_ID, "-q")
    assert run.returncode == 7
    assert run.stderr.startswith(f"ewq: scan: {HUB_ID}: {message}")
    assert "`hf auth login`" in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_broken_server_is_named_as_such(hub, ewq):
    hub.refusal = (500, "")
    run = ewq("scan", HUB_ID, "-q")
    assert run.returncode == 7
    assert "the Hub refused (" in run.stderr
    assert "try again later" in run.stderr
    assert run.stderr.count("\n") == 1


def test_an_unreachable_hub_is_a_network_error(ewq):
    run = ewq("scan", HUB_ID, "-q", HF_ENDPOINT="http://127.0.0.1:9")
    assert run.returncode == 7
    assert "the Hub cannot be reached" in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_plan_by_classifier_reads_headers_only(tmp_path, hub, ewq):
    run = ewq("plan", HUB_ID, "-q", "--policy", "fastewq", "-o", "plan.json")

    assert (run.returncode, run.stderr) == (0, "")
    plan = load_record(Plan, tmp_path / "plan.json", "test")
    assert plan.model.hub_id == HUB_ID
    assert plan.weights_sha256 is None
    assert plan.totals.is_estimate  # nobody asked the converter
    file = hub.folder / "model.safetensors"
    n_header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    # Of the weights nothing but the header, and a few bytes to learn the file's size.
    assert n_header <= hub.range_bytes < n_header + 100 < file.stat().st_size
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_packed_weights_are_fetched_for_a_classifier_too(tmp_path, hub, ewq):
    write_packed_llama(hub.folder, compressed, compressed_config())

    run = ewq("plan", HUB_ID, "-q", "--policy", "fastewq", "-o", "plan.json")
    streamed = ewq("scan", HUB_ID, "-q", "--stream")

    assert (run.returncode, run.stderr) == (0, "")
    plan = load_record(Plan, tmp_path / "plan.json", "test")
    assert plan.model.hub_id == HUB_ID
    assert sum(tensor.is_exact for tensor in plan.tensors) == 14
    assert streamed.returncode == 3
    assert "packed (compressed-tensors) and not on this machine" in streamed.stderr


def test_offline_a_plan_by_classifier_takes_what_is_cached(tmp_path, hub, ewq):
    assert ewq("scan", HUB_ID, "-q").returncode == 0
    hub.requests.clear()

    args = ("plan", HUB_ID, "-q", "--policy", "fastewq", "-o", "plan.json")
    run = ewq(*args, HF_HUB_OFFLINE="1")

    assert (run.returncode, run.stderr) == (0, "")
    assert hub.requests == []


def test_offline_and_not_cached_fails_at_once(hub, ewq):
    run = ewq("scan", HUB_ID, "-q", HF_HUB_OFFLINE="1")
    assert run.returncode == 7
    assert "HF_HUB_OFFLINE is set and it is not cached; unset it" in run.stderr
    assert run.stderr.count("\n") == 1
    assert hub.requests == []


def test_a_cache_that_cannot_be_written_is_a_resource_error(tmp_path, ewq):
    (tmp_path / "file").write_text("")
    run = ewq("scan", HUB_ID, "-q", HF_HOME=str(tmp_path / "file"))
    assert run.returncode == 6
    assert "the download cannot be written (Not a directory)" in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_token_is_never_said(hub, ewq):
    hub.refusal = (401, "")
    token = "hf_abcdefghijklmnopqrstuvwxyz01234567"
    run = ewq("scan", HUB_ID, HF_TOKEN=token)
    assert run.returncode == 7
    assert token not in run.stdout + run.stderr


def test_a_local_folder_wins_over_a_hub_id(tmp_path, hub, monkeypatch):
    local = write_llama(tmp_path / "here" / "org" / "tiny", n_layers=1)
    monkeypatch.chdir(tmp_path / "here")
    checkpoint = open_checkpoint(HUB_ID)
    assert checkpoint.folder.samefile(local)
    assert checkpoint.identity.hub_id is None
    assert hub.requests == []


@pytest.mark.parametrize(
    "page", ["org/tiny", "org/tiny/tree/main", "org/tiny/blob/main/model.safetensors"]
)
def test_a_page_of_the_hub_or_its_mirror_is_the_model(tmp_path, hub, ewq, page):
    run = ewq("scan", f"{hub.url}/{page}", "-q")
    assert (run.returncode, run.stderr) == (0, "")
    model = load_scan(tmp_path).model
    assert (model.name, model.hub_id, model.revision) == ("tiny", HUB_ID, REVISION)


@pytest.mark.parametrize("has_config", [True, False])
def test_a_repository_of_gguf_files_alone_names_what_it_was_made_from(
    hub, ewq, has_config
):
    (hub.folder / "model.safetensors").unlink()
    (hub.folder / "tiny-Q4_K_M.gguf").write_bytes(b"GGUF")
    (hub.folder / "README.md").write_text("---\nbase_model:\n- org/whole\n---\n")
    if not has_config:
        (hub.folder / "config.json").unlink()
    run = ewq("scan", HUB_ID, "-q")
    assert run.returncode == 3
    assert "org/tiny: holds GGUF files only (tiny-Q4_K_M.gguf)" in run.stderr
    assert "give the model that they were made from, org/whole" in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_gguf_of_the_hub_is_scanned_where_it_is(tmp_path, hub, ewq):
    names = ["blk.0.attn_q.weight", "token_embd.weight"]
    write_gguf(hub.folder / "tiny-BF16.gguf", dict.fromkeys(names, (2, 256)))
    run = ewq(
        "scan", f"{hub.url}/{HUB_ID}/blob/{REVISION}/tiny-BF16.gguf", "-o", "s.json"
    )
    assert run.returncode == 0, run.stderr
    tensors = load_record(Scan, tmp_path / "s.json", "test").tensors
    assert {tensor.name for tensor in tensors} == set(names)


def test_an_adapter_of_the_hub_is_known_by_its_commit(tmp_path, hub, ewq):
    """The base's weights are not asked for where only the adapter is on the Hub."""
    base = write_llama(tmp_path / "base", n_layers=1)
    module = "model.layers.0.self_attn.q_proj"
    write_adapter(hub.folder, factors(module, 64, 64))
    done = ewq("scan", str(base), "--adapter", HUB_ID)
    assert (done.returncode, done.stdout) == (0, "plans/base-tiny.scan.json\n")
    assert "ewq: fetching org/tiny from the Hub" in done.stderr
    fetched = {line.rpartition("/")[2] for line in hub.weights()}
    assert fetched == {"adapter_model.safetensors"}
    scan = load_record(Scan, tmp_path / "plans" / "base-tiny.scan.json", "test")
    (adapter,) = scan.model.adapters
    assert (adapter.hub_id, adapter.revision) == (HUB_ID, REVISION)

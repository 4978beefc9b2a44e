"""Questions and bills from the Hub: a real local server, real parquet files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from ewq_gguf.bench.answers.scores import load_prompts
from ewq_gguf.bench.questions.mmlu_data import load_task
from ewq_gguf.errors import InputError
from tests.gguf_files import write_gguf

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEST, DEV = (
    f"cais/mmlu/all/{split}-00000-of-00001.parquet" for split in ("test", "dev")
)
BILLS = "FiscalNote/billsum/data/test-00000-of-00001.parquet"


class Server:
    """Data sets by path, `org/name/folder/file`; and what was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.url = ""

    def put(self, path: str, rows: list[dict[str, object]]) -> bytes:
        buffer = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        self.files[path] = buffer.getvalue().to_pybytes()
        return self.files[path]


@pytest.fixture
def server() -> Iterator[Server]:
    known = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            # /datasets/ORG/NAME/resolve/REVISION/PATH
            parts = unquote(urlsplit(self.path).path).split("/")
            known.requests.append(f"{self.command} {'/'.join(parts[5:])}")
            content = known.files.get("/".join([*parts[2:4], *parts[6:]]))
            is_there = content is not None and parts[5] in ("main", COMMIT)
            self.send_response(200 if is_there else 404)
            body = content if content is not None and is_there else b"{}"
            if is_there:
                self.send_header("ETag", f'"{sha256(body).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
            else:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        known.url = f"http://127.0.0.1:{http.server_port}"
        try:
            yield known
        finally:
            http.shutdown()
            thread.join()


@pytest.fixture
def python(tmp_path, server):
    """A function that runs Python in a child, with a Hub cache of the test's own."""

    def run(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "EWQ_")) and "proxy" not in name.lower()
        }
        env |= {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "EWQ_CACHE": str(tmp_path / "cache"),
            **variables,
        }
        return subprocess.run(
            [sys.executable, *args], capture_output=True, text=True, env=env,
            cwd=tmp_path, stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip

    return run


@pytest.fixture
def fetched(python):
    """A function that fetches a data set, and says where it is."""

    def fetch(name: str, **variables: str) -> Path:
        code = (
            f"from ewq_gguf.checkpoint.hub_data import {name} as f; print(f('bench'))"
        )
        run = python("-c", code, **variables)
        assert run.returncode == 0, run.stderr
        return Path(run.stdout.strip())

    return fetch


@pytest.fixture
def bench(tmp_path, python):
    """A function that runs `ewq bench` on a file that is never loaded."""
    path = write_gguf(tmp_path / "a.gguf", {"token_embd.weight": (8, 256)})

    def run(*args: str, **variables: str) -> tuple[int, str]:
        argv = ("-m", "ewq_gguf", "bench", str(path), "-q", *args)
        found = python(*argv, **variables)
        return found.returncode, found.stderr

    return run


def question(subject: str, n: int) -> dict[str, object]:
    choices = [f"{subject} {letter}" for letter in "wxyz"]
    return {
        "question": f"Question {n}?", "subject": subject, "choices": choices,
        "answer": n % 4,
    }  # fmt: skip


def put_questions(server: Server) -> None:
    # A subject's rows need not stand together.
    names = ("us_history", "maths", "us_history", "maths")
    server.put(TEST, [question(name, n) for n, name in enumerate(names)])
    server.put(DEV, [question(name, 9) for name in names[:2]])


def test_questions_of_the_hub_are_those_of_the_authors_files(tmp_path, server, fetched):
    put_questions(server)
    for split, rows in (("test", ((1, 3), (0, 2))), ("dev", ((9,), (9,)))):
        (tmp_path / split).mkdir()
        for subject, numbers in zip(("maths", "us_history"), rows, strict=True):
            lines = [
                f"Question {n}?,{subject} w,{subject} x,{subject} y,{subject} z,"
                f"{'ABCD'[n % 4]}\n"
                for n in numbers
            ]
            path = tmp_path / split / f"{subject}_{split}.csv"
            path.write_text("".join(lines))

    folder = fetched("mmlu_folder")

    task = load_task(folder, n_shots=1)
    assert task == load_task(tmp_path, n_shots=1)
    assert task.ids == ["maths/1", "maths/2", "us_history/1", "us_history/2"]
    # Both files are of one commit, even if the data set changes between them.
    asked = [line for line in server.requests if line.endswith(DEV[10:])]
    assert asked == [f"HEAD {COMMIT}/{DEV[10:]}", f"GET {COMMIT}/{DEV[10:]}"]
    server.requests.clear()
    assert fetched("mmlu_folder", HF_HUB_OFFLINE="1") == folder
    assert server.requests == []


def test_bills_are_prompts_and_their_summaries_references(server, fetched):
    rows = [{"text": f"Bill {n}.", "summary": f"S {n}.", "title": ""} for n in range(3)]
    server.put(BILLS, rows)

    first, second = load_prompts(fetched("billsum_file"), 2)

    assert (first.id, second.id) == ("row 1", "row 2")
    assert first.text.endswith("\n\nBill 0.")
    assert first.text.startswith("Summarize")
    assert second.reference == "S 1."


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["--tasks", "mmlu", "--mmlu", "hub"], "with --mmlu DIR"),
        (["--tasks", "generation", "--prompts", "billsum"], "with --prompts FILE"),
    ],
)
@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set and it is not cached; unset"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hub cannot be reached"),
        ({}, "the Hub refused (404"),
    ],
)
def test_without_the_hub_one_line_says_what_to_do(
    bench, options, remedy, variables, problem
):
    code, said = bench(*options, **variables)

    assert code == 7
    assert problem in said
    assert said.rstrip().endswith(remedy)
    assert said.count("\n") == 1


@pytest.mark.fault(66)
@pytest.mark.parametrize("damage", ["cut", "foreign", "empty", "page"])
@pytest.mark.parametrize(
    ("options", "path"),
    [
        (["--tasks", "mmlu", "--mmlu", "hub"], TEST),
        (["--tasks", "mmlu", "--mmlu", "hub"], DEV),
        (["--tasks", "generation", "--prompts", "billsum"], BILLS),
    ],
    ids=["test", "dev", "bills"],
)
def test_another_file_than_expected_is_refused(server, bench, options, path, damage):
    put_questions(server)
    whole = server.put(BILLS, [{"text": "Bill.", "summary": "S."}])
    if damage == "foreign":
        server.put(path, [{"other": 1}])
    else:
        whole = server.files[path]
        damaged = {"cut": whole[:-30], "empty": b"", "page": b"<html>Not found</html>"}
        server.files[path] = damaged[damage]

    code, said = bench(*options)

    assert code == 3, said
    problem = "has no column" if damage == "foreign" else "is not a sound parquet file"
    assert problem in said
    assert said.count("\n") == 1
    assert Path(path).name in said


@pytest.mark.fault(66, 70)
@pytest.mark.parametrize("name", ["text", "summary"])
@pytest.mark.parametrize("value", ["", " ", None])
def test_a_bill_without_text_or_summary_is_named(tmp_path, server, name, value):
    rows = [{"text": "Bill.", "summary": "S."}, {"text": "Bill.", "summary": "S."}]
    rows[1][name] = value
    path = tmp_path / "bills.parquet"
    path.write_bytes(server.put(BILLS, rows))

    with pytest.raises(InputError, match=f"row 2: has no {name}"):
        load_prompts(path)
    assert len(load_prompts(path, 1)) == 1


def test_a_parquet_file_without_rows_has_no_prompt(tmp_path):
    path = tmp_path / "bills.parquet"
    columns = {
        "text": pyarrow.array([], "string"),
        "summary": pyarrow.array([], "string"),
    }
    parquet.write_table(pyarrow.table(columns), path)

    with pytest.raises(InputError, match="has no prompt"):
        load_prompts(path)


def test_a_local_file_of_a_sources_name_is_reached_with_its_folder(tmp_path, bench):
    (tmp_path / "billsum").write_text(json.dumps({"prompt": " "}))

    code, said = bench("--tasks", "generation", "--prompts", "./billsum")

    assert code == 3
    assert "line 1: the prompt is empty" in said

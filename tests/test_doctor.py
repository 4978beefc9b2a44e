"""`ewq doctor`: faults are planted one by one, and each is named with its remedy."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from ewq_gguf import libraries, process
from ewq_gguf.doctor import Check, check_names, examine
from ewq_gguf.doctor import machine as machine_checks
from ewq_gguf.llamacpp import build, source
from ewq_gguf.llamacpp.hardware import hardware_key
from ewq_gguf.llamacpp.self_test import SelfTest
from ewq_gguf.llamacpp.toolchain import find_toolchain
from tests.range_server import running
from tests.test_toolchain import HELP

TOKEN = "hf_" + "a1b2c3d4e5" * 3
#: Settings of whoever runs the tests that would be found as well.
SETTINGS = (
    "EWQ_LLAMA_CPP", "TMPDIR", "CC", "CXX", "CUDACXX", "CUDAHOSTCXX", "HF_HOME",
    "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE",
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY",
    "https_proxy", "http_proxy", "all_proxy",
)  # fmt: skip


@pytest.fixture(autouse=True)
def without_settings(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    folder: Path = tmp_path / "cache"
    monkeypatch.setenv("EWQ_CACHE", str(folder))
    monkeypatch.delenv(libraries.LIBRARY_VARIABLE, raising=False)
    return folder


@pytest.fixture
def only_path(tmp_path, monkeypatch) -> Path:
    """A folder that is all of PATH."""
    folder: Path = tmp_path / "path"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def the(name: str) -> Check:
    """What one check finds."""
    (found,) = examine([name])
    return found


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def write_metadata(folder: Path, name: str, version: str) -> Path:
    """A package of that version, as far as anybody asks for it."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )
    return folder


def write_build(backend: str = "cpu", listed: str = "echo", **record) -> Path:
    """A finished build in the cache whose llama-bench runs `listed`."""
    folder = build.recipe_for("cpu").folder
    (folder / "bin").mkdir(parents=True)
    for name in (*build.TOOLS, "libllama.so"):
        write_program(folder / "bin" / name, listed if name == "llama-bench" else "")
    tree = source.cached_source()
    tree.mkdir(parents=True)
    for name in ("CMakeLists.txt", source.CONVERTER_NAME):
        (tree / name).write_text("")
    made = {
        "commit": libraries.LLAMA_CPP_COMMIT,
        "backend": backend,
        "machine": libraries.machine_key(),
        "flags": [],
        **record,
    }
    (folder / "build.json").write_text(json.dumps(made))
    pointer = libraries.pointer_path()
    pointer.write_text(json.dumps({"build": folder.name}))
    return folder


@contextmanager
def a_hub(status: int, answer: dict[str, str]) -> Iterator[str]:
    """A server that answers everything alike; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with running(Handler) as url:
        yield url


def ewq(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ewq_gguf", *args],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


# --- The command ---------------------------------------------------------------------


@pytest.mark.llamacpp
@pytest.mark.slow
def test_a_sound_installation_has_no_failure_and_every_line_is_aligned(tmp_path):
    result = ewq("doctor", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    heads = [line for line in result.stdout.splitlines() if line[0] != " "]
    begin, text = heads[0].index("python"), heads[0].index("3.")
    assert {line[:begin].strip() for line in heads} <= {"ok", "warning"}
    found = [line[begin:text].strip() for line in heads]
    assert [name for name in check_names() if name != "nvcc"] == (
        [name for name in found if name != "nvcc"]
    )
    assert "\x1b" not in result.stdout


@pytest.mark.slow
def test_json_lists_all_checks_and_a_failure_exits_with_4(tmp_path):
    (tmp_path / "file").write_text("")
    result = ewq(
        "doctor", "--json", EWQ_CACHE=str(tmp_path / "file"), HF_HUB_OFFLINE="1"
    )
    assert result.returncode == 4
    checks = json.loads(result.stdout)
    assert all(sorted(c) == ["found", "name", "remedy", "status"] for c in checks)
    status = {check["name"]: check["status"] for check in checks}
    assert status["python"] == "ok"
    assert status["cache"] == status["llama.cpp"] == "failure"
    assert status["hub"] == "warning"
    assert result.stderr.startswith("ewq: doctor: cache, llama.cpp: 2 of ")


def test_every_remedy_is_there_where_something_is_wrong(cache, only_path):
    offline = [name for name in check_names() if name not in ("imports", "hub")]
    for check in examine(offline):
        assert bool(check.remedy) == (check.status != "ok"), check


# --- Packages and Python -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "package", "status", "needed"),
    [
        ("packages", "filelock", "failure", "filelock>="),
        ("converter packages", "transformers", "failure", "transformers>=5"),
        ("extras", "sacrebleu", "warning", "sacrebleu>="),
    ],
)
def test_package_that_is_too_old(tmp_path, monkeypatch, name, package, status, needed):
    monkeypatch.syspath_prepend(write_metadata(tmp_path, package, "0.1"))
    found = the(name)
    assert found.status == status
    assert f"needs {needed}" in found.found
    assert "(0.1)" in found.found
    assert " install " in found.remedy
    assert needed in found.remedy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "problem"),
    [
        pytest.param("raise ImportError('libx.so.1: none')", "libx.so.1", id="raises"),
        pytest.param("import os; os.abort()", "SIGABRT", id="crashes"),
    ],
)
def test_package_that_does_not_load(tmp_path, monkeypatch, code, problem):
    write_metadata(tmp_path, "sentencepiece", "0.2.9")
    (tmp_path / "sentencepiece.py").write_text(code)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    found = the("imports")
    assert found.status == "failure"
    assert found.found.startswith("sentencepiece: ")
    assert problem in found.found
    assert "--force-reinstall" in found.remedy
    assert "sentencepiece==" in found.remedy


@pytest.mark.slow
def test_package_that_everything_needs_is_named_by_a_doctor_that_still_runs(tmp_path):
    write_metadata(tmp_path, "numpy", "2.9.9")
    (tmp_path / "numpy.py").write_text("raise ImportError('no libx', name='numpy')")
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    broken = os.pathsep.join(filter(None, paths))
    result = ewq("doctor", "--json", PYTHONPATH=broken, HF_HUB_OFFLINE="1")
    assert result.returncode == 4
    found = {check["name"]: check for check in json.loads(result.stdout)}
    assert found["imports"]["status"] == "failure"
    assert "numpy: ImportError: no libx" in found["imports"]["found"]
    assert "numpy==2.9.9" in found["imports"]["remedy"]
    assert found["working folder"]["status"] != "failure"
    assert "Traceback" not in result.stderr
    result = ewq("gguf", "demo", PYTHONPATH=broken)
    assert (result.returncode, result.stderr) == (
        4,
        "ewq: packages: numpy: cannot be imported (no libx); run `ewq doctor`\n",
    )


def test_encoding_that_is_not_utf_8(tmp_path):
    code = "from ewq_gguf.doctor import examine; print(*examine(['encoding']))"
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "LC_ALL": "C",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert "status='warning'" in child.stdout
    assert "export LC_ALL=C.UTF-8" in child.stdout


def test_folder_of_temporary_files_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    found = the("temporary files")
    assert found.status == "warning"
    assert str(tmp_path / "nowhere") in found.found
    assert "unset TMPDIR" in found.remedy


# --- llama.cpp -----------------------------------------------------------------------


def test_llama_cpp_that_is_not_built(cache):
    found = the("llama.cpp")
    assert (found.status, found.remedy) == ("failure", "run `ewq setup`")
    assert "is not built" in found.found


def test_cache_with_builds_of_other_cpus_only(cache):
    folder = cache / "toolchain"
    folder.mkdir(parents=True)
    for key in ("00000000", "ffffffff"):
        name = f"{libraries.LLAMA_CPP_COMMIT[:9]}-x86_64-{key}.default.json"
        (folder / name).write_text('{"build": "elsewhere"}')
    found = the("llama.cpp")
    assert found.status == "failure"
    assert "for 2 other kinds of CPU, not for this one" in found.found
    assert found.remedy == "run `ewq setup`"


def test_build_copied_from_another_cpu(cache):
    folder = write_build(machine="x86_64-00000000")
    found = the("llama.cpp")
    assert found.status == "failure"
    assert "x86_64-00000000" in found.found
    assert found.remedy == f"run `rm -r {folder} && ewq setup`"


def test_build_without_one_of_its_tools(cache):
    (write_build() / "bin" / "llama-imatrix").unlink()
    found = the("llama.cpp")
    assert (found.status, found.remedy) == ("failure", "run `ewq setup`")
    assert "llama-imatrix vanished" in found.found


def test_own_llama_cpp_that_is_nowhere(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("EWQ_LLAMA_CPP", str(tmp_path / "nowhere"))
    found = the("llama.cpp")
    assert found.status == "failure"
    assert "holds no llama-quantize" in found.found
    assert "leave --llama-cpp and EWQ_LLAMA_CPP away" in found.remedy


def test_own_converter_without_its_gguf_py(cache, tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    write_program(own / "llama-quantize", f"cat <<'END'\n{HELP}END")
    for name in ("llama-imatrix", "llama-perplexity", source.CONVERTER_NAME):
        write_program(own / name, "")
    monkeypatch.setenv("EWQ_LLAMA_CPP", str(own))
    found = the("llama.cpp")
    assert found.status == "warning"
    assert "has no gguf-py" in found.found
    assert "a whole checkout" in found.remedy


def test_self_test_that_failed_on_this_hardware(cache):
    verdict = SelfTest(
        False, "CPU computes wrong numbers with Q4_K", hardware_key("cpu")
    )
    write_build(self_test=verdict.to_record())
    found = the("self-test")
    assert found.status == "failure"
    assert "CPU computes wrong numbers with Q4_K" in found.found
    assert "run `ewq setup`" in found.remedy
    assert the("llama.cpp").status == "ok"


def test_build_that_passes_with_a_repair_only_says_so(cache):
    verdict = SelfTest(True, None, hardware_key("cpu"), devices=("CPU",), seconds=2.5)
    write_build(self_test=verdict.to_record(), repair="no-amx")
    found = the("self-test")
    assert found.status == "ok"
    assert "on CPU in 2.5 s; built with the repair no-amx" in found.found


def test_tools_that_do_not_run(cache):
    write_build(listed="echo libgomp.so.1: cannot open shared object file; exit 127")
    found = the("devices")
    assert found.status == "failure"
    assert "libgomp.so.1" in found.found
    assert "ewq setup" in found.remedy


def test_device_without_free_memory(cache):
    line = "  CUDA0: NVIDIA T4 (15000 MiB, 20 MiB free)"
    write_build("cuda", listed=f"echo '{line}'")
    found = the("devices")
    assert found.status == "warning"
    assert "20 MiB of 14.6 GiB free" in found.found
    assert "--device cpu" in found.remedy


def test_gpu_that_a_build_for_the_cpu_leaves_unused(cache, only_path):
    write_build()
    write_program(only_path / "nvidia-smi", "echo NVIDIA T4")
    write_program(only_path / "nvcc", "")
    found = the("backend")
    assert (found.status, found.remedy) == (
        "warning",
        "run `ewq setup --backend cuda`",
    )
    assert "NVIDIA T4 is there" in found.found


@pytest.mark.parametrize(
    ("backend", "status"), [("cuda", "failure"), ("cpu", "warning")]
)
def test_driver_that_does_not_answer(cache, only_path, backend, status):
    write_build(backend)
    write_program(only_path / "nvidia-smi", "echo cannot reach the driver; exit 9")
    found = the("backend")
    assert found.status == status
    assert "cannot reach the driver" in found.found
    assert "nvidia-smi" in found.remedy


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="a GPU of NVIDIA is here")
def test_build_for_cuda_without_a_gpu(cache, only_path):
    write_build("cuda")
    found = the("backend")
    assert found.status == "failure"
    assert "no GPU or driver" in found.found
    assert "ewq setup --backend cpu" in found.remedy
    assert the("devices").status == "failure"


def test_nvcc_that_refuses_the_compiler(cache, only_path):
    write_program(only_path / "nvidia-smi", "echo NVIDIA T4")
    write_program(only_path / "nvcc", "echo unsupported GNU version; exit 1")
    found = the("nvcc")
    assert found.status == "warning"
    assert "unsupported GNU version" in found.found
    assert "CUDAHOSTCXX" in found.remedy


def test_compiler_that_is_missing(cache, only_path):
    found = the("compiler")
    assert found.status == "failure"
    assert "C compiler: none of cc, gcc, clang is in PATH" in found.found
    assert "install" in found.remedy


def test_compiler_without_its_headers(cache, only_path):
    for name in ("cc", "c++"):
        write_program(only_path / name, "echo filesystem: No such file; exit 1")
    found = the("compiler")
    assert found.status == "failure"
    assert "cannot compile C++17" in found.found
    assert "filesystem: No such file" in found.found


@pytest.mark.llamacpp
def test_compiler_of_a_variable_is_only_a_warning_where_all_is_built(monkeypatch):
    monkeypatch.setenv("CXX", shutil.which("false") or "false")
    found = the("compiler")
    assert found.status == "warning"
    assert "needed at the next build only" in found.found
    assert found.remedy.startswith("run `unset CXX`")


# --- The bindings --------------------------------------------------------------------


def test_bindings_of_another_version(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(write_metadata(tmp_path, "llama_cpp_python", "0.2.1"))
    found = the("bindings")
    assert (found.status, found.remedy) == ("failure", "run `ewq setup`")
    assert f"0.2.1 does not fit the pinned llama.cpp, {source.BINDINGS_VERSION}" in (
        found.found
    )


def test_library_path_that_holds_no_library(tmp_path, monkeypatch):
    monkeypatch.setenv(libraries.LIBRARY_VARIABLE, str(tmp_path))
    found = the("bindings load")
    assert found.status == "failure"
    assert f"{libraries.LIBRARY_VARIABLE}={tmp_path}: does not load" in found.found
    assert found.remedy == f"run `unset {libraries.LIBRARY_VARIABLE}`"


@pytest.mark.llamacpp
def test_library_path_to_another_llama_cpp(tmp_path, monkeypatch):
    bin_dir = find_toolchain().bin_dir
    (tmp_path / "bin").symlink_to(bin_dir)
    monkeypatch.setenv(libraries.LIBRARY_VARIABLE, str(tmp_path / "bin"))
    found = the("bindings load")
    assert found.status == "warning"
    assert str(tmp_path / "bin") in found.found
    assert found.remedy == f"run `unset {libraries.LIBRARY_VARIABLE}`"


# --- The machine ---------------------------------------------------------------------


def test_cache_that_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path / "file"))
    found = the("cache")
    assert found.status == "failure"
    assert str(tmp_path / "file") in found.found
    assert "export EWQ_CACHE=FOLDER" in found.remedy


def test_cache_with_what_a_killed_run_left(cache):
    host = socket.gethostname()
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = cache / "base" / f".x.gguf.{host}.{dead.pid}-abc.ewq"
    working = cache / "base" / f".y.gguf.{host}.{os.getpid()}-abc.ewq"
    for folder in (left, working):
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(bytes(3 << 20))
    found = the("cache")
    assert found.status == "warning"
    assert "3 MiB in 1 folders of runs that were killed" in found.found
    assert found.remedy == f"run `rm -r {left}`"


def test_container_with_fewer_cores_than_it_shows(tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(machine_checks, "_CGROUP", tmp_path)
    found = the("cpu")
    assert found.status == "warning"
    assert "may use 0.5 of them" in found.found
    assert found.remedy == "run `taskset -c 0-0 ewq ...`"


def test_container_with_little_memory(tmp_path, monkeypatch):
    for name, text in {
        "memory.max": str(1 << 30),
        "memory.current": str(900 << 20),
        "memory.stat": "inactive_file 0\n",
    }.items():
        (tmp_path / name).write_text(text)
    for module in (machine_checks, process):
        monkeypatch.setattr(module, "_CGROUP", tmp_path)
    found = the("memory")
    assert found.status == "warning"
    assert found.found.startswith("124 MiB of ")
    assert "the container's limit is 1.0 GiB" in found.found


@pytest.mark.parametrize("name", ["cache", "working folder", "hub cache"])
@pytest.mark.parametrize(
    ("free", "status"), [(1 << 20, "failure"), (1 << 30, "warning")]
)
def test_disk_that_is_full_or_nearly(cache, monkeypatch, name, free, status):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    found = the(name)
    assert found.status == status
    assert found.remedy.startswith("free some space, or ")


def test_shell_that_limits_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        found = the("limits")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (found.status, found.remedy.split("`")[1]) == ("warning", "ulimit -n 1024")
    assert "128" in found.found


def test_working_folder_that_was_removed(tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    found = the("working folder")
    assert found.status == "failure"
    assert "cd" in found.remedy


def test_hub_cache_below_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "home"))
    found = the("hub cache")
    assert (found.status, found.remedy) == (
        "failure",
        "name another one: `export HF_HOME=FOLDER`",
    )


# --- The network ---------------------------------------------------------------------


def test_proxy_without_a_scheme_is_shown_without_its_password(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "ftp://me:secret@proxy:8080")
    found = the("proxy")
    assert found.status == "failure"
    assert "HTTPS_PROXY=ftp://proxy:8080 is no URL" in found.found
    assert "secret" not in found.found + found.remedy


def test_certificates_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    found = the("certificates")
    assert found.status == "failure"
    assert "unset SSL_CERT_FILE" in found.remedy


def test_offline_mode(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = the("hub")
    assert (found.status, found.remedy) == ("warning", "run `unset HF_HUB_OFFLINE`")


@pytest.mark.parametrize(
    ("status", "token", "expected", "says"),
    [
        (200, TOKEN, "ok", "signed in as somebody"),
        (401, TOKEN, "failure", "refuses the token in HF_TOKEN"),
        (401, "", "ok", "no token"),
        (503, "", "warning", "answers 503"),
    ],
)
def test_answer_of_the_hub(monkeypatch, tmp_path, status, token, expected, says):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with a_hub(status, {"name": "somebody", "error": f"bad token {TOKEN}"}) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        found = the("hub")
    assert found.status == expected
    assert says in found.found
    assert TOKEN not in found.found + found.remedy


def test_hub_that_cannot_be_reached_is_a_warning(monkeypatch, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    found = the("hub")
    assert found.status == "warning"
    assert "cannot be reached" in found.found


@pytest.mark.slow
def test_hub_that_never_answers_is_a_warning_after_seconds(monkeypatch, tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        found = the("hub")
    assert found.status == "warning"
    assert "timed out" in found.found

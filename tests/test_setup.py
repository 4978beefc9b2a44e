"""`ewq setup` outside a clone: bindings and llama.cpp in whatever environment it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest

from ewq_gguf import packages, store
from ewq_gguf.errors import ToolError
from ewq_gguf.libraries import LIBRARY_VARIABLE
from ewq_gguf.llamacpp import source
from ewq_gguf.llamacpp.setting_up import set_up

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = f"llama_cpp_python-{source.BINDINGS_VERSION}.tar.gz"


def run(*argv: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != LIBRARY_VARIABLE}
    return subprocess.run(
        [str(arg) for arg in argv],
        cwd=cwd,
        env={**inherited, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def real_cache() -> Path:
    """The cache that `make setup` filled."""
    return store.cache_dir()


@pytest.fixture
def cache(tmp_path, monkeypatch, real_cache) -> Path:
    """A cache with the real toolchain and downloads, and nothing else."""
    folder: Path = tmp_path / "cache"
    folder.mkdir()
    for name in ("toolchain", "downloads"):
        (folder / name).symlink_to(real_cache / name)
    monkeypatch.setenv("EWQ_CACHE", str(folder))
    return folder


def environment_without_bindings(folder: Path, *, has_pip: bool) -> Path:
    """This environment's packages in one of its own, but for llama-cpp-python.

    Returns:
        Its Python.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    here = Path(sysconfig.get_path("purelib"))
    (there,) = folder.glob("lib/python*/site-packages")
    left_out = ("llama_cpp", "__pycache__", *(() if has_pip else ("pip",)))
    for path in here.iterdir():
        if not path.name.startswith(left_out):
            (there / path.name).symlink_to(path)
    # This tree, whichever one is installed.
    (there / "a_tree.pth").write_text(f"{ROOT}\n")
    return folder / "bin" / "python"


# --- The environment -----------------------------------------------------------------


@pytest.mark.llamacpp
@pytest.mark.slow
@pytest.mark.parametrize("installer", ["pip", "pip from outside", "uv"])
def test_setup_installs_the_bindings_from_their_archive_without_an_index(
    cache, tmp_path, installer
):
    uv = shutil.which("uv")
    if installer == "uv" and uv is None:
        pytest.skip("uv is not in PATH")
    if not (cache / "downloads" / ARCHIVE).is_file():
        pytest.skip(f"{ARCHIVE} is not in the cache: the source came as a submodule")
    has_pip = installer == "pip"
    python = environment_without_bindings(tmp_path / "venv", has_pip=has_pip)
    outside = tmp_path / "outside"
    outside.mkdir()
    env = {
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "UV_OFFLINE": "1",
        "PATH": f"{python.parent}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
    }
    if installer == "uv" and uv is not None:
        (python.parent / "uv").symlink_to(uv)
    missing = run(python, "-c", "import llama_cpp", cwd=outside, **env)
    assert "No module named 'llama_cpp'" in missing.stderr
    result = run(python, "-m", "ewq_gguf", "setup", cwd=outside, **env)
    assert result.returncode == 0, result.stderr
    assert result.stderr == (
        f"toolchain: installing llama-cpp-python {source.BINDINGS_VERSION}\n"
    )
    (info,) = (tmp_path / "venv").glob("lib/*/site-packages/llama_cpp_python-*")
    assert (info / "INSTALLER").read_text().strip() == installer.split()[0]
    code = "import ewq_gguf, llama_cpp; print(llama_cpp.llama_cpp._lib._name)"
    loaded = run(python, "-c", code, cwd=outside, **env)
    assert Path(loaded.stdout.strip()).parent.parent == Path(result.stdout.strip())
    assert not list((tmp_path / "venv").rglob("libllama*"))
    started = time.monotonic()
    again = run(python, "-m", "ewq_gguf", "setup", cwd=outside, **env)
    assert (again.stdout, again.stderr) == (result.stdout, "")
    assert time.monotonic() - started < 5
    assert list(outside.iterdir()) == []


def test_setup_without_a_compiler_says_so_before_it_does_anything(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX", "EWQ_LLAMA_CPP"):
        monkeypatch.delenv(name, raising=False)
    lines: list[str] = []
    with pytest.raises(ToolError, match="C compiler: none of cc") as caught:
        set_up(on_line=lines.append)
    assert "install" in caught.value.remedy
    assert lines == []


@pytest.mark.parametrize(
    ("manager", "backend", "line"),
    [
        ("apt", "cuda", "apt install nvidia-cuda-toolkit"),
        ("dnf", "vulkan", "dnf install vulkan-loader-devel glslc"),
        ("pacman", "cuda", "pacman -S cuda"),
    ],
)
def test_missing_sdk_comes_with_the_line_of_the_package_manager(
    tmp_path, monkeypatch, manager, backend, line
):
    monkeypatch.setattr(
        "ewq_gguf.llamacpp.compilers._USUAL_NVCC", str(tmp_path / "nvcc")
    )
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    monkeypatch.delenv("CUDACXX", raising=False)
    for name in (manager, "cc", "c++"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("EWQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError) as caught:
        set_up(backend, on_line=pytest.fail)
    assert f"run `{line}" in caught.value.remedy


def test_python_of_the_system_is_refused_with_the_way_to_an_environment(
    tmp_path, monkeypatch
):
    (tmp_path / "EXTERNALLY-MANAGED").write_text("")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    packages.check_installable("setup")  # not of an environment
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    with pytest.raises(ToolError, match="PEP 668") as caught:
        packages.check_installable("setup")
    assert "python3 -m venv" in caught.value.remedy
    monkeypatch.setenv("PIP_BREAK_SYSTEM_PACKAGES", "1")
    packages.check_installable("setup")


@pytest.mark.parametrize(
    ("marker", "has_pip", "has_uv", "line"),
    [
        ("", True, True, f"{sys.executable} -m pip install 'x>=1'"),
        ("", False, True, f"uv pip install --python {sys.executable} 'x>=1'"),
        ("", False, False, f"{sys.executable} -m ensurepip && "),
        ("pipx_metadata.json", True, True, "pipx inject ewq-gguf 'x>=1'"),
    ],
    ids=["venv", "uv", "bare", "pipx"],
)
def test_install_line_suits_the_environment(
    tmp_path, monkeypatch, marker, has_pip, has_uv, line
):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(packages, "_has_pip", lambda: has_pip)
    monkeypatch.setenv("PATH", str(tmp_path))
    if marker:
        (tmp_path / marker).write_text("")
    if has_uv:
        (tmp_path / "uv").write_text("")
        (tmp_path / "uv").chmod(0o755)
    assert packages.install_line("x>=1").startswith(line)


def test_index_of_uv_is_pips_where_there_is_no_pip(monkeypatch):
    monkeypatch.setattr(packages, "_has_pip", lambda: False)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "UV_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://one/simple")
    monkeypatch.setenv("UV_INDEX", "two=https://two/simple https://three/s?a=b")
    assert packages._index_of_uv() == {
        "PIP_INDEX_URL": "https://one/simple",
        "PIP_EXTRA_INDEX_URL": "https://two/simple https://three/s?a=b",
    }
    monkeypatch.setenv("PIP_INDEX_URL", "https://mine/simple")
    assert "PIP_INDEX_URL" not in packages._index_of_uv()


def test_extras_are_told_apart_and_versions_that_are_too_old_found(
    tmp_path, monkeypatch
):
    info = tmp_path / "ewq_gguf-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: ewq-gguf\nVersion: 9\n"
        "Requires-Dist: click>=1\n"
        "Requires-Dist: numpy<1; extra == 'old'\n"
        "Requires-Dist: no-such-package>=2; extra == 'old'\n"
        "Requires-Dist: other; sys_platform == 'none' and extra == 'old'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert [r.name for r in packages.requirements()] == ["click"]
    assert packages.unmet(packages.requirements()) == ()
    old, absent = packages.unmet(packages.requirements("old"))
    assert (old.requirement, old.found) == (
        "numpy<1",
        packages.installed_version("numpy"),
    )
    assert str(absent) == "no-such-package>=2 (not installed)"


# --- From the package index ----------------------------------------------------------


@pytest.mark.network
def test_wheel_installed_outside_the_clone_leads_to_a_made_demo_file(
    tmp_path, real_cache
):
    """Takes minutes: torch and 77 MB of source are fetched; llama.cpp is not built."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/toolchain").symlink_to(real_cache / "toolchain")
    (tmp_path / "outside").mkdir()
    env = {"EWQ_CACHE": str(tmp_path / "cache"), "PYTHONPATH": ""}

    def call(*argv: str | Path) -> str:
        result = run(*argv, cwd=tmp_path / "outside", **env)
        assert result.returncode == 0, (argv, result.stdout, result.stderr)
        return result.stdout

    # A copy: building writes into the folder that it builds.
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "ewq_gguf", tree / "ewq_gguf")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, tree)
    (wheel,) = tmp_path.glob("ewq_gguf-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    data = {p for p in (ROOT / "ewq_gguf/data").rglob("*") if p.is_file()}
    assert {str(p.relative_to(ROOT)) for p in data if p.suffix != ".pyc"} <= packed

    call(sys.executable, "-m", "venv", tmp_path / "venv")
    bin_dir = tmp_path / "venv/bin"
    pip = [bin_dir / "python", "-m", "pip", "install", "-q"]
    call(*pip, "-c", ROOT / "constraints.txt", f"{wheel}[all]")
    call(bin_dir / "ewq", "setup")
    call(bin_dir / "ewq", "gguf", "demo", "-o", "demo.gguf")
    assert (tmp_path / "outside/demo.gguf").stat().st_size > 300_000_000
    checks = call(bin_dir / "ewq", "doctor")
    assert "failure" not in checks

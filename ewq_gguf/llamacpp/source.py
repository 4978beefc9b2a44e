"""llama.cpp's source tree at the pinned commit, and where it comes from.

In this order: the submodule of our checkout; the submodule after fetching it; the
tree inside the source distribution of llama-cpp-python, in the cache. Nothing is ever
extracted into vendor/: the tree's stray `.git` file would break `git status` there.
"""

from __future__ import annotations

import gzip
import importlib.util
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from ewq_gguf import packages, store
from ewq_gguf.errors import ChildError, NetworkError, ToolError
from ewq_gguf.libraries import LLAMA_CPP_COMMIT
from ewq_gguf.process import run

STAGE = "toolchain"
SUBMODULE = "vendor/llama.cpp"
BINDINGS_VERSION = "0.3.36"
CONVERTER_NAME = "convert_hf_to_gguf.py"

_SDIST = f"llama_cpp_python-{BINDINGS_VERSION}.tar.gz"
_PROBE_SECONDS = 15.0
_FETCH_SECONDS = 900.0
_CHECKOUT = Path(__file__).resolve().parents[2]
# Never ask for a password, and give up on a connection that has stalled.
_GIT = ("git", "-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=15")
_GIT_ENV = {"GIT_TERMINAL_PROMPT": "0", "GIT_SSH_COMMAND": "ssh -oBatchMode=yes"}

_BROKEN_ARCHIVE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError)

Note = Callable[[str], None]


def find_source(checkout: Path = _CHECKOUT) -> Path | None:
    """The pinned tree, where it is already on this machine; reads a few files only."""
    submodule = checkout / SUBMODULE
    if is_tree(submodule) and head_commit(submodule) == LLAMA_CPP_COMMIT:
        return submodule
    cached = cached_source()
    return cached if is_tree(cached) else None


def obtain_source(note: Note, checkout: Path = _CHECKOUT) -> Path:
    """The pinned tree, fetched if need be.

    Args:
        note: told what is fetched.
        checkout: the folder that may hold vendor/llama.cpp.

    Returns:
        A folder with llama.cpp's CMakeLists.txt.

    Raises:
        ToolError: the submodule is at another commit, or there is no pip.
        NetworkError: the tree cannot be fetched.
    """
    submodule = checkout / SUBMODULE
    if is_tree(submodule):
        check_submodule(submodule)
        return submodule
    cached = cached_source()
    if is_tree(cached):
        return cached
    if fetch_submodule(checkout, note):
        check_submodule(submodule)
        return submodule
    extract_sdist(download_sdist(note), cached)
    return cached


def is_tree(folder: Path) -> bool:
    """Whether a folder holds llama.cpp's source."""
    return (folder / "CMakeLists.txt").is_file() and (folder / CONVERTER_NAME).is_file()


def cached_source() -> Path:
    """Where the tree out of the source distribution is kept."""
    return store.cache_dir("toolchain") / f"source-{LLAMA_CPP_COMMIT[:9]}"


def check_submodule(submodule: Path) -> None:
    """Refuse a submodule at another commit.

    Raises:
        ToolError: naming both commits.
    """
    found = head_commit(submodule)
    if found != LLAMA_CPP_COMMIT:
        raise ToolError(
            STAGE,
            submodule,
            f"is at commit {found or 'unknown'}, {LLAMA_CPP_COMMIT} is needed",
            f"run `git submodule update --init {SUBMODULE}`",
        )


def head_commit(folder: Path) -> str | None:
    """The commit that is checked out in a git work tree, read without running git."""
    try:
        git = folder / ".git"
        if git.is_file():
            git = folder / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head if re.fullmatch("[0-9a-f]{40}", head) else None
        ref = head.removeprefix("ref:").strip()
        if (git / ref).is_file():
            return (git / ref).read_text().strip()
        for line in (git / "packed-refs").read_text().splitlines():
            commit, _, name = line.partition(" ")
            if name == ref:
                return commit
    except (OSError, ValueError):
        pass
    return None


def fetch_submodule(checkout: Path, note: Note) -> bool:
    """Fetch the submodule, where there is one and its repository answers.

    Returns:
        Whether the tree is there now. A repository that cannot be reached is no
        error: there is another source.
    """
    if shutil.which("git") is None or not (checkout / ".gitmodules").is_file():
        return False
    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder) / "git.log"

        def git(*args: str, seconds: float = _PROBE_SECONDS) -> str:
            return run(
                [*_GIT, *args],
                stage=STAGE,
                log_path=log_path,
                cwd=checkout,
                env=_GIT_ENV,
                timeout_seconds=seconds,
            )

        try:
            entry = git("ls-files", "--stage", "--", SUBMODULE)
            if not entry.startswith("160000 "):
                return False
            key = f"submodule.{SUBMODULE}.url"
            url = git("config", "--file", ".gitmodules", "--get", key).strip()
            git("ls-remote", "--exit-code", url, "HEAD")
            note(f"fetching {SUBMODULE} from {url}")
            git(
                *("submodule", "update", "--init", "--depth", "1", "--", SUBMODULE),
                seconds=_FETCH_SECONDS,
            )
        except ChildError as error:
            reason = error.log_tail[-1] if error.log_tail else error.problem
            note(f"{SUBMODULE} cannot be fetched ({reason})")
            return False
    return is_tree(checkout / SUBMODULE)


def download_sdist(note: Note) -> Path:
    """The source distribution of llama-cpp-python, from the package index or cache.

    Raises:
        ToolError: scikit-build-core is missing, or there is no pip to be had.
        NetworkError: the index cannot be reached.
    """
    downloads = store.cache_dir("downloads")
    archive = downloads / _SDIST
    if archive.is_file():
        return archive
    # pip reads the archive's metadata with it before it keeps the archive.
    if importlib.util.find_spec("scikit_build_core") is None:
        remedy = f"run `{packages.install_line('scikit-build-core')}`"
        raise ToolError(STAGE, "scikit-build-core", "is not installed", remedy)
    note(f"fetching llama.cpp in llama-cpp-python {BINDINGS_VERSION} (77 MB)")
    with store.replacing(archive, stage=STAGE) as temporary:
        _pip_download(temporary.parent, downloads / "pip.log")
    return archive


def extract_sdist(archive: Path, target: Path) -> None:
    """Take llama.cpp out of the source distribution, complete or not at all.

    Args:
        archive: the .tar.gz; removed if it is broken, so that the next run fetches
            it again.
        target: the folder that the tree becomes.

    Raises:
        ToolError: the archive is broken, hostile, or holds another commit.
        ResourceError: the cache cannot be written.
    """
    if not hasattr(tarfile, "data_filter"):
        version = ".".join(str(part) for part in sys.version_info[:3])
        raise ToolError(
            STAGE,
            f"Python {version}",
            "cannot extract archives safely",
            "use Python 3.11.4 or later",
        )
    with store.work_dir(target, stage=STAGE) as folder:
        try:
            _extract(archive, folder)
        except _BROKEN_ARCHIVE as error:
            archive.unlink(missing_ok=True)
            raise ToolError(
                STAGE,
                archive.name,
                f"cannot be extracted ({error})",
                "it was removed; run `ewq toolchain build` again",
            ) from error
        except OSError as error:
            raise store.write_error(STAGE, folder, error) from error
        top = archive.name.removesuffix(".tar.gz")
        tree = folder / top / SUBMODULE
        _check_recorded_commit(folder / top, archive)
        if not is_tree(tree):
            raise _not_our_tree(archive, "holds no llama.cpp")
        # It names a git folder that is not there and would make git fail inside.
        (tree / ".git").unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        tree.rename(target)


def _extract(archive: Path, folder: Path) -> None:
    top = archive.name.removesuffix(".tar.gz")
    wanted = (f"{top}/{SUBMODULE}/", f"{top}/.git/modules/{SUBMODULE}/HEAD")
    with tarfile.open(archive) as tar:
        # One pass: seeking back would decompress everything again.
        for member in tar:
            if member.name.startswith(wanted):
                tar.extract(member, folder, filter="data")


def _check_recorded_commit(top: Path, archive: Path) -> None:
    try:
        found = (top / ".git/modules" / SUBMODULE / "HEAD").read_text().strip()
    except (OSError, ValueError):
        found = "unknown"
    if found != LLAMA_CPP_COMMIT:
        problem = f"holds llama.cpp at commit {found}, {LLAMA_CPP_COMMIT} is needed"
        raise _not_our_tree(archive, problem)


def _not_our_tree(archive: Path, problem: str) -> ToolError:
    archive.unlink(missing_ok=True)
    remedy = f"run `git submodule update --init {SUBMODULE}` in a checkout of ewq-gguf"
    return ToolError(STAGE, archive.name, problem, remedy)


def _pip_download(folder: Path, log_path: Path) -> None:
    try:
        packages.run_pip(
            ["download", "--no-deps", "--no-build-isolation"]
            + ["--no-binary", "llama-cpp-python", "--dest", str(folder)]
            + [f"llama-cpp-python=={BINDINGS_VERSION}"],
            stage=STAGE,
            log_path=log_path,
            timeout_seconds=_FETCH_SECONDS,
        )
    except ChildError as error:
        reason = error.log_tail[-1] if error.log_tail else error.problem
        raise NetworkError(
            STAGE,
            f"llama-cpp-python {BINDINGS_VERSION}",
            f"its source distribution cannot be fetched ({reason})",
            f"check the network and pip's settings; pip's log is {log_path}",
        ) from error
    if not (folder / _SDIST).is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise NetworkError(
            STAGE,
            f"llama-cpp-python {BINDINGS_VERSION}",
            f"pip fetched {names} and not {_SDIST}",
            f"check pip's settings; its log is {log_path}",
        )

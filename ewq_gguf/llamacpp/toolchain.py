"""The llama.cpp that everything else uses: ours, built once, or the user's own."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.errors import ChildError, EwqError, ToolError
from ewq_gguf.libraries import LLAMA_CPP_COMMIT, default_build
from ewq_gguf.llamacpp import source as source_tree
from ewq_gguf.llamacpp.build import (
    LLAMA_CPP_BUILD,
    STAGE,
    missing_files,
    read_record,
)
from ewq_gguf.llamacpp.failures import explain_failure, failed
from ewq_gguf.llamacpp.self_test import (
    SelfTest,
    can_load,
    keep_self_test,
    read_self_test,
    run_self_test,
)
from ewq_gguf.llamacpp.source import CONVERTER_NAME
from ewq_gguf.process import run

__all__ = [
    "LLAMA_CPP_BUILD",
    "LLAMA_CPP_COMMIT",
    "Toolchain",
    "find_toolchain",
]

_BUILD_REMEDY = "run `ewq setup` (or `make setup`)"
_NEEDED_OPTIONS = ("--tensor-type-file", "--dry-run", "--override-kv", "--imatrix")
_PROBE_SECONDS = 30.0


@dataclass(frozen=True)
class Toolchain:
    """One llama.cpp: its tools, its converter and, where it is ours, its libraries.

    Attributes:
        commit: the full hash for ours; a short one or "unknown" for a user's own.
        source_dir: holds convert_hf_to_gguf.py, conversion/ and gguf-py/.
        bin_dir: holds the tools.
        lib_dir: holds libllama; None for a user's own, because the bindings fit the
            pinned commit only.
        backend: cpu, cuda, metal, vulkan, or user.
        flags: CMake's arguments; empty for a user's own.
        repair: how the build had to differ from the usual one to pass its self-test;
            `none` mostly.
        self_test: The verdict on ours on this hardware; None where it has not run.
    """

    commit: str
    source_dir: Path
    bin_dir: Path
    lib_dir: Path | None
    backend: str
    flags: tuple[str, ...]
    repair: str = "none"
    self_test: SelfTest | None = None

    def tool(self, name: str) -> Path:
        """The path of a tool, such as `llama-quantize`.

        Raises:
            ToolError: it is not there.
        """
        path = self.bin_dir / name
        if not path.is_file():
            raise ToolError(STAGE, name, f"is not in {self.bin_dir}", self._remedy())
        return path

    @property
    def converter(self) -> Path:
        """The path of convert_hf_to_gguf.py.

        Raises:
            ToolError: it is not there.
        """
        path = self.source_dir / CONVERTER_NAME
        if not path.is_file():
            problem = f"is not in {self.source_dir}"
            raise ToolError(STAGE, CONVERTER_NAME, problem, self._remedy())
        return path

    @property
    def key(self) -> str:
        """A text that its outputs depend on, for the cache: ours is the pinned commit.

        A user's own may change under the same commit, so its files' times count too.
        """
        if self.backend != "user":
            return self.commit
        stats = [p.stat() for p in (self.converter, self.tool("llama-quantize"))]
        return repr((self.commit, [(s.st_size, s.st_mtime_ns) for s in stats]))

    def explain(self, error: ChildError) -> EwqError:
        """The error, or the toolchain's own where its self-test fails."""
        return explain_failure(error) if self.lib_dir else error

    def converter_env(self) -> dict[str, str]:
        """Variables for the converter: its own gguf-py comes before any other gguf."""
        folders = [self.source_dir / "gguf-py", self.source_dir]
        paths = [str(folder) for folder in folders if folder.is_dir()]
        inherited = os.environ.get("PYTHONPATH")
        return {"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [inherited])])}

    def _remedy(self) -> str:
        if self.backend == "user":
            return "build it there, or leave --llama-cpp and EWQ_LLAMA_CPP away"
        return _BUILD_REMEDY


def _not_built() -> ToolError:
    """The error where there is no build, but that of a cache that is no folder."""
    store.cache_dir()
    return ToolError(STAGE, "llama.cpp", "is not built", _BUILD_REMEDY)


def find_toolchain(llama_cpp: Path | None = None) -> Toolchain:
    """The llama.cpp to use.

    A few files of our own are read. Where it was never tested on this hardware, or the
    CPU, the GPU or the driver is another one since, it is tested now, in seconds.

    Args:
        llama_cpp: a user's own (a checkout, an install prefix, or a folder with the
            binaries); None for the one EWQ_LLAMA_CPP names, else ours.

    Raises:
        ToolError: there is none, it lacks something, or fails its self-test.
    """
    chosen = llama_cpp or os.environ.get("EWQ_LLAMA_CPP")
    if chosen:
        return _user_toolchain(Path(chosen).expanduser().absolute())
    folder = default_build()
    record = None if folder is None else read_record(folder)
    if folder is None or record is None:
        raise _not_built()
    if record.get("commit") != LLAMA_CPP_COMMIT:
        raise ToolError(
            STAGE,
            folder,
            f"built for another commit ({record.get('commit')}), "
            f"{LLAMA_CPP_COMMIT} is needed",
            _BUILD_REMEDY,
        )
    if missing := missing_files(folder):
        names = ", ".join(missing)
        raise ToolError(STAGE, folder, f"{names} vanished from it", _BUILD_REMEDY)
    backend = str(record.get("backend"))
    if read_self_test(record, backend) is None and can_load():
        keep_self_test(folder, record, run_self_test(folder / "bin", backend))
        record = read_record(folder) or record
    found = _our_toolchain(folder, record)
    if found.self_test is not None and not found.self_test.is_ok:
        raise failed(found.self_test)
    return found


def toolchain_key(llama_cpp: Path | None = None) -> str:
    """The key of the llama.cpp that `find_toolchain` finds; ours need not be built.

    Raises:
        ToolError: a user's own is named, and cannot be used.
    """
    chosen = llama_cpp or os.environ.get("EWQ_LLAMA_CPP")
    return find_toolchain(llama_cpp).key if chosen else LLAMA_CPP_COMMIT


def test_toolchain() -> SelfTest:
    """Run the self-test of our build anew.

    Raises:
        ToolError: there is no build, or it fails.
    """
    folder = default_build()
    record = None if folder is None else read_record(folder)
    if folder is None or record is None:
        raise _not_built()
    verdict = run_self_test(folder / "bin", str(record.get("backend")))
    keep_self_test(folder, record, verdict)
    if not verdict.is_ok:
        raise failed(verdict)
    return verdict


def _our_toolchain(folder: Path, record: dict[str, object]) -> Toolchain:
    flags = record.get("flags")
    return Toolchain(
        commit=LLAMA_CPP_COMMIT,
        # Not the recorded folder: the checkout that was built from may be gone.
        source_dir=source_tree.find_source() or source_tree.cached_source(),
        bin_dir=folder / "bin",
        lib_dir=folder / "bin",
        backend=str(record.get("backend")),
        flags=tuple(flags) if isinstance(flags, list) else (),
        repair=str(record.get("repair", "none")),
        self_test=read_self_test(record, str(record.get("backend"))),
    )


def _user_toolchain(folder: Path) -> Toolchain:
    """A user's own llama.cpp, after asking its llama-quantize what it can do."""
    places = (folder / "build" / "bin", folder / "bin", folder)
    bin_dir = next((p for p in places if (p / "llama-quantize").is_file()), None)
    if bin_dir is None:
        raise ToolError(
            STAGE,
            folder,
            "holds no llama-quantize (looked in build/bin, bin and the folder)",
            "build it there, or leave --llama-cpp and EWQ_LLAMA_CPP away",
        )
    _check_options(bin_dir / "llama-quantize")
    holders = (folder, bin_dir, bin_dir.parent, bin_dir.parent.parent)
    own = next((p for p in holders if (p / CONVERTER_NAME).is_file()), None)
    return Toolchain(
        commit=_commit_of(bin_dir / "llama-perplexity"),
        source_dir=own or source_tree.find_source() or folder,
        bin_dir=bin_dir,
        lib_dir=None,
        backend="user",
        flags=(),
    )


def _check_options(quantize: Path) -> None:
    """Refuse a llama-quantize that lacks an option we use."""
    code, text = _ask(quantize, "--help")
    # Its help ends with 1; other codes are the loader's or a signal.
    if code not in {0, 1}:
        lines = text.strip().splitlines() or [f"exit code {code}"]
        raise ToolError(
            STAGE, quantize, f"cannot run ({lines[-1]})", "build it on this machine"
        )
    for option in _NEEDED_OPTIONS:
        if not re.search(rf"(?<![\w-]){option}(?![\w-])", text):
            raise ToolError(
                STAGE,
                quantize,
                f"is too old: it has no {option}",
                f"update that llama.cpp (build {LLAMA_CPP_BUILD} is known to work), "
                "or leave --llama-cpp and EWQ_LLAMA_CPP away",
            )


def _commit_of(program: Path) -> str:
    """The commit that a llama.cpp tool prints, or "unknown"."""
    if not program.is_file():
        return "unknown"
    _, text = _ask(program, "--version")
    found = re.search(r"(?:commit |version: \d+ \()([0-9a-f]{7,40})\b", text)
    return found.group(1) if found else "unknown"


def _ask(program: Path, option: str) -> tuple[int, str]:
    """The exit code of a tool that was asked something, and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder) / "answer.log"
        try:
            text = run(
                [program, option],
                stage=STAGE,
                log_path=log_path,
                timeout_seconds=_PROBE_SECONDS,
            )
            return 0, text
        except ChildError as error:
            return error.return_code, error.output

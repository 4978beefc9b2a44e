"""The llama.cpp that everything else uses: ours, built once, or the user's own."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ewq_gguf import store
from ewq_gguf.errors import ChildError, ToolError
from ewq_gguf.libraries import LLAMA_CPP_COMMIT, default_build, pointer_path
from ewq_gguf.llamacpp import source as source_tree
from ewq_gguf.llamacpp.build import (
    LLAMA_CPP_BUILD,
    STAGE,
    Recipe,
    build_tree,
    check_build_tools,
    is_built,
    missing_files,
    read_record,
    recipe_for,
    repairs_here,
)
from ewq_gguf.llamacpp.repairs import Repair
from ewq_gguf.llamacpp.self_test import (
    SelfTest,
    can_load,
    check_testable,
    failed,
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
    "build_toolchain",
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
        flags: what CMake was given; empty for a user's own.
        repair: how the build had to differ from the usual one to pass its self-test;
            `none` mostly.
        self_test: of ours on this hardware; None where it has not run.
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
        """What its outputs depend on, for the cache: ours is the pinned commit.

        A user's own may change under the same commit, so its files' times count too.
        """
        if self.backend != "user":
            return self.commit
        stats = [p.stat() for p in (self.converter, self.tool("llama-quantize"))]
        return repr((self.commit, [(s.st_size, s.st_mtime_ns) for s in stats]))

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

    Of ours a few files are read. Where it was never tested on this hardware, or the
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


def build_toolchain(
    backend: str = "cpu",
    *,
    jobs: int | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Toolchain:
    """Build llama.cpp at the pinned commit, or take the build that is there.

    A build counts when it has passed its self-test. One that does not is built again
    with the suspected cause taken away. It becomes the one that `find_toolchain` and
    the bindings use.

    Args:
        backend: cpu, cuda, metal or vulkan.
        jobs: compilers at once; None for one per CPU.
        on_line: called with each line printed; ours start with `toolchain: `,
            Ninja's with `[done/all]`.

    Raises:
        ToolError: a compiler or a tool is missing, the submodule is at another
            commit, or no build passes the self-test.
        ChildError: CMake or a compiler failed.
        NetworkError: the source cannot be fetched.
        LockedError: another process is building.
        ResourceError: disk or memory ran out.
    """
    recipe = recipe_for(backend)
    tell = on_line or _silent
    folder = recipe.folder
    source = source_tree.find_source()
    record = read_record(folder) if is_built(recipe) and source is not None else None
    verdict = None if record is None else read_self_test(record, backend)
    if verdict is None or not verdict.is_ok:
        check_testable()
        with store.locked(store.cache_dir("toolchain"), stage=STAGE):
            if not is_built(recipe):
                check_build_tools(backend)
            source = source_tree.obtain_source(lambda text: tell(f"{STAGE}: {text}"))
            _build_until_it_computes(source, recipe, jobs, tell)
    if default_build() != folder:
        _point_to(folder)
    return _our_toolchain(folder, read_record(folder) or {})


def _build_until_it_computes(
    source: Path, recipe: Recipe, jobs: int | None, tell: Callable[[str], None]
) -> None:
    """Build and test, with one suspected cause more taken away after each failure.

    Raises:
        ToolError: no build passes its self-test.
        ChildError: the usual build does not compile.
    """
    folder, backend = recipe.folder, recipe.backend
    repairs = repairs_here()
    failure = "it was not tested"
    for repair in repairs[_first_to_try(recipe, repairs) :]:
        record = read_record(folder) if is_built(recipe) else None
        if record is None or record.get("repair", "none") != repair.name:
            more = f", {repair.what}" if repair.what else ""
            tell(f"{STAGE}: building llama.cpp ({backend}) in {folder}{more}")
            try:
                record = build_tree(source, recipe, repair, jobs=jobs, on_line=tell)
            except ChildError as error:
                if repair == repairs[0]:
                    raise
                # The compiler may not know an option; the next repair has others.
                failure = error.problem
                continue
        verdict = run_self_test(folder / "bin", backend)
        keep_self_test(folder, record, verdict)
        tell(f"{STAGE}: self-test {verdict}")
        if verdict.is_ok:
            if repair != repairs[0]:
                tell(
                    f"{STAGE}: llama.cpp computes here only when it is built "
                    f"{repair.what}; what it costs: {repair.cost}"
                )
            return
        failure = str(verdict.problem)
        if verdict.failed_device not in {None, "CPU"}:
            remedy = "update the driver, or run `ewq setup --backend cpu`"
            raise ToolError(STAGE, verdict.failed_device, failure, remedy)
    raise ToolError(
        STAGE,
        "llama.cpp",
        f"no build of it passes the self-test on this machine; the last: {failure}",
        "tell us your CPU and compiler, or name a llama.cpp of your own with "
        "--llama-cpp",
    )


def _first_to_try(recipe: Recipe, repairs: Sequence[Repair]) -> int:
    """The repair that is built already, or the first: where all have failed, again."""
    record = (read_record(recipe.folder) if is_built(recipe) else None) or {}
    names = [repair.name for repair in repairs]
    built = str(record.get("repair", "none"))
    if built not in names:
        return 0
    verdict = read_self_test(record, recipe.backend)
    has_failed = verdict is not None and not verdict.is_ok
    return 0 if has_failed and built == names[-1] else names.index(built)


def _silent(_line: str) -> None:
    pass


def _point_to(folder: Path) -> None:
    """Make a build the default; other processes see the old pointer or the new."""
    text = f'{{"build": "{folder.name}"}}\n'
    store.write_text(pointer_path(), text, stage=STAGE, force=True)


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

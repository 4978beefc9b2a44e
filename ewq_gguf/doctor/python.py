"""Python, its packages, and the environment that it was started in."""

from __future__ import annotations

import json
import locale
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from ewq_gguf import packages
from ewq_gguf._version import __version__
from ewq_gguf.doctor import child
from ewq_gguf.doctor.check import Finding, failure, ok, size_text, warning
from ewq_gguf.errors import ChildError, ToolError
from ewq_gguf.process import python_argv

_IMPORT_SECONDS = 180.0
_OPTIONAL = ("eval", "fastewq", "cluster", "bnb", "nvidia", "plot")
_MIN_TEMPORARY_BYTES = 1 << 30


def interpreter() -> Finding:
    """The Python that runs this."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    found = f"{version} at {sys.executable} ({_environment()}), ewq-gguf {__version__}"
    if not hasattr(tarfile, "data_filter"):
        return failure(
            f"{found}: it cannot extract archives safely",
            "use Python 3.11.4 or later: `python3 -m venv NEW` with it, then install "
            "ewq-gguf there",
        )
    try:
        packages.check_installable("doctor")
    except ToolError as error:
        return warning(f"{found}: {error.problem}", error.remedy)
    return ok(found)


def core_packages() -> Finding:
    """Check the packages that ewq-gguf itself imports."""
    wanted = packages.requirements()
    if not wanted:
        return warning(
            "ewq-gguf is not installed in this environment, so its needs are unknown",
            f"run `{packages.install_line('ewq-gguf[all]')}`",
        )
    missing = packages.unmet(wanted)
    if missing:
        return failure(_needed(missing), f"run `{_install(missing)}`")
    return ok(f"{len(wanted)} needed, all there")


def converter_packages() -> Finding | None:
    """Check the packages that llama.cpp's converter imports."""
    wanted = packages.requirements("convert")
    if not wanted:
        return None
    missing = packages.unmet(wanted)
    if missing:
        return failure(
            f"{_needed(missing)}: no checkpoint can be converted",
            f"run `{_install(missing)}`",
        )
    versions = (f"{r.name} {packages.installed_version(r.name)}" for r in wanted)
    return ok(", ".join(versions))


def optional_packages() -> Finding | None:
    """The other extras: a choice, but no package of theirs may be too old."""
    if not packages.requirements():
        return None
    there: list[str] = []
    absent: list[str] = []
    for extra in _OPTIONAL:
        missing = packages.unmet(packages.requirements(extra))
        if outdated := [each for each in missing if each.found]:
            return warning(
                f"{extra}: {_needed(tuple(outdated))}",
                f"run `{_install(tuple(outdated))}`",
            )
        (absent if missing else there).append(extra)
    without = f"; not installed: {', '.join(absent)}" if absent else ""
    return ok(f"{', '.join(there) or 'none'}{without}")


def imports() -> Finding:
    """Whether the big packages load, in a child: a broken one may crash it."""
    try:
        argv = python_argv("ewq_gguf.doctor.imports_child")
        text = child.output(argv, seconds=_IMPORT_SECONDS)
    except ChildError as error:
        started = [line[1:] for line in error.log_tail if line.startswith(">")]
        problem = error.problem.partition("; its last line: >")[0]
        name = started[-1] if started else "Python"
        return failure(f"{name}: {problem}", repair_line(*started[-1:]))
    broken: dict[str, str] = json.loads(text.splitlines()[-1])
    if broken:
        found = "; ".join(f"{name}: {problem}" for name, problem in broken.items())
        return failure(found, repair_line(*broken))
    return ok("the packages that are there load")


def encoding() -> Finding:
    """The encoding of names and files without another one given."""
    names = (locale.getpreferredencoding(False), sys.getfilesystemencoding())
    found = {name.lower() for name in names}
    text = " and ".join(sorted(found))
    if not found <= {"utf-8", "utf8"}:
        return warning(
            f"{text}: names of files and tensors may be spelt wrongly",
            "run `export LC_ALL=C.UTF-8` (or `export PYTHONUTF8=1`)",
        )
    return ok(text)


def temporary_files() -> Finding:
    """The folder that pip and children put their temporary files in."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        return failure(
            "no folder for temporary files can be written",
            "name one: `export TMPDIR=FOLDER`",
        )
    chosen = os.environ.get("TMPDIR")
    if chosen and folder != str(Path(chosen).absolute()):
        return warning(
            f"TMPDIR={chosen} cannot be written; Python takes {folder}, and compilers "
            "fail",
            "run `unset TMPDIR`, or name another folder: `export TMPDIR=FOLDER`",
        )
    free = shutil.disk_usage(folder).free
    if free < _MIN_TEMPORARY_BYTES:
        return warning(
            f"{folder}: {size_text(free)} free, 1 GiB is needed to build packages",
            "free some space, or name another folder: `export TMPDIR=FOLDER`",
        )
    return ok(f"{folder}, {size_text(free)} free")


def repair_line(*names: str) -> str:
    """The command that installs packages again, at their present versions."""
    if not names:
        return f"run `{packages.install_line('ewq-gguf[all]')}`"
    # Without the local part: 2.13.0+cpu is on no index but its own.
    versions = [(packages.installed_version(n) or "").partition("+")[0] for n in names]
    pinned = [f"{n}=={v}" if v else n for n, v in zip(names, versions, strict=True)]
    return f"run `{packages.install_line('--force-reinstall', '--no-deps', *pinned)}`"


def _needed(missing: tuple[packages.Unmet, ...]) -> str:
    return ", ".join(f"needs {each}" for each in missing)


def _install(missing: tuple[packages.Unmet, ...]) -> str:
    return packages.install_line(*(each.requirement for each in missing))


def _environment() -> str:
    """The program that made the environment, as far as it shows."""
    prefix = Path(sys.prefix)
    if (prefix / "pipx_metadata.json").is_file():
        return "pipx"
    if (prefix / "conda-meta").is_dir():
        return "conda"
    if sys.prefix == sys.base_prefix:
        return "no environment"
    settings = prefix / "pyvenv.cfg"
    is_uv = settings.is_file() and "\nuv = " in f"\n{settings.read_text()}"
    return "uv" if is_uv else "venv"

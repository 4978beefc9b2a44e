"""The Python packages of the environment that runs this: looked up, and installed.

Environments of uv and pipx often have no pip of their own; a pip of a temporary
environment then works on them from outside.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from ewq_gguf.errors import ChildError, ToolError
from ewq_gguf.process import run

PROJECT = "ewq-gguf"

_VENV_SECONDS = 300.0
_INSTALL_SECONDS = 3600.0
#: No question, no line about newer versions of pip itself.
_PIP_ENV = {"PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@dataclass(frozen=True)
class Unmet:
    """A requirement that this environment does not meet.

    Attributes:
        requirement: such as `torch>=2.6`.
        found: the version that is installed, or None.
    """

    requirement: str
    found: str | None

    def __str__(self) -> str:
        """The package, what is needed and what was found."""
        return f"{self.requirement} ({self.found or 'not installed'})"


def installed_version(name: str) -> str | None:
    """The version of an installed package, or None."""
    importlib.invalidate_caches()
    try:
        # A folder of metadata that a broken installation left has no version.
        return metadata.version(name) or None
    except (metadata.PackageNotFoundError, KeyError):
        return None


def requirements(extra: str = "") -> tuple[Requirement, ...]:
    """The requirements of this package, from its metadata.

    Args:
        extra: An extra's name; "" for the requirements without any.
    """
    try:
        lines = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        return ()
    found = [Requirement(line) for line in lines]
    if not extra:
        return tuple(r for r in found if _applies(r, ""))
    return tuple(r for r in found if _applies(r, extra) and not _applies(r, ""))


def unmet(wanted: Iterable[Requirement]) -> tuple[Unmet, ...]:
    """Those of some requirements that are not installed, or in a version too old."""
    missing = []
    for requirement in wanted:
        found = installed_version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            text = f"{requirement.name}{requirement.specifier}"
            missing.append(Unmet(text, found))
    return tuple(missing)


def install_line(*arguments: str) -> str:
    """The command that a person types to install something into this environment."""
    words = shlex.join(arguments)
    python = shlex.quote(sys.executable)
    if Path(sys.prefix, "pipx_metadata.json").is_file():
        return f"pipx inject {PROJECT} {words}"
    if not _has_pip() and shutil.which("uv"):
        return f"uv pip install --python {python} {words}"
    if not _has_pip():
        return f"{python} -m ensurepip && {python} -m pip install {words}"
    return f"{python} -m pip install {words}"


def check_installable(stage: str) -> None:
    """Refuse early where packages are the system's business.

    Raises:
        ToolError: this Python is managed from outside (PEP 668).
    """
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    is_environment = sys.prefix != sys.base_prefix
    is_forced = os.environ.get("PIP_BREAK_SYSTEM_PACKAGES", "0") not in ("", "0")
    if marker.is_file() and not is_environment and not is_forced:
        raise ToolError(
            stage,
            sys.executable,
            "is the system's Python, into which pip installs nothing (PEP 668)",
            "make an environment: `python3 -m venv ~/ewq && ~/ewq/bin/python -m pip "
            f'install "{PROJECT}[all]" && ~/ewq/bin/ewq setup`',
        )


def install(
    arguments: Sequence[str | Path],
    *,
    stage: str,
    log_path: Path,
    env: Mapping[str, str] | None = None,
) -> None:
    """Install into this environment, with its pip, with uv, or with a temporary pip.

    Args:
        arguments: requirements, files, and options that pip and uv share.
        stage: an error is reported under it.
        log_path: gets what the installer says.
        env: variables for a package that is built.

    Raises:
        ToolError: the environment is the system's, or there is no pip for it.
        ChildError: the installation failed.
        ResourceError: disk or memory ran out.
    """
    check_installable(stage)
    uv = None if _has_pip() else shutil.which("uv")
    if uv is None:
        run_pip(["install", *arguments], stage=stage, log_path=log_path, env=env)
        return
    run(
        [uv, "pip", "install", "--python", sys.executable, *arguments],
        stage=stage,
        log_path=log_path,
        env=env,
        timeout_seconds=_INSTALL_SECONDS,
    )


def run_pip(
    arguments: Sequence[str | Path],
    *,
    stage: str,
    log_path: Path,
    env: Mapping[str, str] | None = None,
    timeout_seconds: float = _INSTALL_SECONDS,
) -> str:
    """Run pip on this environment: its own, or a temporary one from outside.

    Args:
        arguments: The arguments after `pip`.
        stage: an error is reported under it.
        log_path: gets what pip says.
        env: variables added to this process's environment.
        timeout_seconds: the longest it may take.

    Returns:
        The output.

    Raises:
        ToolError: there is no pip, and none can be made.
        ChildError: pip failed.
        ResourceError: disk or memory ran out.
    """
    settings = {**_PIP_ENV, **_index_of_uv(), **(env or {})}

    def call(argv: Sequence[str | Path]) -> str:
        return run(
            [*argv, *arguments],
            stage=stage,
            log_path=log_path,
            env=settings,
            timeout_seconds=timeout_seconds,
        )

    if _has_pip():
        return call([sys.executable, "-m", "pip"])
    with tempfile.TemporaryDirectory() as folder:
        python = _python_with_pip(Path(folder), stage)
        return call([python, "-m", "pip", "--python", sys.executable])


def _applies(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is None or marker.evaluate({"extra": extra})


def _has_pip() -> bool:
    return importlib.util.find_spec("pip") is not None


def _python_with_pip(folder: Path, stage: str) -> Path:
    """The Python of a new environment whose pip came with this Python.

    Raises:
        ToolError: this Python was packaged without it.
    """
    try:
        run(
            [sys.executable, "-m", "venv", folder / "environment"],
            stage=stage,
            log_path=folder / "venv.log",
            timeout_seconds=_VENV_SECONDS,
        )
    except ChildError as error:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        is_debian = shutil.which("apt") is not None
        raise ToolError(
            stage,
            sys.executable,
            "has no pip, and `python -m venv` cannot make one",
            f"run `apt install python{version}-venv`"
            if is_debian
            else "install pip into this environment, or uv beside it",
        ) from error
    return folder / "environment" / "bin" / "python"


def _index_of_uv() -> dict[str, str]:
    """The package index that uv's variables name, in pip's words."""
    told = {}
    for name, ours in (
        ("PIP_INDEX_URL", ("UV_DEFAULT_INDEX", "UV_INDEX_URL")),
        ("PIP_EXTRA_INDEX_URL", ("UV_INDEX", "UV_EXTRA_INDEX_URL")),
    ):
        values = [os.environ[variable] for variable in ours if os.environ.get(variable)]
        if values and not _has_pip() and name not in os.environ:
            # uv allows a name before each: `corporate=https://...`.
            words = (word.partition("://") for word in values[0].split())
            told[name] = " ".join(
                f"{scheme.rpartition('=')[2]}{sep}{rest}" for scheme, sep, rest in words
            )
    return told

"""`ewq doctor`: what is wrong with an installation, and what repairs it.

Nothing heavy is imported here: a package that is broken is found in a child process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module

from ewq_gguf import packages
from ewq_gguf.doctor.check import Check, Finding, failure
from ewq_gguf.errors import EwqError

__all__ = ["Check", "check_names", "examine"]

#: Name -> module and function, in the order they are printed: what others need comes
#: first. A module is imported when its turn comes: a package that it needs may be what
#: is broken.
_CHECKS = {
    "python": "python.interpreter",
    "encoding": "python.encoding",
    "working folder": "machine.working_folder",
    "temporary files": "python.temporary_files",
    "cache": "machine.cache",
    "packages": "python.core_packages",
    "converter packages": "python.converter_packages",
    "extras": "python.optional_packages",
    "imports": "python.imports",
    "llama.cpp": "llama_cpp.toolchain",
    "self-test": "llama_cpp.self_test",
    "bindings": "llama_cpp.bindings_version",
    "bindings load": "llama_cpp.bindings_load",
    "compiler": "llama_cpp.compiler",
    "backend": "llama_cpp.backend",
    "nvcc": "llama_cpp.nvcc",
    "devices": "llama_cpp.devices",
    "cpu": "machine.cpu",
    "memory": "machine.memory",
    "limits": "machine.limits",
    "hub cache": "machine.hub_cache",
    "proxy": "network.proxy",
    "certificates": "network.certificates",
    "hub": "network.hub",
}


def check_names() -> tuple[str, ...]:
    """The checks, in order."""
    return tuple(_CHECKS)


def examine(names: Iterable[str] = tuple(_CHECKS)) -> Iterator[Check]:
    """Check one thing after another; what does not apply here is left out.

    Args:
        names: The checks to run; all of them by default.
    """
    for name in names:
        try:
            found = _run(*_CHECKS[name].split("."))
        except EwqError as error:
            parts = filter(None, [error.subject, error.problem])
            found = failure(": ".join(parts), error.remedy)
        except ImportError as error:
            line = packages.install_line("ewq-gguf[all]")
            found = failure(str(error), f"run `{line}`")
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            problem = f"{where}{error.strerror or error}"
            found = failure(problem, "check the disk and its permissions")
        if found is not None:
            yield Check(name, found.status, found.found, found.remedy)


def _run(module: str, function: str) -> Finding | None:
    check: Callable[[], Finding | None] = getattr(
        import_module(f"ewq_gguf.doctor.{module}"), function
    )
    return check()

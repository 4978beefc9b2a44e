"""Imports point one way: each package imports only earlier ones."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ewq_gguf

PACKAGE = Path(ewq_gguf.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

#: Packages in order; those in one group do not import each other.
ORDER = (
    {"errors", "ggml_types", "size_text", "strict_json", "tensor_names"},
    {"records"},
    {"store", "process"},
    {"entropy", "rpc"},
    {"plan"},
    {"packages"},
    {"checkpoint"},
    {"llamacpp"},
    {"doctor"},
    {"bench"},
    {"report"},
    {"fastewq"},
    {"stages"},
    {"optimal"},
    {"pipeline"},
    {"experiments"},
    {"api"},
    {"cli"},
    {"__main__"},
)
#: Anybody may import these; they import none of ours.
LEAVES = {"_version", "data", "disk", "file_memory", "libraries"}
#: Modules of the first group that raise our errors.
FOUNDATION = {
    (name, "errors")
    for name in ("tensor_names", "ggml_types", "size_text", "strict_json")
}

#: What arrays and records can be computed with: no file, no process, no network.
PURE = {"entropy", "plan", "rpc"}
PURE_MODULES = {
    f"ewq_gguf.{name}"
    for name in (
        "optimal.allocation", "optimal.candidate_types", "optimal.knapsack",
        "optimal.knapsack_dp", "optimal.latency", "optimal.predictor",
        "optimal.sensitivity", "optimal.settings",
        "fastewq.classifier", "fastewq.evaluation",
        "experiments.controls", "experiments.paper", "experiments.paper_classifiers",
    )
}  # fmt: skip
PURE_LIBRARIES = {
    "__future__", "collections", "dataclasses", "enum", "fractions", "functools",
    "heapq", "ipaddress", "itertools", "math", "re", "shlex", "statistics", "typing",
    "zlib", "numpy", "numba",
}  # fmt: skip
#: What one module may have besides, inside its functions only.
OWN_LIBRARIES = {
    "ewq_gguf.fastewq.classifier": {"sklearn", "xgboost"},
    "ewq_gguf.fastewq.evaluation": {"sklearn"},
}
#: Libraries that only a few packages may import.
RESERVED = {
    "subprocess": {"process"},
    "multiprocessing": {"process"},
    "ctypes": {"llamacpp", "bench"},
    "huggingface_hub": {"checkpoint"},
    "distributed": {"checkpoint"},
    "urllib": {"checkpoint", "llamacpp"},
    "http": {"checkpoint"},
    "click": {"cli"},
    "rich": {"cli", "experiments", "fastewq", "report"},
    "llama_cpp": {"llamacpp", "bench"},
    "sklearn": {"fastewq"},
    "xgboost": {"fastewq"},
    "jinja2": {"bench"},
    "pyarrow": {"bench"},
    "rouge_score": {"bench"},
    "bitsandbytes": {"bench"},
    "transformers": {"bench", "llamacpp"},
    "sacrebleu": {"bench"},
}
HEAVY = (
    "torch", "numba", "llama_cpp", "transformers", "scipy", "sklearn", "xgboost",
    "bitsandbytes", "distributed", "jinja2", "nltk", "pyarrow", "sacrebleu",
)  # fmt: skip


def module_name(path: Path) -> str:
    parts = ("ewq_gguf", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


def package_of(module: str) -> str:
    """`plan` for `ewq_gguf.plan.build`; `ewq_gguf` for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "ewq_gguf"


def imports(path: Path) -> set[str]:
    """Every module a file imports: inside functions and for type checkers too."""
    found = set()
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found |= {with_member(module, alias.name) for alias in node.names}
    return found


def with_member(module: str, member: str) -> str:
    """`ewq_gguf.store` for `from ewq_gguf import store`, else the module."""
    path = PACKAGE.parent.joinpath(*module.split("."), member)
    is_module = path.is_dir() or path.with_suffix(".py").is_file()
    return f"{module}.{member}" if is_module else module


def rank(name: str) -> int:
    return next(i for i, packages in enumerate(ORDER) if name in packages)


def by_name(paths):
    return [pytest.param(path, id=module_name(path)) for path in paths]


def test_the_order_names_every_package_of():
    packages = {package_of(module_name(path)) for path in MODULES} - {"ewq_gguf"}

    assert packages <= set.union(LEAVES, *ORDER)


@pytest.mark.parametrize("path", by_name(MODULES))
def test_a_package_imports_only_earlier_ones(path):
    here = package_of(module_name(path))
    ours = {name for name in imports(path) if name.split(".")[0] == "ewq_gguf"}
    packages = {package_of(name) for name in ours} - {here} - LEAVES

    if here in LEAVES or here == "ewq_gguf":
        assert not packages
        return
    assert "ewq_gguf" not in packages, "imports the package itself"
    wrong = {
        there
        for there in packages
        if rank(there) >= rank(here) and (here, there) not in FOUNDATION
    }
    assert not wrong, f"{here} imports {wrong}"


@pytest.mark.parametrize(
    "path",
    by_name(
        path
        for path in MODULES
        if package_of(module_name(path)) in PURE or module_name(path) in PURE_MODULES
    ),
)
def test_mathematics_is_pure(path):
    names = {name.split(".")[0] for name in imports(path)} - {"ewq_gguf"}

    assert names <= PURE_LIBRARIES | OWN_LIBRARIES.get(module_name(path), set())


@pytest.mark.parametrize("library", RESERVED)
def test_a_library_stays_in_its_packages(library):
    users = {
        package_of(module_name(path))
        for path in MODULES
        if library in {name.split(".")[0] for name in imports(path)}
    }

    assert users <= RESERVED[library]


def test_subprocess_has_one_home():
    homes = [path.name for path in MODULES if "subprocess" in imports(path)]

    assert homes == ["process.py"]


@pytest.mark.parametrize("path", by_name(MODULES))
def test_nobody_calls_a_shell_or_prints_from_the_library(path):
    calls = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    }

    assert not calls & {"os.system", "os.popen", "eval", "exec", "print"}
    assert not any(call.startswith("os.spawn") for call in calls)


@pytest.mark.parametrize(
    "code",
    [
        "import ewq_gguf",
        "import ewq_gguf.cli",
        "from ewq_gguf.cli import main; main(['--help'])",
        "import ewq_gguf.errors, ewq_gguf.records, ewq_gguf.plan.build",
        "import ewq_gguf.fastewq.rows, ewq_gguf.fastewq.evaluation",
        "import ewq_gguf.experiments.paper",
        "from ewq_gguf.bench.tasks import all_tasks; all_tasks()",
    ],
)
def test_nothing_heavy_is_imported_for_the_help(code):
    code += f"; import sys; print([m for m in {HEAVY!r} if m in sys.modules])"

    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert child.stdout.splitlines()[-1] == "[]"


# The test itself can fail.


def test_lazy_relative_and_typing_imports_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "ewq_gguf")
    file = tmp_path / "ewq_gguf" / "plan" / "x.py"
    file.parent.mkdir(parents=True)
    (file.parent / "build.py").touch()
    (file.parents[1] / "cli").mkdir()
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from ewq_gguf import cli\n"
        "def f():\n    import os.path\n    from . import build\n"
        "    from ..store import write_text\n"
    )

    assert imports(file) == {
        "typing",
        "ewq_gguf.cli",
        "os.path",
        "ewq_gguf.plan.build",
        "ewq_gguf.store",
    }
    assert package_of("ewq_gguf.plan.build") == "plan"
    assert rank("rpc") == rank("entropy") < rank("plan") < rank("cli")

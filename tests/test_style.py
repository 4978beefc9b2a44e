"""The rules of form that a reader relies on: short modules and functions, sentences."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import ewq_gguf

PACKAGE = Path(ewq_gguf.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
#: A line, or the text of an entry such as `options: ...`, without a subject.
NO_SUBJECT = re.compile(
    r"\s*(?:`{0,2}\w+`{0,2}(?:, \w+)*: )?(of|that|what|who|which)\b(?!:)", re.I
)


def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=str(p.relative_to(PACKAGE))) for p in MODULES]
)
def test_modules_functions_and_docstrings_keep_their_form(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name
        if isinstance(node, DOCUMENTED):
            lines = (ast.get_docstring(node) or "").splitlines()
            assert [line for line in lines if NO_SUBJECT.match(line)] == []


def test_the_readme_and_the_pages_use_no_figure_of_speech():
    root = PACKAGE.parent
    pages = [root / "README.md", *root.glob("docs/*.md")]
    found = [
        f"{page.name}: {line}"
        for page in pages
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.search(r"rooms? |worth", line)
    ]
    assert len(pages) > 5
    assert found == []

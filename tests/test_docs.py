"""The documentation says what the program does."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ewq_gguf.cli import ewq
from ewq_gguf.cli.sections import SHOW_ALL

ROOT = Path(__file__).parent.parent
CLI_PAGE = ROOT / "docs" / "cli.md"
HEAD = """# The command line

Made from `--help`; `EWQ_UPDATE_DOCS=1 make test ARGS=tests/test_docs.py` renews it.
"""


def help_texts(command: click.Command, path: str, parent: click.Context | None = None):
    """Every visible command's path and help, depth first."""
    with command.make_context(
        path.split()[-1], [], parent=parent, resilient_parsing=True
    ) as ctx:
        ctx.terminal_width = ctx.max_content_width = 80
        ctx.meta[SHOW_ALL] = True
        yield path, command.get_help(ctx)
        if isinstance(command, click.Group):
            for name in command.list_commands(ctx):
                sub = command.get_command(ctx, name)
                assert sub is not None
                if not sub.hidden:
                    yield from help_texts(sub, f"{path} {name}", ctx)


def cli_page() -> str:
    sections = [
        f"\n## {path}\n\n```\n{text}\n```\n" for path, text in help_texts(ewq, "ewq")
    ]
    return HEAD + "".join(sections)


def test_the_cli_page_is_what_help_prints():
    # In a process of its own: click keeps the first help option it made.
    code = (
        "import sys; from tests.test_docs import cli_page; sys.stdout.write(cli_page())"
    )
    page = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True
    ).stdout.decode()
    if os.environ.get("EWQ_UPDATE_DOCS"):
        CLI_PAGE.write_text(page)
    assert CLI_PAGE.read_text() == page


@pytest.mark.parametrize("command", ["gguf", "plan", "bench", "compare"])
def test_the_help_of_a_command_is_a_page_that_names_every_option(command):
    text, everything = (
        CliRunner().invoke(ewq, [command, option], terminal_width=80).output
        for option in ("--help", "--help-all")
    )

    assert len(text.splitlines()) <= 60
    assert max(map(len, text.splitlines())) <= 80
    pattern = re.compile(r"--[a-z][a-z-]+[a-z]")
    flags = re.findall(r"^ +(?:-., )?(--[a-z-]+)", everything, re.MULTILINE)
    assert len(flags) > 30
    # click breaks lines at hyphens.
    assert set(flags) <= set(pattern.findall(re.sub(r"-\n +", "-", text)))


def test_every_option_says_what_it_does_to_a_reader_of_one_line():
    pages = dict(help_texts(ewq, "ewq"))
    bad = re.compile(r"(of|that|what|which|who|likewise)\b", re.IGNORECASE)

    assert len(pages) > 30
    for command, page in pages.items():
        for line in re.findall(r"^ +-[^\n]*?(?:\n {20,}| {2,})(\S.*)$", page, re.M):
            assert not bad.match(line), f"{command}: {line}"


def test_the_first_page_has_every_command():
    names = {path.stem for path in (ROOT / "ewq_gguf" / "cli").glob("*.py")}
    context = click.Context(ewq)

    assert set(ewq.list_commands(context)) <= names
    assert len(ewq.list_commands(context)) == 18


def test_every_data_file_is_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    globs = project["tool"]["setuptools"]["package-data"]["ewq_gguf"]
    package = ROOT / "ewq_gguf"

    packaged = {path for glob in globs for path in package.glob(glob)}

    files = {path for path in (package / "data").rglob("*") if path.is_file()}
    assert {p for p in files if "__pycache__" not in p.parts} - packaged == {
        package / "data" / "__init__.py"
    }


def test_links_in_the_documentation_lead_to_files():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []


def test_no_page_or_module_names_a_path_of_a_machine():
    pattern = re.compile(r"/(?:root|home|Users|work)/")
    files = [
        path
        for kind in ("*.md", "*.py", "*.toml", "*.txt", "Makefile")
        for folder in (ROOT, ROOT / "docs", ROOT / "ewq_gguf", ROOT / "benchmarks")
        for path in (folder.glob(kind) if folder == ROOT else folder.rglob(kind))
    ]
    assert len(files) > 40
    assert [p.name for p in files if pattern.search(p.read_text())] == []

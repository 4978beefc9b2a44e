"""`ewq setup`: what `make setup` does besides the Python packages, without make."""

from __future__ import annotations

import click

from ewq_gguf.cli.toolchain import BuildProgress, backend_option, jobs_option
from ewq_gguf.llamacpp.setting_up import set_up


@click.command()
@backend_option(default=None, note="  [default: that of the build in use, else cpu]")
@jobs_option
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def setup(backend: str | None, jobs: int | None, quiet: bool) -> None:
    """Build llama.cpp and install the bindings: once, then every command works.

    A build that is there is used. Prints the build's folder; `ewq doctor` says what is
    missing or wrong.
    """
    with BuildProgress(quiet=quiet) as progress:
        built = set_up(backend, jobs=jobs, on_line=progress.take)
    click.echo(built.bin_dir.parent)

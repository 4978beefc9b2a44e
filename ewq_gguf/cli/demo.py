"""`ewq demo`: write the built-in checkpoint to a folder."""

from __future__ import annotations

from pathlib import Path

import click

from ewq_gguf.checkpoint.demo import write_demo


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Write into a folder that has other files.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def demo(out: Path, force: bool, quiet: bool) -> None:
    """Write the built-in checkpoint (SmolLM2-135M-Instruct) to the folder OUT.

    The first use downloads 93 MB. Prints the folder's path.
    """
    click.echo(write_demo(out, force=force, on_line=None if quiet else _show))


def _show(line: str) -> None:
    click.echo(line, err=True)

"""A full disk is told by its folder, and by what moves the files elsewhere."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from ewq_gguf import disk, store
from ewq_gguf.cli import main
from ewq_gguf.errors import ChildError, ResourceError
from ewq_gguf.process import run

CACHE = "let EWQ_CACHE name a folder on another disk"
TEMPORARY = "let TMPDIR name a folder on another disk"
OUTPUT = "choose another folder with -o"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The cache, the folder of temporary files, and one for outputs."""
    found = {name: tmp_path / name for name in ("cache", "temporary", "out")}
    for folder in found.values():
        folder.mkdir()
    monkeypatch.setenv("EWQ_CACHE", str(found["cache"]))
    monkeypatch.setattr("tempfile.tempdir", str(found["temporary"]))
    return found


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of a MiB on a folder."""
    mounted = []

    def mount(folder: Path) -> None:
        argv = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
        if subprocess.run(argv, capture_output=True).returncode:
            pytest.skip("no disk can be mounted here")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_what_moves_a_file_depends_on_where_it_lies(folders):
    cache, temporary, out = folders.values()
    assert disk.advice(cache) == disk.advice(cache / "base" / "a.gguf") == CACHE
    assert disk.advice(temporary) == disk.advice(temporary / "ewq-x" / "a") == TEMPORARY
    assert disk.advice(temporary / "mine" / "a.gguf") == OUTPUT
    assert disk.advice(out / "a.gguf") == disk.advice(Path("a.gguf")) == OUTPUT


@pytest.mark.fault(73)
def test_too_few_free_bytes_name_the_folder_and_its_way_out(folders):
    for name, way_out in (("cache", CACHE), ("out", OUTPUT)):
        with pytest.raises(ResourceError) as caught:
            store.check_free(folders[name], 1 << 60, "test")
        assert caught.value.subject == str(folders[name])
        assert caught.value.remedy == f"free some space, or {way_out}"


@pytest.mark.fault(73)
@pytest.mark.parametrize("place", ["cache", "temporary", "out"])
@pytest.mark.parametrize("says", ["", "No space left on device"])
def test_a_child_whose_disk_is_full_names_the_folder(folders, small_disk, place, says):
    """Also one that cannot say it, as its log is on that disk, or says nothing."""
    small_disk(folders[place])
    inside = folders[place] / "ewq-work"
    inside.mkdir()
    logs = folders["cache"] / "logs"
    logs.mkdir()
    script = f"cat /dev/zero >f 2>/dev/null; printf '%s' '{says}'; exit 1"
    with pytest.raises(ResourceError, match="the disk is full") as caught:
        run(["sh", "-c", script], stage="test", log_path=logs / "a.log", cwd=inside)
    way_out = {"cache": CACHE, "temporary": TEMPORARY, "out": OUTPUT}[place]
    assert caught.value.subject == str(inside)
    assert caught.value.remedy.startswith(f"free some space, or {way_out}; its log is")


def test_a_child_that_fails_on_a_disk_with_space_is_a_failed_child(folders):
    log = folders["cache"] / "a.log"
    with pytest.raises(ChildError, match="exit code 1"):
        run(["sh", "-c", "exit 1"], stage="test", log_path=log, cwd=folders["out"])


@pytest.mark.fault(73)
def test_an_error_of_the_system_names_the_full_disk(
    folders, small_disk, capsys, monkeypatch
):
    small_disk(folders["cache"])

    def write(_context):
        with (folders["cache"] / "f").open("wb") as file:
            file.write(bytes(2 << 20))

    monkeypatch.setattr("ewq_gguf.cli.ewq.invoke", write)
    assert main(["scan", "demo"]) == 6
    told = capsys.readouterr().err
    assert f"{folders['cache']}: {os.strerror(errno.ENOSPC)}; free some" in told
    assert CACHE in told


@pytest.mark.parametrize("command", ["scan", "plan", "gguf", "toolchain"])
def test_a_cache_that_is_no_folder_is_told_before_anything_else(
    folders, monkeypatch, capsys, command
):
    path = folders["out"] / "file"
    path.write_text("")
    monkeypatch.setenv("EWQ_CACHE", str(path))
    monkeypatch.delenv("EWQ_LLAMA_CPP", raising=False)
    argument = "info" if command == "toolchain" else str(folders["out"])
    assert main([command, argument]) == 6
    told = capsys.readouterr().err
    assert told.startswith(f"ewq: cache: {path}: the folder cannot be created")
    assert "let EWQ_CACHE name a folder that can be written" in told

"""Writing that cannot lose anything."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ewq_gguf import store
from ewq_gguf.errors import LockedError, ResourceError, UsageError
from ewq_gguf.file_memory import read_once

HOST = socket.gethostname()
IS_ROOT = os.geteuid() == 0


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("EWQ_CACHE", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path):
    """An empty folder for outputs."""
    path = tmp_path / "out"
    path.mkdir()
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dead_pid() -> int:
    """The id of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def refuse(number: int):
    """A function that fails as a system call does."""

    def call(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return call


def fail_halfway(path: Path, error: type[BaseException]) -> None:
    with store.replacing(path, stage="test") as temporary:
        temporary.write_text("half")
        raise error


# Atomic replacement.


def test_a_finished_file_takes_the_old_ones_place(folder):
    path = folder / "a.json"
    path.write_text("old")

    with store.replacing(path, stage="test") as temporary:
        assert temporary.parent.parent == folder  # the same disk
        temporary.write_text("new")
        assert path.read_text() == "old"

    assert path.read_text() == "new"
    assert names(folder) == ["a.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_and_nothing_else(folder, error):
    path = folder / "a.json"
    path.write_text("old")

    with pytest.raises(error):
        fail_halfway(path, error)

    assert path.read_text() == "old"
    assert names(folder) == ["a.json"]


def test_a_first_file_that_fails_leaves_nothing(folder):
    with pytest.raises(KeyError):
        fail_halfway(folder / "a", KeyError)

    assert names(folder) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.write_text"])
def test_a_full_disk_is_a_resource_error_and_the_old_file_stays(
    folder, monkeypatch, number, call
):
    path = folder / "a.json"
    path.write_text("old")
    monkeypatch.setattr(call, refuse(number))

    with pytest.raises(ResourceError, match="the disk is full") as caught:
        store.write_text(path, "new", stage="test", force=True)

    assert caught.value.exit_code == 6
    assert path.read_text() == "old"
    assert names(folder) == ["a.json"]


def test_a_disk_that_ends_while_a_file_is_written_is_exit_code_6(folder):
    """A limit on the size of files acts where the disk would end."""
    path = folder / "a.json"
    path.write_text("old")
    code = (
        "import resource, sys; from pathlib import Path; from ewq_gguf import store;"
        "from ewq_gguf.errors import EwqError;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try: store.write_text(Path(sys.argv[1]), 'x' * 9000, stage='t', force=True)\n"
        "except EwqError as error: sys.exit(error.exit_code)"
    )

    child = subprocess.run([sys.executable, "-c", code, str(path)], check=False)

    assert child.returncode == 6
    assert path.read_text() == "old"
    assert names(folder) == ["a.json"]


def test_another_failure_is_told_as_the_system_tells_it(folder, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))

    with pytest.raises(ResourceError, match="Input/output error"):
        store.write_text(folder / "a", "x", stage="test")


def test_files_and_folders_are_flushed_before_and_after_the_rename(folder, monkeypatch):
    calls = []
    fsync, replace = os.fsync, Path.replace

    def flushed(fd):
        calls.append(("fsync", str(Path(f"/proc/self/fd/{fd}").readlink())))
        fsync(fd)

    def renamed(self, target):
        calls.append(("rename", str(target)))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    store.write_text(folder / "a", "x", stage="test")

    assert [what for what, _ in calls] == ["fsync", "rename", "fsync"]
    assert calls[0][1].endswith("/a")
    assert calls[0][1] != calls[1][1] == str(folder / "a")
    assert calls[2][1] == str(folder)


# Text files.


def test_the_same_text_is_left_alone(folder):
    path = folder / "a.json"

    assert store.write_text(path, "é\n", stage="test") is True
    before = path.stat()
    assert store.write_text(path, "é\n", stage="test") is False
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino


def test_another_text_is_refused_unless_forced(folder):
    path = folder / "a.json"
    store.write_text(path, "one", stage="test")

    with pytest.raises(UsageError, match="--force") as caught:
        store.write_text(path, "two", stage="test")
    assert caught.value.exit_code == 2
    assert path.read_text() == "one"
    assert store.write_text(path, "two", stage="test", force=True) is True
    assert path.read_bytes() == b"two"


def test_missing_folders_are_created(folder):
    store.write_text(folder / "a" / "b" / "c.json", "x", stage="test")

    assert (folder / "a" / "b" / "c.json").read_text() == "x"


@pytest.mark.parametrize(
    "name",
    ["sp ace", "ünïcode", "-rf", "[a]*?", "a" * 150, ".hidden", "new\nline", "$(x)"],
)
def test_odd_names_are_files_like_others(folder, name):
    store.write_text(folder / name, "1", stage="test")
    store.write_text(folder / name, "2", stage="test", force=True)

    assert names(folder) == [name]


def test_a_folder_is_no_file(folder):
    with pytest.raises(UsageError, match="is a folder"):
        store.write_text(folder, "x", stage="test")


def test_a_folder_that_cannot_be_is_refused_before_any_work(folder):
    (folder / "file").write_text("x")

    with pytest.raises(ResourceError, match="cannot be created") as caught:
        store.check_writable(folder / "file" / "a.json", "test")
    assert caught.value.exit_code == 6


@pytest.mark.skipif(IS_ROOT, reason="root writes everywhere")
def test_a_read_only_folder_is_refused_before_any_work(folder):
    folder.chmod(0o555)

    with pytest.raises(ResourceError, match="cannot be written"):
        store.check_writable(folder / "a", "test")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    folder, monkeypatch, number
):
    monkeypatch.setattr("tempfile.TemporaryFile", refuse(number))

    with pytest.raises(ResourceError):
        store.check_writable(folder / "a", "test")


def test_room_is_asked_for_with_both_numbers(folder):
    store.check_free(folder, 0, "test")

    with pytest.raises(ResourceError, match=r"1,125,899,906,842,624 bytes are needed"):
        store.check_free(folder, 1 << 50, "test")


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_an_output_is_never_its_own_input(folder, link):
    source = folder / "in"
    source.write_text("x")
    getattr(folder / "out", link)(source)

    for out in (source, folder / "out", folder / "." / "in"):
        with pytest.raises(UsageError, match="its own input"):
            store.check_distinct(out, [source], "test")
    store.check_distinct(folder / "other", [source], "test")


# Work folders.


def test_a_dead_processes_work_folder_is_removed(folder):
    stale = folder / f".a.gguf.{HOST}.{dead_pid()}-abc.ewq"
    stale.mkdir()
    (stale / "half").write_text("x" * 100)

    with store.work_dir(folder / "a.gguf", stage="test") as work:
        assert not stale.exists()
        assert names(folder) == [work.name]
    assert names(folder) == []


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(".a.gguf.{host}.{live}-abc.ewq", id="live-process"),
        pytest.param(".a.gguf.{host}.1-abc.ewq", id="process-1"),
        pytest.param(".a.gguf.elsewhere.{dead}-abc.ewq", id="another-host"),
        pytest.param(".b.gguf.{host}.{dead}-abc.ewq", id="another-output"),
        pytest.param("a.gguf.{host}.{dead}-abc.ewq", id="not-hidden"),
        pytest.param(".a.gguf.{host}.{dead}-abc", id="no-suffix"),
    ],
)
def test_what_may_be_somebodys_work_is_kept(folder, name):
    kept = folder / name.format(host=HOST, live=os.getpid(), dead=dead_pid())
    kept.mkdir()

    with store.work_dir(folder / "a.gguf", stage="test"):
        pass

    assert names(folder) == [kept.name]


def test_names_that_are_patterns_do_not_remove_others(folder):
    other = folder / f".a.{HOST}.{dead_pid()}-abc.ewq"
    other.mkdir()

    for name in ("*", "?", "[a]"):
        with store.work_dir(folder / name, stage="test"):
            pass

    assert names(folder) == [other.name]


def test_two_runs_have_work_folders_of_their_own(folder):
    with (
        store.work_dir(folder / "a", stage="test") as one,
        store.work_dir(folder / "a", stage="test") as two,
    ):
        assert one != two
        assert one.is_dir()


def test_a_killed_run_leaves_the_final_path_alone_and_the_next_cleans_up(folder):
    path = folder / "a.json"
    path.write_text("old")
    code = (
        "import os, signal, sys; from pathlib import Path; from ewq_gguf import store\n"
        "with store.replacing(Path(sys.argv[1]), stage='t') as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert path.read_text() == "old"
    assert len(names(folder)) == 2

    store.write_text(path, "new", stage="test", force=True)

    assert path.read_text() == "new"
    assert names(folder) == ["a.json"]


# Locks.


def test_another_processes_lock_is_named_with_its_pid(folder):
    path = folder / "out.gguf"
    code = (
        "import sys, time; from pathlib import Path; from ewq_gguf import store\n"
        "with store.locked(Path(sys.argv[1]), stage='t'):\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        begin = time.perf_counter()

        with (
            pytest.raises(LockedError, match=rf"pid {holder.pid} on {HOST}") as caught,
            store.locked(path, stage="test"),
        ):
            pass
        assert caught.value.exit_code == 9
        assert time.perf_counter() - begin < 1
        with store.locked(folder / "other.gguf", stage="test"):
            pass
        holder.stdin.close()
        holder.wait()

    with store.locked(path, stage="test"):
        pass


def test_a_killed_holders_lock_is_free(folder):
    path = folder / "out.gguf"
    code = (
        "import os, signal, sys; from pathlib import Path; from ewq_gguf import store\n"
        "with store.locked(Path(sys.argv[1]), stage='t'):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)

    with store.locked(path, stage="test"):
        pass


def test_a_lock_is_released_by_an_exception(folder):
    for _ in range(2):
        with (
            pytest.raises(ValueError, match="x"),
            store.locked(folder / "a", stage="test"),
        ):
            raise ValueError("x")


def test_a_holder_that_ends_while_its_name_is_read_is_another_process(
    folder, cache, monkeypatch
):
    read_text = Path.read_text

    def ended(path: Path, *args, **kwargs) -> str:
        path.unlink()
        return read_text(path, *args, **kwargs)

    with store.locked(folder / "a", stage="test"):
        assert list((cache / "locks").glob("*.owner"))
        monkeypatch.setattr(Path, "read_text", ended)
        with (
            pytest.raises(LockedError, match="is being written by another process"),
            store.locked(folder / "a", stage="test"),
        ):
            pass


def test_a_lock_leaves_nothing_beside_the_output(folder):
    with store.locked(folder / "a", stage="test"):
        assert names(folder) == []


def test_one_file_has_one_lock_whatever_its_name(folder, monkeypatch):
    """A relative path, one through a link, one with dots: the same output."""
    (folder / "sub").mkdir()
    link = folder.parent / "link"
    link.symlink_to(folder)
    monkeypatch.chdir(folder)
    with store.locked(folder / "a", stage="test"):
        for other in (Path("a"), link / "a", folder / "sub" / ".." / "a"):
            with (
                pytest.raises(LockedError),
                store.locked(other, stage="test"),
            ):
                pass


# Hashes and the cache.


@pytest.mark.parametrize("size", [0, 1, (8 << 20) + 1])
def test_a_files_hash_is_hashlibs(folder, size):
    data = os.urandom(size)
    (folder / "a").write_bytes(data)

    assert store.sha256_file(folder / "a") == hashlib.sha256(data).hexdigest()
    assert store.sha256_text("é") == hashlib.sha256("é".encode()).hexdigest()


def test_the_cache_is_where_the_environment_says(cache, monkeypatch, tmp_path):
    assert store.cache_dir("a", "b") == cache / "a" / "b"
    assert (cache / "a" / "b").is_dir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EWQ_CACHE", "relative")
    assert store.cache_dir().is_absolute()
    monkeypatch.delenv("EWQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert store.cache_dir() == tmp_path / "xdg" / "ewq-gguf"


def test_errors_are_one_line_in_the_form_of_the_fault_list(folder):
    store.write_text(folder / "a", "1", stage="plan")
    with pytest.raises(UsageError) as caught:
        store.write_text(folder / "a", "2", stage="plan")

    assert re.fullmatch(
        r"plan: /[^;]+/a: exists [^;]+; use --force .*", str(caught.value)
    )


@pytest.mark.parametrize("kind", ["device", "pipe", "link", "dangling link"])
def test_what_is_no_regular_file_is_never_replaced(folder, kind):
    path = folder / "out"
    if kind == "device":
        path = Path(os.devnull)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        if kind == "link":
            (folder / "a.json").write_text("old")
        path.symlink_to("a.json")
    before = path.lstat()

    for write in (
        lambda: store.check_writable(path, "test"),
        lambda: store.write_text(path, "new", stage="test", force=True),
        lambda: store.work_dir(path, stage="test").__enter__(),
    ):
        with pytest.raises(UsageError, match="is a link to a|is no regular file"):
            write()

    assert path.lstat().st_ino == before.st_ino
    if kind == "link":
        assert (folder / "a.json").read_text() == "old"


# What is remembered of a file.


def test_an_unchanged_file_is_read_once_and_another_content_again(
    tmp_path, monkeypatch
):
    reads = []

    @read_once(4)
    def read(path, *, upper=False):
        reads.append(path.name)
        return path.read_text().upper() if upper else path.read_text()

    file, later = tmp_path / "file", time.time_ns() + 60_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)
    file.write_text("one")
    assert [read(file), read(file), read(file, upper=True)] == ["one", "one", "ONE"]
    assert len(reads) == 2

    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    time.sleep(0.05)  # more than a tick of the file system's clock
    file.write_text("two")
    os.utime(file, ns=times)
    assert read(file) == "two"
    file.unlink()
    with pytest.raises(FileNotFoundError):
        read(file)


def test_a_file_that_was_written_a_moment_ago_is_read_again(tmp_path):
    (tmp_path / "file").write_text("one")
    read = read_once(4)(Path.read_text)

    assert read(tmp_path / "file") == "one"
    (tmp_path / "file").write_text("two")
    assert read(tmp_path / "file") == "two"


def test_a_cache_key_depends_on_each_part():
    keys = {store.cache_key(*parts) for parts in [(1,), (1, "a"), (2, "a"), ("a", 1)]}

    assert len(keys) == 4
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key in keys)
